import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "dpo").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]

# Each imports only from its left, or from itself.
ORDER = """
errors hidden imported losses objective logps catalogue metrics config signals cli sealed run_folder
table ranks device data model plan
evaluate report train after commands __main__ scripts
""".split()
OUTSIDE = ("", "quickstart")  # dpo/__init__.py, and the scripts that make the quickstart's files
BARE = ("losses", "logps")  # a student runs these with torch alone
BARE_MAY_IMPORT = {"torch", "jaxtyping", *sys.stdlib_module_names}
INSIDE_FUNCTIONS = {"datasets", "peft", "bitsandbytes", "matplotlib", "lm_eval"}


def module_name(path):
    """dpo/data/stream.py: dpo.data.stream; scripts/train.py: scripts.train."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module):
    """Its name in ORDER or OUTSIDE: dpo.data.stream is of `data`, dpo itself of ''."""
    package, *rest = module.split(".")
    return "scripts" if package == "scripts" else rest[0] if rest else ""


def imports(source, module, *, is_package=False):
    """(line, imported module, whether it runs when the module is imported) of every import."""

    def visit(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    up = child.level - is_package
                    parents = module.split(".")[: -up or None]
                    base = ".".join([*parents, *([base] if base else [])])
                if base == "dpo":  # `from dpo import losses` imports dpo.losses
                    yield from (
                        (child.lineno, f"dpo.{alias.name}", at_import) for alias in child.names
                    )
                else:
                    yield child.lineno, base, at_import
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from visit(child, at_import and not inner)

    return visit(ast.parse(source), True)


def complaints(source, module, *, is_package=False):
    """What is wrong with the imports of one module, in words."""
    own = place(module)
    if own not in (*ORDER, *OUTSIDE):
        return [f"{module}: dpo has no place for {own!r}; the order is {', '.join(ORDER)}"]
    found = []
    for line, imported, at_import in imports(source, module, is_package=is_package):
        where, top = f"{module}, line {line}: imports {imported}", imported.split(".")[0]
        if top in ("dpo", "scripts"):
            other = place(imported)
            if own == "":
                found.append(f"{where}, though dpo itself imports nothing of its own")
            elif other not in (*ORDER, own):
                found.append(f"{where}, which is no module of the order")
            elif own in ORDER and ORDER.index(other) > ORDER.index(own):
                found.append(f"{where}, which is to the right of {own}")
            elif own == other == "scripts":
                found.append(f"{where}, though scripts hold no logic to import")
        if own in BARE and top not in (BARE_MAY_IMPORT | {"dpo"}):
            found.append(f"{where}, though {own} needs torch and jaxtyping alone")
        if own in BARE and top == "dpo" and imported != "dpo.losses":
            found.append(f"{where}, though {own} stands by itself")
        if top in INSIDE_FUNCTIONS and at_import:
            found.append(f"{where} outside of a function")
    return found


def test_there_are_sources_of_every_place():
    """The checks below look at something: every place of the order has a file."""
    assert {place(module_name(path)) for path in SOURCES} >= set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_imports_run_one_way_only_and_the_heavy_ones_stay_inside_functions(path):
    is_package = path.name == "__init__.py"
    assert complaints(path.read_text(), module_name(path), is_package=is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("dpo.data.stream", "from dpo.model.scorer import Scorer", "to the right of data"),
        ("dpo.data.stream", "import dpo.train.trainer", "to the right of data"),
        ("dpo.data.stream", "from dpo import train", "to the right of data"),
        ("dpo.data.stream", "def f():\n    from dpo.plan import flops", "to the right of data"),
        ("dpo.data.stream", "from ..model import scorer", "to the right of data"),
        ("dpo.data.stream", "if True:\n    import scripts.train", "to the right of data"),
        ("dpo.model.load", "from dpo.utils import helper", "no module of the order"),
        ("dpo.metrics", "from dpo.config import Config", "to the right of metrics"),
        ("dpo.logps", "import numpy", "needs torch and jaxtyping alone"),
        ("dpo.losses", "def f():\n    import transformers", "needs torch and jaxtyping alone"),
        ("dpo.logps", "from dpo.errors import UserError", "stands by itself"),
        ("dpo.evaluate.samples", "from dpo.after import merge", "to the right of evaluate"),
        ("dpo.train.step", "from dpo.after import finished", "to the right of train"),
        ("dpo.model.load", "import peft", "outside of a function"),
        ("dpo.train.optim", "import bitsandbytes.optim", "outside of a function"),
        ("dpo.report", "class A:\n    from matplotlib import pyplot", "outside of a function"),
        ("scripts.evaluate", "try:\n    import lm_eval\nexcept E: pass", "outside of a function"),
        ("scripts.evaluate", "from scripts.train import main", "no logic to import"),
        ("dpo.helpers", "", "no place for 'helpers'"),
        ("dpo", "from dpo.losses import sigmoid", "imports nothing of its own"),
        ("dpo.config", "from dpo.quickstart import build", "no module of the order"),
    ],
)
def test_a_wrong_import_is_caught(module, source, said):
    (complaint,) = complaints(source, module)
    assert said in complaint


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpo.model.load", "def f():\n    import peft\n    import bitsandbytes"),
        ("dpo.model.load", "async def f():\n    from peft import LoraConfig"),
        ("dpo.train.trainer", "from dpo.plan.fit import choose_base\nfrom dpo import losses"),
        ("dpo.logps", "from dpo.losses import PairLogps"),
        ("dpo.data.stream", "from .audit import Audit\nfrom dpo.data import chat\nimport numpy"),
        ("dpo.losses", "import torch.nn.functional as F\nfrom collections import abc"),
        ("scripts.train", "from dpo.train.trainer import train"),
    ],
)
def test_a_right_import_is_let_through(module, source):
    """The negative control of the negative control."""
    assert complaints(source, module) == []


# ------------------------------------------------------------------------------ what is declared


def declared():
    """{distribution: lower bound or ""} of setup.cfg, the `eval` extra included."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lists = settings["options"]["install_requires"], settings["options.extras_require"]["eval"]
    lines = [line for text in lists for line in text.split("\n") if line]
    parts = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", line).groups() for line in lines]
    return {name.lower().replace("_", "-"): bound or "" for name, bound in parts}


def undeclared(source, module):
    """Third-party packages that are imported and come, if at all, with another one's."""
    names = {name.split(".")[0] for _, name, _ in imports(source, module)}
    known = packages_distributions()
    return {
        name
        for name in names - {"dpo", "scripts", "", *sys.stdlib_module_names}
        if not {d.lower().replace("_", "-") for d in known.get(name, [])} & declared().keys()
    }


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_what_is_imported_is_declared(path):
    """huggingface_hub 1 fitted the bounds once, and brought no httpx2: merge.py did not start."""
    assert undeclared(path.read_text(), module_name(path)) == set()


def test_a_package_that_came_with_another_is_noticed():
    assert undeclared("def f():\n    import numpy, markdown_it", "dpo.x") == {"markdown_it"}


def test_the_lowest_versions_are_named_as_the_pinned_ones_are():
    """`make test-oldest` puts one in the other's place, by name."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[2:]
    )
    written = re.findall(r"^ +([a-z_]+)(?:\[[a-z]+\])?>=", (ROOT / "setup.cfg").read_text(), re.M)
    bounds = [bound for bound in declared().values() if bound]
    assert len(written) == len(bounds) >= 8  # what the Makefile's pattern finds is all of them
    assert set(written) <= pins.keys()


def test_nothing_is_called_utils():
    """A name that says nothing collects everything."""
    assert [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc")] == []
