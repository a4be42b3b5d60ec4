"""Writes docs/what_is_refused.md: every refusal of the package, read from its code.

python docs/what_is_refused.py > docs/what_is_refused.md
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dpo"
HEAD = """\
# What is refused

Whatever cannot be honoured exactly is refused before anything is lost: one message, exit code 2, no
traceback. It says where, what it got, what it wanted and what to do. Below is each of them as the
code has it, by module; what stands in {braces} is filled in. A row that cannot be used is dropped
for one of the reasons at the end, and counted.

`python docs/what_is_refused.py` writes this page; a test holds that it is what the code says.
"""


def text_of(node: ast.expr) -> str:
    """A message as the source has it, with {names} where values are filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return f"{{{ast.unparse(node)}}}"


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """The calls of these names, in the order of the source."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    named = [c for c in found if isinstance(c.func, ast.Name) and c.func.id in names]
    return iter(sorted(named, key=lambda call: call.lineno))


def refusals(tree: ast.AST) -> Iterator[str]:
    """Messages of `UserError` and its kinds, and of `refuse` (a key, a value, what is wanted)."""
    for call in calls(tree, "UserError", "RefusedRowsError", "NotFiniteError", "refuse"):
        if call.func.id == "refuse" and len(call.args) == 3:  # type: ignore[attr-defined]
            key, got, wanted = map(text_of, call.args)
            yield f"{key}: got {got}, wanted {wanted}."
        else:
            yield text_of(call.args[0])


def page() -> str:
    """The page."""
    lines, reasons = [HEAD], []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        # A message that is one variable is another's, handed on.
        said = [s for s in refusals(tree) if not (s.startswith("{") and s.find("}") == len(s) - 1)]
        reasons += [text_of(call.args[0]) for call in calls(tree, "RowError")]
        if said:
            lines.append(f"\n## {file.relative_to(PACKAGE.parent)}\n")
            lines += [f"- {' '.join(s.split())}" for s in dict.fromkeys(said)]
    lines.append("\n## Why rows are dropped\n")
    lines += [f"- {reason}" for reason in sorted({*reasons})]
    return "\n".join(lines).replace("<|", "`<|").replace("|>", "|>`") + "\n"


if __name__ == "__main__":
    print(page(), end="")
