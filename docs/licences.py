"""Writes licences.md: the licence that each pinned package names in its metadata.

python docs/licences.py > docs/licences.md
"""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTRODUCTION = """\
# Licences of what is installed

dpo itself is under Apache-2.0. These are the packages of [constraints.txt](../constraints.txt),
each with the licence that it names in its own metadata. With a GPU, torch brings NVIDIA's libraries
as well, which are under NVIDIA's own terms. `python docs/licences.py` writes this page; a test
holds that it is what the packages say.

| package | licence |
|---|---|"""


def pinned() -> dict[str, str]:
    """{name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def licence(package: str) -> str:
    """What the package says: an SPDX expression, its classifiers, or the first line of a text."""
    said = metadata(package)
    if expression := said["License-Expression"]:
        return expression
    listed = [
        c.split(" :: ")[-1] for c in said.get_all("Classifier", []) if c.startswith("License")
    ]
    text = (said["License"] or "").strip()
    if listed and listed != ["OSI Approved"]:
        return ", ".join(listed)
    return re.split(r"[\n|]", text)[0] or "(none named)"


def page() -> str:
    """The page; a package that is not installed here stands without a licence."""
    rows = []
    for name in sorted(pinned(), key=str.lower):
        try:
            rows.append(f"| {name} | {licence(name)} |")
        except PackageNotFoundError:
            rows.append(f"| {name} | (not installed) |")
    return "\n".join([INTRODUCTION, *rows])


if __name__ == "__main__":
    print(page())
