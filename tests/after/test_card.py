"""What a model card's header says, and that it is read back."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from dpo.after.card import base_licence, hub_id, write_card
from dpo.cli import parse
from dpo.config import ModelConfig


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("teknium/OpenHermes-2.5-Mistral-7B", True),
        ("gpt2", True),
        ("quickstart/model", False),
        ("/home/me/model", False),
        ("../models/mine", False),
        ("./mine", False),
        ("a/b/c", False),
        ("C:\\models\\mine", False),
    ],
)
def test_only_a_hub_id_is_one(name, is_id):
    assert hub_id(name, ModelConfig(name_or_path=name).path) == (name if is_id else None)


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/model", "me/model") == "me/model"
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert hub_id("me/model", "me/model") is None


def test_the_licence_is_the_one_of_the_bases_own_card(tmp_path):
    base = ModelConfig(name_or_path=str(tmp_path))
    assert base_licence(base) == {}
    card = "---\nlicense: other\nlicense_name: theirs\ntags: [x]\n---\n# Base\n"
    (tmp_path / "README.md").write_text(card)
    assert base_licence(base) == {"license": "other", "license_name": "theirs"}
    (tmp_path / "README.md").write_text("# Base\n")
    assert base_licence(base) == {}
    assert base_licence(ModelConfig(name_or_path="nobody/nothing")) == {}  # the tests are offline


def test_a_cards_header_is_read_back_whatever_its_values_are(tmp_path):
    header = {
        "base_model": "teknium/OpenHermes-2.5-Mistral-7B",
        "datasets": ["Intel/orca_dpo_pairs"],
        "license": "apache-2.0",
        "tags": ["dpo", "a: b"],
    }
    error = SimpleNamespace(mean=0.1, worst=0.2, per_answer=0.3)
    prompt = {"prompt": "{{ secret }} # ---\n---\nkey: value", "before": "```", "after": "b"}
    facts = {
        "name": "run",
        "model": "m",
        "config": parse([]),
        "sources": ["s"],
        "errors": {"original": error},
        "rounding": 0.4,
        "licence": "apache-2.0",
        "samples": [prompt],
        "step": 3,
    }
    write_card(tmp_path, header, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == header
    assert "    {{ secret }} # ---\n    ---\n    key: value\n" in card.content
