"""The token gate: what a pair costs, over all real lengths."""

import json
from pathlib import Path

from dpo.data.stream import TokenizedPair, build_stream

LENGTHS = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "orca_lengths.json").read_text(encoding="utf-8")
)["tokens"]
FLOOR = sum(prompt + chosen + rejected - 2 for prompt, chosen, rejected in LENGTHS)


def pairs(common):
    """Answers whose first `common` tokens are the same; fewer where an answer is shorter."""
    for number, (prompt, chosen, rejected) in enumerate(LENGTHS):  # prompts differ
        same = [3] * min(common, chosen - 1, rejected - 1)
        yield TokenizedPair(
            [10 + number] * prompt,
            same + [1] * (chosen - len(same)),
            same + [2] * (rejected - len(same)),
        )


def test_there_are_284_real_pairs():
    assert len(LENGTHS) == 284


def test_a_pair_computes_its_tokens_once_and_neither_last_one():
    """P + C + R - 2 over all 284 lengths: no padding, and no prompt twice."""
    stream = build_stream(list(pairs(common=0)))
    assert len(stream.input_ids) == FLOOR
    assert len(stream.targets) == sum(chosen + rejected for _, chosen, rejected in LENGTHS)


def test_answers_that_open_alike_compute_fewer_tokens_and_score_as_many():
    """Ten common tokens, less where an answer is shorter, are computed once."""
    stream = build_stream(list(pairs(common=10)))
    saved = sum(min(10, chosen - 1, rejected - 1) for _, chosen, rejected in LENGTHS)
    assert saved > 2000
    assert len(stream.input_ids) == FLOOR - saved
    assert len(stream.targets) == sum(chosen + rejected for _, chosen, rejected in LENGTHS)


def test_padded_rows_would_not_pass():
    """What the gate is for: rows in batches of 4 pairs, as long as the longest of them."""
    padded = sum(
        2 * len(batch) * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in batch)
        for batch in (LENGTHS[i : i + 4] for i in range(0, len(LENGTHS), 4))
    )
    assert padded > 2 * FLOOR
