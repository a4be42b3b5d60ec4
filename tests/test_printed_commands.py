"""Every command that a page prints runs as printed, and prints what the page shows.

A page's shell blocks run in order, in a folder that holds what the reader has: the repository's own
folders, their pairs, and (since nothing is downloaded here) the recipes' hub ids as local folders.
`DPO_` variables make the runs short. After `make train`, as the README says, `.venv` is active.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import transformers

from dpo.commands import NAMES, _module
from tests.models import QUICKSTART_MODEL
from tests.train.runs import rows_file

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run elsewhere, each for a reason.
ELSEWHERE = {
    "make": "a target of the Makefile; .ci/run calls it",
    "source": "the environment of the tests is active already",
    "hf": "it asks for a token",
    "dpo merge runs/neuralhermes --push_to_hub": "tests/scripts/test_merge.py has a hub",
    "bash benchmarks/gpu/run.sh": "it needs a GPU; tests/test_benchmarks.py tries it on a CPU",
}
# These pages go on from a run of the README.
EARLIER = {
    "after_training.md": "dpo train --model.quantization nf4 --train.output_dir runs/article",
    "quickstart.md": "dpo train",
}
SHORT = {
    "DPO_TRAIN__MAX_STEPS": "2",
    "DPO_TRAIN__EVAL_STEPS": "0",
    "DPO_MODEL__DTYPE": "float32",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def blocks(text, language):
    """The fenced blocks of a language, "" for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def commands(text):
    """The commands of a page's shell blocks: comments and line ends are gone, loops are whole."""
    found = []
    for block in blocks(text, "bash"):
        joined = re.sub(r"\s*\\\n\s*", " ", block)
        joined = re.sub(r"\s+#.*", "", joined)
        lines = re.sub(r"\n(?=\s|done)", "\n\0", joined).split("\n")
        for line in lines:
            if line.startswith("\0"):
                found[-1] += "\n" + line[1:]
            elif line.strip():
                found.append(line)
    return found


def reason_to_leave_out(command):
    return next((why for start, why in ELSEWHERE.items() if command.startswith(start)), None)


def runnable(page):
    return [line for line in commands(page.read_text()) if not reason_to_leave_out(line)]


def shape(line):
    """A printed line without its numbers, and without what a model has answered."""
    line = re.sub(r"(policy|base): .*", r"\1: ...", line)
    line = re.sub(r"(?<!\w)[-+]?(\d[\d,.]*(e-?\d+)?|nan)( ?%)?", " # ", line)
    return " ".join(line.split())


@pytest.fixture
def home(tmp_path):
    """What a reader has in the folder where the commands are typed."""
    for name in ("dpo", "scripts", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("MODEL", "teknium/OpenHermes-2.5-Mistral-7B"):
        shutil.copytree(QUICKSTART_MODEL, tmp_path / name)
    pairs = rows_file(tmp_path, 60, "pairs.jsonl")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "Intel/orca_dpo_pairs")
    questions = [{"prompt": row["question"]} for row in rows[:2]]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return tmp_path


def typed(command, where, **variables):
    """Runs a command as bash does, and returns everything that it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cache = {"HF_DATASETS_CACHE": str(where / "cache")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=where,
        env=os.environ | {"PATH": path, **cache, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [*filter(runnable, PAGES)], ids=lambda page: page.name)
def test_a_pages_commands_run_as_printed_and_print_what_it_shows(page, home):
    printed = ""
    if page.name in EARLIER:
        printed = typed(EARLIER[page.name], home, **SHORT)
    for command in runnable(page):
        first = re.sub(r"for (\w+) in (\S+) .*; do", r"for \1 in \2; do", command)  # of a sweep
        printed += typed(first, home, **SHORT)
    lines = {shape(line) for line in printed.splitlines()}
    for block in blocks(page.read_text(), ""):
        for line in block.splitlines():
            assert shape(line) in lines, f"{page.name} shows what no command prints: {line}"


@pytest.mark.slow
def test_the_printed_plan_is_the_planners_to_the_last_digit(tmp_path):
    """docs/performance.md shows one whole output; the command stands above it."""
    text = (ROOT / "docs" / "performance.md").read_text()
    (shown,) = blocks(text, "")
    (command,) = re.findall(r"`(dpo plan [^`]*--lengths [^`]*)`", text)
    mistral = transformers.MistralConfig(vocab_size=32002, architectures=["MistralForCausalLM"])
    mistral.save_pretrained(tmp_path / "teknium/OpenHermes-2.5-Mistral-7B")
    assert typed(command, tmp_path).split() == shown.split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_gives_a_command_exists(page):
    """In shell blocks, and in code within sentences."""
    text = page.read_text()
    for command in [*commands(text), *re.findall(r"`(dpo [^`]+|accelerate launch [^`]+)`", text)]:
        assert not unknown_flags(command), command


def unknown_flags(command):
    """The flags of a command line that its sub-command does not have."""
    found = re.search(r"\bdpo ([a-z-]+)|scripts/(\w+)\.py", command)
    if not found:
        return set()
    name = found[1] or found[2].replace("_", "-")
    assert name in NAMES, command
    known = _module(name).parser("x")._option_string_actions
    given = re.findall(r"--[\w.]+", command[found.end() :])
    of_loss = re.compile(r"(--loss\.options)\.\w+")  # which any loss may have
    return {flag for flag in given if of_loss.sub(r"\1", flag) not in known}


def test_a_wrong_flag_and_a_changed_table_would_be_seen():
    assert unknown_flags("dpo merge RUN --wieghts best") == {"--wieghts"}
    assert unknown_flags("accelerate launch scripts/train.py --loss.bta 1") == {"--loss.bta"}
    assert shape("Right answers     30.5%   98.5%") == shape("Right answers  1.0% 0.5%")
    assert shape("Right answers     30.5%   98.5%") != shape("Exact match  30.5%  98.5%")


def test_commands_are_read_whole():
    text = "```bash\nfor x in 1 2; do\n  dpo a --b $x \\\n      --c   # why\ndone\ndpo d\n```\n"
    assert commands(text) == ["for x in 1 2; do\n  dpo a --b $x --c\ndone", "dpo d"]
