"""SIGKILL at random moments, again and again: what ends is the straight run, to the last bit.

`CHAOS_KILLS` says how often; `make chaos N=1000` prints what came of them.
"""

import os
import random
import subprocess
import sys
import time

import pytest

from dpo.run_folder import list_checkpoints
from tests.chaos.runs import FLAGS, outcome
from tests.train.runs import QUIET, rows_file

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CHAOS_KILLS", "5"))


def start(folder, name, cache):
    """The run, in a process of its own."""
    where = ["--data.name_or_path", rows_file(folder, 24), "--train.output_dir", folder / name]
    flags = ["--loss.beta", 0.1, "--optim.warmup_steps", 0, "--train.resume", "auto"]
    often = ["--train.max_steps", 30, "--train.save_steps", 1]
    command = [sys.executable, "-m", "dpo", "train", *QUIET, *flags, *FLAGS.split(), *often, *where]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / cache)}
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


def test_killed_runs_end_as_the_straight_one(tmp_path, record_property):
    chance = random.Random(os.environ.get("CHAOS_SEED", "0"))
    began = time.monotonic()
    alone = start(tmp_path, "straight", "cache-of-the-straight")
    assert alone.communicate()
    assert alone.returncode == 0
    whole = time.monotonic() - began
    straight = outcome(tmp_path / "straight")
    kills, in_a_save, runs, differing = 0, 0, 0, 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / f"run-{runs}"
        while not (folder / "summary.json").exists():
            process = start(tmp_path, folder.name, f"cache-{runs}")
            try:
                left = chance.uniform(0, whole) if kills < KILLS else None
                _, said = process.communicate(timeout=left)
                assert process.returncode == 0, said.decode()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                in_a_save += any(folder.glob(".checkpoint-*")) or any(folder.glob(".best"))
        differing += outcome(folder) != straight
        assert len(list_checkpoints(folder)) == 2
    figures = f"{kills} kills ({in_a_save} in a save) over {runs} runs: {differing} differ"
    record_property("figures", figures)
    assert differing == 0
