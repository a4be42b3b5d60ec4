"""Digests of files: what is read, what is known by name or by a note, what is not trusted."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from dpo.data import files
from dpo.data.files import file_digests, read_digests

SHA256 = hashlib.sha256(b"another content").hexdigest()
SHA1 = hashlib.sha1(b"another content").hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no waiting until a file has settled."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read, as they are."""
    names, sha256 = [], files._sha256

    def noted(file):
        names.append(file.name)
        return sha256(file)

    monkeypatch.setattr(files, "_sha256", noted)
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


def test_what_has_not_changed_is_not_read_again(tmp_path, read):
    path, link = write(tmp_path / "a", b"content"), tmp_path / "link"
    link.symlink_to(path)
    assert file_digests([path]) == file_digests([path]) == file_digests([link])
    assert read == ["a"]


@pytest.mark.parametrize("is_new", [False, True])
def test_another_content_of_the_same_size_is_noticed(tmp_path, is_new):
    """Also under the old time of change, which programs that copy set back: written over or new."""
    path = write(tmp_path / "a", b"content")
    before = path.stat()
    assert file_digests([path]) == [sha256(b"content")]
    time.sleep(0.02)  # the clock of the file system goes in steps
    if is_new:
        os.replace(write(tmp_path / "new", b"CONTENT"), path)
    else:
        write(path, b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digests([path]) == [sha256(b"CONTENT")]


def test_a_file_that_has_just_been_written_gets_no_note(tmp_path, read, cache, monkeypatch):
    """Nor does one from the future, of a machine whose clock is ahead."""
    monkeypatch.setattr(files, "SETTLED_NS", 2_000_000_000)
    path = write(tmp_path / "a", b"content")
    assert file_digests([path]) == file_digests([path]) == [sha256(b"content")]
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    os.utime(path, ns=(time.time_ns() + 10**12,) * 2)
    file_digests([path])
    assert (read, cache.exists()) == (["a"] * 3, False)


def test_a_file_that_changes_while_it_is_read_gets_no_note(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a", b"content")
    monkeypatch.setattr(files, "_sha256", lambda file: write(file, b"longer content") and "0" * 64)
    file_digests([path])
    assert not cache.exists()


@pytest.mark.parametrize("broken", [b"", b"0" * 63, b"\xff" * 64, b"0" * 64 + b"\n"])
def test_a_broken_note_is_not_believed_and_replaced(tmp_path, read, cache, broken):
    path = write(tmp_path / "a", b"content")
    file_digests([path])
    (note,) = (cache / "dpo_file_digests").iterdir()
    note.write_bytes(broken)
    assert file_digests([path]) == file_digests([path]) == [sha256(b"content")]
    assert read == ["a", "a"]
    assert [*note.parent.iterdir()] == [note]


def test_a_note_is_believed_or_the_tests_above_show_nothing(tmp_path, cache):
    """Negative control: it is the note that is returned."""
    path = write(tmp_path / "a", b"content")
    file_digests([path])
    (note,) = (cache / "dpo_file_digests").iterdir()
    note.write_text("0" * 64)
    assert file_digests([path]) == ["0" * 64]
    assert read_digests([path]) == [sha256(b"content")]


def test_where_no_note_can_be_written_the_file_is_read_each_time(tmp_path, read, cache):
    cache.write_text("a file where the folder should be")
    path = write(tmp_path / "a", b"content")
    assert file_digests([path]) == file_digests([path]) == [sha256(b"content")]
    assert read == ["a", "a"]


def test_a_missing_file_is_the_callers_to_tell(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_digests([tmp_path / "no file"])
