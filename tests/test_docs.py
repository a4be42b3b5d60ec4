"""The documents tell the truth: links, anchors, tables, and the keys that they name."""

import ast
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

from dpo.catalogue import CATALOGUE
from dpo.cli import known_keys
from dpo.data.formats import FORMATS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [
    (page, target)
    for page in PAGES
    for target in re.findall(r"\[[^\]]+\]\((?!http)([^)]+)\)", page.read_text())
]


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(
    ("page", "target"), LINKS, ids=[f"{page.name}-{target}" for page, target in LINKS]
)
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page, target):
    path, _, fragment = target.partition("#")
    file = (page.parent / path) if path else page
    assert file.exists(), f"{page.name} links to {target}"
    if fragment and not fragment.startswith("L"):
        headings = re.findall(r"^#+ (.*)", file.read_text(), flags=re.MULTILINE)
        assert fragment in map(anchor, headings), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_key_that_is_named_exists(page):
    """`section.key` in code marks or as a flag; negative control below."""
    unknown = named_keys(page.read_text()) - set(known_keys())
    assert not unknown


def named_keys(text):
    """Every section.key that a text names."""
    sections = {key.split(".")[0] for key in known_keys()}
    return {
        f"{section}.{key}"
        for section, key in re.findall(r"(?:`|--)([a-z]+)\.([a-z_]+)(?![\w.(])", text)
        if section in sections
    }


def test_an_unknown_key_would_be_seen():
    text = "Set `loss.gamma` or --train.stepps 3; `lora.r` is fine."
    assert named_keys(text) == {"loss.gamma", "train.stepps", "lora.r"}


def test_the_table_of_metrics_says_of_each_what_the_catalogue_says():
    """A name with one prefix carries it; the column how to read it is the page's own."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| .*\|$", page, flags=re.MULTILINE)
    assert rows == [
        (name if len(metric.logged) > 1 else f"{metric.logged[0]}/{name}", metric.meaning)
        for name, metric in CATALOGUE.items()
    ]


def test_every_format_is_in_the_table():
    page = (ROOT / "docs" / "data.md").read_text()
    for name in FORMATS:
        assert f"| `{name}` |" in page


def test_every_reason_to_drop_a_row_is_in_the_table():
    """Each string that the code gives a RowError."""
    sources = "".join(path.read_text() for path in (ROOT / "dpo" / "data").glob("*.py"))
    reasons = set(re.findall(r"RowError\(\s*\"([^\"]+)\"", sources))
    assert len(reasons) >= 12
    page = (ROOT / "docs" / "data.md").read_text()
    for reason in reasons - {"answer does not end with the assistant"}:
        assert reason.removesuffix(" with the assistant") in page, reason


def test_the_page_of_refusals_is_what_the_code_says():
    """`python docs/what_is_refused.py > docs/what_is_refused.md` writes it anew."""
    spec = importlib.util.spec_from_file_location("refused", ROOT / "docs" / "what_is_refused.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "what_is_refused.md").read_text() == module.page()
    said = module.refusals(ast.parse('def f(x):\n    raise UserError(f"no {x}: " "take y")'))
    assert list(said) == ["no {x}: take y"]


def test_the_list_of_licences_is_what_the_pinned_packages_say():
    """`python docs/licences.py > docs/licences.md` writes it anew; other versions may differ."""
    spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "licences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "licences.md").read_text()
    assert text.startswith(module.INTRODUCTION)
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", text, re.MULTILINE))
    listed.pop("package")
    assert listed.keys() == module.pinned().keys()
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    installed = {name: version.split("+")[0] for name, version in installed.items()}
    same = [name for name, v in module.pinned().items() if installed.get(name.lower()) == v]
    assert len(same) > 60
    assert {name: listed[name] for name in same} == {name: module.licence(name) for name in same}
