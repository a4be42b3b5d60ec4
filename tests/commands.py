"""Scripts as a user runs them: in a process of their own, or here, which costs no imports."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tests.train.runs import forget_accelerate

SCRIPTS = Path(__file__).parents[1] / "scripts"


def as_process(name, *arguments, **environment):
    """Exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )
    return done.returncode, done.stdout, done.stderr


def as_two_processes(*words, seconds=180):
    """What two ranks on the CPU print; a port of their own, and an end if they wait for ever."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    process = subprocess.run(
        [*map(str, (*launch, *words))],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=SCRIPTS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def called(name, *arguments):
    """Exit code, stdout and stderr; what is no user error comes through as it is raised."""
    forget_accelerate()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
    return code, out.getvalue(), err.getvalue()
