"""References have equal digests when their log-probs must be equal, and only then."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dpo.config import ModelConfig
from dpo.data import files
from dpo.model import fingerprint
from dpo.model.fingerprint import reference_digest, weights_digest
from tests.models import tiny, with_lora

ON = {"layout": "shared", "device_type": "cpu"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def digest(folder, **settings):
    on = {name: settings.pop(name, value) for name, value in ON.items()}
    return reference_digest(ModelConfig(name_or_path=str(folder), **settings), **on)


def edit(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, file, {"format": "pt"})


def test_a_copy_of_the_model_elsewhere_has_the_same_digest(saved, folder):
    assert digest(saved) == digest(folder)


def test_an_edited_weight_makes_another_reference(folder):
    """CORRECTNESS 6: a name is not a model."""
    before = digest(folder), weights_digest(ModelConfig(name_or_path=str(folder)))
    edit(folder)
    after = digest(folder), weights_digest(ModelConfig(name_or_path=str(folder)))
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"quantization": "nf4"},
        {"layout": "padded"},
        {"device_type": "cuda"},
    ],
    ids=str,
)
def test_how_it_is_stored_and_computed_makes_another_reference(folder, change):
    assert digest(folder, quantization="none") != digest(
        folder, **{"quantization": "none"} | change
    )


def test_a_changed_setting_of_the_model_makes_another_reference(folder):
    before = digest(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert digest(folder) != before


def test_a_new_library_makes_another_reference_but_the_same_weights(folder, monkeypatch):
    weights, whole = weights_digest(ModelConfig(name_or_path=str(folder))), digest(folder)
    monkeypatch.setattr(fingerprint, "version", lambda name: "0")
    assert weights_digest(ModelConfig(name_or_path=str(folder))) == weights
    assert digest(folder) != whole


def test_what_says_nothing_of_the_numbers_does_not_count(folder):
    """A tokenizer does not: the tokens themselves are in the pair's digest."""
    before = digest(folder)
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer.json").write_text("{}")
    assert digest(folder) == before


def test_an_adapter_that_training_starts_from_is_part_of_it_and_so_is_its_base(folder, tmp_path):
    adapter = tmp_path / "adapter"
    model = with_lora(tiny())
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(adapter)
    before = digest(adapter)
    edit(folder)
    of_other_base = digest(adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert len({before, of_other_base, digest(adapter), digest(folder)}) == 4


def test_files_in_the_cache_of_the_hub_are_known_by_their_names_and_not_read(
    saved, tmp_path, monkeypatch
):
    """The layout of huggingface_hub: snapshots/COMMIT/FILE links to blobs/DIGEST."""
    commit, repo = "c" * 40, tmp_path / "hub" / "models--a--model"
    snapshot = repo / "snapshots" / commit
    for part in (snapshot, repo / "blobs", repo / "refs"):
        part.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for name, blob in (("model.safetensors", "d" * 64), ("config.json", "e" * 40)):
        shutil.copy(saved / name, repo / "blobs" / blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(files, "sha256", None)  # nothing is read
    before = digest("a/model")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / ("f" * 64))
    (repo / "blobs" / ("f" * 64)).write_bytes(b"")
    assert digest("a/model") != before
