"""Pushes a merged model to the hub: only files that have not changed since they were verified."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.errors import UserError
from dpo.sealed import file_sums, share

RECORD = "merge.json"  # in a merged folder: what was merged, and checksums of what was verified
_KINDS = {"weights": str, "base": str, "dtype": str, "merged_from": dict, "files": dict}


def write_record(
    merged: Path, weights: Path, base: str, dtype: str, measured: dict[str, Any]
) -> None:
    """Writes merge.json: what was merged, what was measured, and checksums of the files."""
    record = {
        "weights": weights.name,
        "base": base,
        "dtype": dtype,
        **measured,
        "merged_from": file_sums(weights, "*.safetensors"),
        "files": {**file_sums(merged, "*"), "README.md": "free to be edited"},
    }
    (merged / RECORD).write_text(json.dumps(record, indent=1))
    share(merged, merged / RECORD)


def verified_files(output: Path, folder: Path, *, weights: str, base: str, dtype: str) -> list[str]:
    """Checks that the files of a merge are still those that were verified; returns their names.

    The model card may have been edited. Files that came later are left out.

    Raises:
        UserError: the folder holds no merge, another one than asked for, or a changed file.
    """
    record = _read_record(output)
    asked = {"weights": weights, "base": base, "dtype": dtype}
    other = {key: record[key] for key in asked if asked[key] not in ("auto", record[key])}
    if other or record["merged_from"] != file_sums(folder / weights, "*.safetensors"):
        what = ", ".join(f"{key} {value}" for key, value in other.items()) or "other weights"
        raise UserError(
            f"--output: {output} holds another merge than asked for ({what}). Name another folder, "
            "or move it away."
        )
    if record.get("refused"):
        raise UserError(
            f"--push_to_hub: the merge in {output} is not verified: {record['refused']}. Merge "
            "again without --unverified; or push it as it is with `hf upload`."
        )
    now = file_sums(output, "*")
    changed = [n for n, was in record["files"].items() if n != "README.md" and now.get(n) != was]
    if changed or not (output / "README.md").exists():
        raise UserError(
            f"--output: in {output}, {', '.join(changed) or 'README.md'} is no longer what was "
            "verified. Move the folder away and merge again."
        )
    return [*record["files"], RECORD]


def _read_record(output: Path) -> dict[str, Any]:
    file = output / RECORD
    if not file.exists():
        raise UserError(f"--output: {output} exists and is no merge of this script. Name another.")
    try:
        record = json.loads(file.read_text())
        is_whole = all(isinstance(record[key], kind) for key, kind in _KINDS.items())
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(
            f"--output: {file} is broken, wanted what the merge wrote there. Move {output} away "
            "and merge again."
        )
    return record


def check_can_push(repo: str) -> None:
    """Checks what can be known before the work: the form of the name, and that a token exists.

    Raises:
        UserError: the name is malformed, or there is no token.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"--push_to_hub: got {repo!r}, wanted NAMESPACE/NAME, as on the hub.")
    if not get_token():
        raise UserError(
            "--push_to_hub: there is no token for the hub. Log in with `hf auth login`, or set "
            "HF_TOKEN in the environment, to one that may write."
        )


def push(folder: Path, files: Sequence[str], repo: str, *, public: bool) -> str:
    """Uploads these files in one commit; returns the repository's address.

    A new repository is private unless `public`; the token is what `get_token` of the hub's own
    client finds.

    Raises:
        UserError: the repository is public and `public` is not set, or the hub refuses or cannot
            be reached.
    """
    from httpx2 import HTTPError  # the errors of the hub's client
    from huggingface_hub import HfApi

    check_can_push(repo)
    hub = HfApi()
    try:
        url = hub.create_repo(repo, private=not public, exist_ok=True)
        if not public and not hub.repo_info(repo).private:
            raise UserError(
                f"--push_to_hub: {repo} is public already. Give --public if all may see this "
                f"model, or name another repository. Nothing was pushed; {folder} is complete."
            )
        hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="A model trained with DPO, merged",
        )
    except UserError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(
            f"--push_to_hub: {repo} was not pushed ({type(cause).__name__}: {first_line}). Check "
            f"the name, the network, and that your token may write there. {folder} is complete: "
            "the same command again repeats the push alone."
        ) from error
    return str(url)
