"""The file that results go to, tried before the long work that they come from."""

import tempfile
from pathlib import Path

from dpo.errors import UserError


def check_output(file: Path) -> None:
    """Refuses what cannot be written, and leaves no trace of the attempt.

    Raises:
        UserError: `file` is a folder or read-only, or its folder is missing or takes no new file.
    """
    try:
        with tempfile.TemporaryFile(dir=file.parent):  # permission bits do not say it all: /proc
            pass
        if file.exists():
            file.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--output: {file} cannot be written ({error.strerror}). Name another, in a "
            "folder that exists."
        ) from None
