"""The run folder's names and lines; and that no other module spells the names."""

import ast
from pathlib import Path

import pytest

from dpo import run_folder
from dpo.run_folder import (
    append_lines,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    read_lines,
    read_whole,
)

ROOT = Path(__file__).parents[1]
OWN = [value for name, value in vars(run_folder).items() if name.isupper() and name[0] != "_"]
NAMES = {*run_folder.MEASURED.values(), *(value for value in OWN if isinstance(value, str))}
FILES = {name for name in NAMES if "." in name}
FOLDERS = NAMES - FILES


def test_lines_are_read_as_they_were_appended(tmp_path):
    """A line separator within a text is no end of a line."""
    file, lines = tmp_path / "a.jsonl", [{"step": 0, "text": "a\u2028b"}, {"step": 1}, {"step": 2}]
    assert read_lines(file) == []
    append_lines(file, lines[:1])
    append_lines(file, lines[1:])
    assert read_lines(file) == lines
    assert read_lines(file, ends=True) == [lines[0], lines[2]]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    append_lines(file, [{"step": 1}])
    with file.open("a") as log:
        log.write('{"step": 2, "tra')
    assert read_lines(file) == [{"step": 1}]
    assert read_lines(file, ends=True) == [{"step": 1}, {"step": 1}]  # it is the first and the last


def test_a_file_that_is_missing_is_what_the_caller_says(tmp_path):
    assert read_whole(tmp_path / "absent.json", {"a": 1}) == {"a": 1}
    (tmp_path / "there.json").write_text("[2]")
    assert read_whole(tmp_path / "there.json", []) == [2]


def test_checkpoints_are_listed_by_step_and_nothing_else_is():
    assert checkpoint_step(Path(checkpoint_name(12))) == 12
    for name in ("final", "12", "checkpoint-", "checkpoint-best", ".checkpoint-3"):
        assert checkpoint_step(Path(name)) is None


def test_the_oldest_checkpoint_comes_first(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", ".checkpoint-11", "final"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


# ---------------------------------------------------------------------- nobody else spells a name


def spelt(source):
    """(line, name) of every name of the run folder in a module; docstrings and messages may."""
    for node in ast.walk(ast.parse(source)):
        operands: list[ast.expr | None] = []
        if isinstance(node, ast.Constant) and node.value in FILES:
            yield node.lineno, node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            operands = [node.right]
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.arguments):
            operands = [*node.defaults, *node.kw_defaults]
        elif isinstance(node, ast.AnnAssign):
            operands = [node.value]
        for operand in operands:
            if isinstance(operand, ast.Constant) and operand.value in FOLDERS:
                yield operand.lineno, operand.value


@pytest.mark.parametrize("path", sorted((ROOT / "dpo").rglob("*.py")), ids=lambda p: p.stem)
def test_no_other_module_spells_a_name(path):
    if path.name == "run_folder.py":
        pytest.skip("they are its own")
    found = list(spelt(path.read_text()))
    if path.name in ("config.py", "cli.py"):  # the packaged recipe of the quickstart
        found = [(line, name) for line, name in found if name != run_folder.CONFIG]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'folder / "metrics.jsonl"',
        'names = ("samples.jsonl", "a")',
        'folder / "final" / "x"',
        'folder.name == "best"',
        'def f(weights="final"): ...',
        'class A:\n    weights: str = "final"',
    ],
)
def test_a_name_would_be_seen(source):
    assert len(list(spelt(source))) == 1


def test_a_word_is_no_name():
    assert list(spelt('state["best"], say("no metrics.jsonl there")')) == []
