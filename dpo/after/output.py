"""Whether results can be written, checked before the long work that gives them."""

import tempfile
from pathlib import Path

from dpo.errors import UserError


def check_output(file: Path) -> None:
    """Refuses a file that cannot be written, and leaves no trace of the attempt.

    Raises:
        UserError: `file` is a folder or read-only, or its folder is missing or takes no new file.
    """
    try:
        with tempfile.TemporaryFile(dir=file.parent):  # permission bits are not enough: /proc
            pass
        if file.exists():
            file.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--output: {file} cannot be written ({error.strerror}). Name another, in a "
            "folder that exists."
        ) from None
