"""Rows and configurations, mutated at random: each is read, dropped with a reason, or refused.

`FUZZ` says how many of each; `make fuzz N=100000` prints what came of them.
"""

import copy
import json
import os
import random
import re

import pytest
import yaml

from dpo.cli import QUICKSTART, parse
from dpo.data.audit import Audit
from dpo.data.chat import ChatTokenizer
from dpo.data.formats import FORMATS, recognise
from dpo.data.loader import list_sources
from dpo.data.tokens import read_row
from dpo.errors import UserError
from dpo.model.named import load_tokenizer
from tests.data.rows import ROOM

MUTATIONS = int(os.environ.get("FUZZ", "2000"))
USER, ASSISTANT = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"day": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ROWS = [
    {"system": "S", "question": "Q?", "chosen": "A.", "rejected": "B."},
    {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
    {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "B."}]},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "B."}]},
    {
        "conversations": [{"from": "human", "value": "Q?"}],
        "chosen": {"from": "gpt", "value": "A."},
        "rejected": {"from": "gpt", "value": "B."},
    },
    {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}],
        "rejected": [{**ASSISTANT, "reasoning_content": "hm", "content": "B."}],
        "tools": [TOOL],
    },
    {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A."}]}],
        "rejected": [ASSISTANT | {"content": None, "tool_calls": [CALL["function"]]}],
    },
]
ODD = (None, "", " ", 0, -1, 1.5, True, [], {}, [[]], [None], {"": None}, "\0", "\ud800", "\u202e")
ODD += (
    "<|im_end|>",
    "x" * 5000,
    [{"role": "x"}],
    {"role": "user"},
    float("nan"),
    10**30,
    [USER] * 3,
)


def places(value, path=()):
    """The path of every node of a nested value."""
    yield path
    items = enumerate(value) if isinstance(value, list) else ()
    for key, inside in value.items() if isinstance(value, dict) else items:
        yield from places(inside, (*path, key))


def mutated(value, chance):
    """A copy in which one node is another, gone, or there twice."""
    value = copy.deepcopy(value)
    *parents, key = chance.choice([path for path in places(value) if path])
    node = value
    for step in parents:
        node = node[step]
    how = chance.randrange(4)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif how == 2 and isinstance(node, dict):
        node[chance.choice(("extra", "content", "role", "images", "tools"))] = node.pop(key)
    else:
        node[key] = chance.choice(ODD)
    return value


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(parse([]).model)


def test_a_mutated_row_is_kept_dropped_or_refused_by_its_place(tokenizer, record_property):
    chance = random.Random(0)
    audit, refused, tracebacks, nameless = Audit(), 0, [], []
    chat = ChatTokenizer(tokenizer, tokenizer.chat_template, ROOM, audit)
    for number in range(1, MUTATIONS + 1):
        value = chance.choice(ROWS)
        format = recognise([value], "row")
        if chance.random() < 0.1:
            format = chance.choice([name for name in FORMATS if name != "auto"])
        for _ in range(chance.randint(1, 3)):
            value = mutated(value, chance) if value else value
        try:
            preference = read_row(number, value, format, f"rows, line {number}", audit)
            for _ in chat.tokenize([(number, preference)] if preference else []):
                audit.pairs_kept += 1
        except UserError as error:
            refused += 1
            audit.rows_read -= 1
            if not re.search(rf"line {number}\b|data\.", str(error)):
                nameless.append(str(error)[:200])
        except Exception as error:
            tracebacks.append((format, json.dumps(value, default=str)[:300], repr(error)[:200]))
    outcome = f"{audit.pairs_kept} kept, {audit.num_dropped} dropped, {refused} refused"
    record_property("figures", f"{MUTATIONS} rows: {outcome}, {len(tracebacks)} tracebacks")
    assert tracebacks == [], tracebacks[:5]
    assert audit.rows_read == audit.pairs_kept + audit.num_dropped
    assert nameless == [], nameless[:5]


def test_a_mutated_configuration_is_read_or_refused_with_a_reason(tmp_path, record_property):
    chance = random.Random(1)
    whole = yaml.safe_load(QUICKSTART.read_text())
    file, read, refused, tracebacks, nameless = tmp_path / "c.yaml", 0, 0, [], []
    for _ in range(MUTATIONS // 10):
        text = yaml.safe_dump(mutated(whole, chance), allow_unicode=True)
        if chance.random() < 0.5:
            content = bytearray(text.encode("utf-8", "surrogatepass"))
            for _ in range(3):
                content[chance.randrange(len(content))] = chance.randrange(256)
            file.write_bytes(content)
        else:
            file.write_text(text, errors="surrogatepass")
        try:
            list_sources(parse(["--config", str(file)]).data)
            read += 1
        except UserError as error:
            refused += 1
            nameless += [str(error)] * (len(str(error)) < 20)
        except Exception as error:
            tracebacks.append((file.read_bytes()[-300:], repr(error)[:200]))
    outcome = f"{read} read, {refused} refused, {len(tracebacks)} tracebacks"
    record_property("figures", f"{MUTATIONS // 10} configurations: {outcome}")
    assert (tracebacks, nameless) == ([], []), (tracebacks + nameless)[:3]
