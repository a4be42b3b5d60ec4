"""Worker processes write what one process writes, and leave nothing behind."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from dpo.data import tokens, workers
from dpo.data.formats import to_preference
from dpo.errors import UserError
from tests.data.rows import FICKLE, fickle_rows, load, names, row, rows
from tests.data.tokenizers import BASE, build

pytestmark = pytest.mark.usefixtures("cache")  # empty, for every test


@pytest.fixture
def two_workers(monkeypatch):
    """For any number of rows, and batches of three."""
    monkeypatch.setattr(tokens, "BATCH_ROWS", 3)
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 2)


MIXED = [
    *rows(7),
    row("x", "same", "same"),
    *rows(4),
    row(" ", "y", "z"),
    row("y", "</s> in text", "z"),
    row("long" * 8, "y", "z"),
    *rows(5),
]


def written(path, cache, **options):
    """The bytes of every file that tokenising leaves behind, and the report."""
    report = load(path, **options).report
    (entry,) = cache.iterdir()
    files = {file.name: file.read_bytes() for file in entry.iterdir()}
    shutil.rmtree(entry)
    return files, report


def test_two_workers_write_what_one_writes_byte_for_byte(write, cache, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_ROWS", 3)
    path, options = write(MIXED), {"max_prompt_length": 20, "max_length": 40, "truncation": "left"}
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 1)
    alone = written(path, cache, **options)
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 2)
    monkeypatch.setattr(tokens, "to_preference", None)  # here; a worker has its own
    start = workers._start

    def start_worker(work):
        tokens.to_preference = to_preference
        start(work)

    monkeypatch.setattr(workers, "_start", start_worker)
    assert written(path, cache, **options) == alone
    assert multiprocessing.active_children() == []
    assert alone[1]["dropped"]["identical answers"] == {"count": 1, "rows": [8]}
    assert {*alone[1]["cut"], *alone[1]["noted"]} == {
        "prompt",
        "control token in text, neutralised",
        "the same as an earlier row",
    }
    assert written(write(MIXED[::-1]), cache, **options)[0] != alone[0]


def test_rows_stay_in_order_though_the_first_batch_takes_longest(write, two_workers, monkeypatch):
    read = tokens.to_preference

    def slow(value, *args, **kwargs):
        time.sleep(0.2 if value["prompt"] in ("question 1", "question 2") else 0)
        return read(value, *args, **kwargs)

    monkeypatch.setattr(tokens, "to_preference", slow)
    assert names(load(write(rows(30))).train) == [str(i) for i in range(1, 31)]


@pytest.mark.parametrize("number", [1, 2])
def test_the_first_bad_row_is_told_whoever_meets_it(
    tmp_path, cache, two_workers, monkeypatch, number
):
    """Line 8 is no JSON and read before the rows of its batch, and of others, are looked at."""
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: number)
    good, long, answerless = json.dumps(row("x")), json.dumps(row("b" * 20)), '{"prompt": "x"}'
    options = {"on_overlong": "error", "max_prompt_length": 15, "max_length": 30}
    for bad, told in [
        ([long, answerless, good, "{"], r"rows\.jsonl: row 5: too long \(prompt\)"),
        ([good, answerless, long, "{"], r"rows\.jsonl, line 6: 'chosen' is missing"),
        ([good, good, long, "{"], r"rows\.jsonl: row 7: too long \(prompt\)"),
        ([good, good, good, "{"], r"rows\.jsonl, line 8: not JSON"),
    ]:
        path.write_text("\n".join([good] * 4 + bad + [good] * 4))
        with pytest.raises(UserError, match=told):
            load(str(path), format="text", **options)
    assert (list(cache.iterdir()), multiprocessing.active_children()) == ([], [])


def test_a_set_that_cannot_be_used_is_refused_by_workers_too(write, cache, two_workers):
    with pytest.raises(UserError, match=r"in 3 of the first 3 rows \(such as 1, 2, 3\)"):
        load(write(fickle_rows(60, {1, 2, 3})), FICKLE)
    assert (list(cache.iterdir()), multiprocessing.active_children()) == ([], [])


def test_only_a_few_batches_are_read_ahead():
    """Two for each of two workers and one: a set of any size is not read at once."""
    read = []

    def tasks():
        for number in range(100):
            read.append(number)
            yield number

    with closing(workers.in_order(str, tasks(), 2)) as results:
        assert next(results) == "0"
        assert len(read) == 5
    assert multiprocessing.active_children() == []
    assert [*workers.in_order(str, range(100), 2)] == [*map(str, range(100))]


INTERRUPTED = """
import os, signal, sys, threading, time
from dpo.data import tokens, workers
from tests.data.rows import BASE, build, config, load_data

# Where tests run in the background, a shell has told them to ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
tokens.BATCH_ROWS, tokens._num_workers = 3, lambda num_rows: 2
tokens.to_preference = lambda *args, **kwargs: time.sleep(60)
start = workers._start
# One write a line: two workers that `print` to one pipe may mix their lines.
workers._start = lambda work: (os.write(1, f"{os.getpid()}\\n".encode()), start(work))
load_data(config(sys.argv[1]), build(BASE))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_process_leaves_no_worker(write, cache, number):
    """Ctrl-C reaches the whole group of processes; a kill only the first of them."""
    path = write(rows(30))
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            pids = [int(process.stdout.readline()) for _ in range(2)]
            assert all(map(runs, pids))
            time.sleep(0.2)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.kill()
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    deadline = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, pids))
    if number == signal.SIGINT:
        assert said.count("Traceback") == 1
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert list(cache.iterdir()) == []


def runs(pid):
    """Whether there is such a process, and it is not one that has ended and waits to be noted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_is_left_as_it_was(write, two_workers, monkeypatch, capfd, before):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    build(BASE)(["a", "b"])  # threads of the tokenizer, which it would warn of after a fork
    assert len(load(write(rows(30))).train) == 30
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    assert capfd.readouterr() == ("", "")


def test_a_small_set_needs_no_worker_and_a_large_one_takes_every_core():
    cores = len(os.sched_getaffinity(0))
    assert tokens._num_workers(0) == tokens._num_workers(3999) == 1
    assert tokens._num_workers(10**9) == min(cores, tokens.MAX_WORKERS)
