import json

import pytest

from dpo.data import tokens
from dpo.data.chat import ChatTokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Every test starts with an empty cache."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpo_pairs"


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = (json.dumps(row, ensure_ascii=False) if row else "" for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tokenised(monkeypatch):
    """The rows that went through the tokenizer, as they go; in one process, or they go unseen."""
    rows = []
    monkeypatch.setattr(tokens, "_num_workers", lambda num_rows: 1)
    tokenize = ChatTokenizer.tokenize_prompts

    def counted(self, batch):
        rows.extend(row for row, _ in batch)
        return tokenize(self, batch)

    monkeypatch.setattr(ChatTokenizer, "tokenize_prompts", counted)
    return rows
