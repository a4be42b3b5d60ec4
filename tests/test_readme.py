"""The README tells the truth: its links, its lines, its example."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\[([^\]]+)\]\((?!http)([^)#]+)(?:#L(\d+))?\)", README)


def test_the_readme_links_to_code():
    assert sum(1 for _, _, line in LINKS if line) >= 15


@pytest.mark.parametrize(("text", "path", "line"), LINKS, ids=lambda value: value)
def test_a_link_points_at_what_it_names(text, path, line):
    assert (ROOT / path).exists()
    if line:
        name = text.strip("`")
        source = (ROOT / path).read_text().splitlines()
        found = [i for i, code in enumerate(source, 1) if re.search(rf"\b{name}\b", code)]
        assert int(line) in found, f"{name} stands in {path} at lines {found}"


def test_the_example_prints_what_its_comments_say(capsys):
    (example,) = re.findall(r"```python\n(import torch.*?)```", README, flags=re.DOTALL)
    exec(example)
    printed = capsys.readouterr().out
    assert printed == "tensor([0.5544])\n(tensor([0.1000]), tensor([-0.2000]))\n"


def test_make_article_runs_the_commands_of_the_readme():
    """Line by line; the Makefile adds its own folder and accelerate's defaults."""
    block = README.split("## The article in small")[1].split("```bash\n")[1].split("```")[0]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)/", "").replace("$(LAUNCH) ", "")
    recipe = makefile.split("\narticle:")[1].split("\n\n")[0]
    assert block.strip().splitlines() == [line.strip() for line in recipe.splitlines()[2:]]
