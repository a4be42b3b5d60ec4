"""Digests of files: what is read, what is known by name, what is not trusted."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.data import files
from dpo.data.files import (
    cache_folder,
    digest,
    file_digests,
    use_a_writable_cache,
)
from dpo.sealed import read_digests

SHA256 = hashlib.sha256(b"another content").hexdigest()
SHA1 = hashlib.sha1(b"another content").hexdigest()


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read, as they are."""
    names, sha256 = [], files.sha256

    def noted(file):
        names.append(file.resolve().name)
        return sha256(file)

    monkeypatch.setattr(files, "sha256", noted)
    return names


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def in_hub_cache(tmp_path, name, content=b"content"):
    """A file as the hub's client keeps it: a link to a blob."""
    blob = write(tmp_path / "models--some--model" / "blobs" / name, content)
    link = tmp_path / "models--some--model" / "snapshots" / "1" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(Path("../../blobs") / blob.name)
    return link


def test_digests_are_sha256_in_the_order_of_the_files(tmp_path):
    """The first is by far the largest, and done last."""
    contents = [b"a" * 20_000_000, *(bytes([i]) for i in range(40))]
    paths = [write(tmp_path / f"{i}", content) for i, content in enumerate(contents)]
    assert file_digests(paths) == read_digests(paths) == [sha256(content) for content in contents]
    assert file_digests([]) == read_digests([]) == []


@pytest.mark.parametrize("name", [SHA256, SHA1])
def test_a_blob_of_the_hub_is_known_by_its_name_and_not_read(tmp_path, read, name):
    link = in_hub_cache(tmp_path, name)
    assert (file_digests([link]), read) == ([name], [])


@pytest.mark.parametrize("name", [SHA256[1:], SHA256.upper(), SHA1 + ".incomplete", "model"])
def test_a_blob_whose_name_is_no_digest_is_read(tmp_path, read, name):
    assert file_digests([in_hub_cache(tmp_path, name)]) == [sha256(b"content")]
    assert read == [name]


def test_a_name_alone_makes_no_blob(tmp_path, read):
    """A file that is called like a digest, and a link to one that lies elsewhere, are read."""
    path, link = write(tmp_path / "blobs" / SHA256, b"content"), tmp_path / "link"
    link.symlink_to(write(tmp_path / "elsewhere" / SHA256, b"other"))
    assert file_digests([path, link]) == [sha256(b"content"), sha256(b"other")]
    assert len(read) == 2


def test_another_content_of_the_same_size_and_time_is_noticed(tmp_path):
    """Programs that copy set the time of change back."""
    path = write(tmp_path / "a", b"content")
    before = path.stat()
    assert file_digests([path]) == [sha256(b"content")]
    write(path, b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digests([path]) == [sha256(b"CONTENT")]


def test_a_missing_file_is_the_callers_to_tell(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_digests([tmp_path / "no file"])


def test_a_digest_is_of_all_parts_and_of_where_each_ends():
    known = digest("a", ["b"], None)
    assert known == digest("a", ["b"], None)
    assert len({known, digest("a", ["b"]), digest("ab", None), digest("a", "b", None)}) == 4


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HF_HOME": "~/hub"},
        {"XDG_CACHE_HOME": "/tmp/xdg"},
        {"HF_HOME": "/tmp/hub", "HF_DATASETS_CACHE": "/tmp/cache"},
    ],
    ids=["default", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"],
)
def test_the_cache_folder_is_where_datasets_keeps_its_own(given):
    program = (
        "import datasets.config\n"
        "from dpo.data.files import cache_folder\n"
        "assert cache_folder('x') == datasets.config.HF_DATASETS_CACHE / 'x'\n"
    )
    names = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    subprocess.run([sys.executable, "-c", program], env=rest | given, check=True)


def test_a_cache_that_cannot_be_written_to_is_replaced_by_one_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "shared" / "datasets"))
    (tmp_path / "shared").mkdir()
    assert use_a_writable_cache(tmp_path / "run") == []
    assert cache_folder("x") == tmp_path / "shared" / "datasets" / "x"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "shared")
    (said,) = use_a_writable_cache(tmp_path / "run")
    assert said == (
        f"{tmp_path}/shared/datasets cannot be written to: caches are in {tmp_path}/run.cache"
    )
    assert cache_folder("x") == tmp_path / "run.cache" / "x"
