"""The package as it is installed: built, and used where the repository is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASIDE = (".git", ".venv*", "runs", "dist", "build", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist, and of the wheel that is made from the sdist."""
    source = tmp_path_factory.mktemp("built") / "dpo"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*ASIDE))
    build = [sys.executable, "-m", "build", "--outdir", "dist"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    return source / "dist"


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_the_commands_read(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    data = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dpo").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    data |= {f"dpo/recipes/{recipe.name}" for recipe in (ROOT / "scripts/configs").iterdir()}
    assert len(data) > 10
    assert data <= set(names)
    assert data <= files
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


@pytest.mark.slow
def test_the_wheel_trains_where_the_repository_is_not(built, tmp_path):
    """In an environment that has the tests' dependencies, but not the repository."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [tmp_path / "env/bin/python", "-m", "pip", "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, *built.glob("*.whl")], check=True)

    def dpo(*arguments):
        done = subprocess.run(
            [tmp_path / "env/bin/dpo", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import dpo; print(dpo.__file__)"
    python = tmp_path / "env/bin/python"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.startswith(str(packages))
    assert dpo("--version") == "dpo 0.4.0\n"
    assert dpo("recipes").count("\n") == 5
    assert "runs/quickstart/final" in dpo("train", "--train.max_steps", "2")
    assert "verified" in dpo("merge", "runs/quickstart")
    assert "policy:" in dpo("generate", "runs/quickstart/merged", "Which?")
    assert "up to date" in dpo("report", "runs/quickstart")
    (tmp_path / "runs/quickstart/report.html").unlink()
    assert "The report is in" in dpo("report", "runs/quickstart")
