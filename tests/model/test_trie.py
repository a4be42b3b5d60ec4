"""A trie of sequences = every sequence alone with full logits, for random tries of any depth."""

import random

import pytest
import torch
from transformers import AttentionInterface

from dpo.data.stream import build_stream
from dpo.model import attention
from dpo.model.attention import NAME
from dpo.model.scorer import Scorer
from tests.models import FAMILIES, tiny, with_lora
from tests.oracle import stream_logps


def random_pairs(rng, count):
    """Pairs whose prompts and answers branch from one another at random places."""
    stems, pairs = [[1]], []

    def grown(least):
        stem = rng.choice(stems)
        kept = stem[: rng.randrange(1, len(stem) + 1)]
        return kept + [rng.randrange(3, 60) for _ in range(rng.randrange(least, 12))]

    for _ in range(count):
        prompt = grown(0)
        stems.append(prompt)
        answers = []
        for _ in range(2):
            answer = [rng.randrange(3, 60) for _ in range(rng.randrange(0, 9))]
            if answers and rng.random() < 0.5:  # an opening in common
                answer = answers[0][: rng.randrange(len(answers[0]) + 1)] + answer
            answers.append([*answer, 2])
        stems += [[*prompt, *answer] for answer in answers]
        pairs.append((prompt, *answers))
    return pairs


def gradients(model, logps):
    """Of a sum that weighs each token otherwise."""
    model.zero_grad()
    (torch.linspace(-1, 1, len(logps)) * logps).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(model, pairs, layout="shared"):
    """How far values and gradients are from those of one answer at a time; and what was shared."""
    stream = build_stream(pairs)
    logps, alone = Scorer(model, layout)(stream), stream_logps(model, pairs)
    ours, theirs = gradients(model, logps), gradients(model, alone)
    read = sum(2 * len(p) + len(c) + len(r) - 2 for p, c, r in pairs)
    depth = max(len(segment.path) for segment in stream.segments)
    return (
        float((logps - alone).detach().abs().max()),
        float((ours - theirs).abs().max() / theirs.abs().max()),
        len(stream.input_ids) / read,
        depth,
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral sliding"])
def test_random_tries_equal_one_answer_at_a_time(family, monkeypatch):
    rng, model = random.Random(5), with_lora(tiny(family)).train()
    depths = set()
    for least in (1, 4, 16):
        monkeypatch.setattr("dpo.data.stream.LEAST_SHARED", least)
        for _ in range(4):
            far, gradient, share, depth = apart(model, random_pairs(rng, rng.randrange(2, 7)))
            assert far <= 2e-5
            assert gradient <= 2e-5
            assert share < 1
            depths.add(depth)
    assert max(depths) >= 3


def test_a_sliding_window_counts_along_the_path(monkeypatch):
    """A window of 7 tokens ends in the middle of a path."""
    monkeypatch.setattr("dpo.data.stream.LEAST_SHARED", 1)
    rng, model = random.Random(5), with_lora(tiny("mistral sliding")).train()
    for _ in range(8):
        far, gradient, _, _ = apart(model, random_pairs(rng, 4))
        assert far <= 2e-5
        assert gradient <= 2e-5


@pytest.mark.parametrize("family", ["llama", "mistral sliding"])
def test_a_long_segment_is_attended_to_a_piece_at_a_time(family, monkeypatch):
    """Pieces of 3 queries: the last may be shorter, and a window may end in any of them."""
    monkeypatch.setattr("dpo.data.stream.LEAST_SHARED", 1)
    monkeypatch.setattr(attention, "_MASKED_QUERIES", 3)
    rng, model = random.Random(6), with_lora(tiny(family)).train()
    for _ in range(6):
        far, gradient, _, _ = apart(model, random_pairs(rng, 4))
        assert far <= 2e-5
        assert gradient <= 2e-5


def test_padded_rows_read_a_trie_as_well(monkeypatch):
    monkeypatch.setattr("dpo.data.stream.LEAST_SHARED", 1)
    rng, model = random.Random(5), with_lora(tiny()).train()
    for _ in range(4):
        far, gradient, _, _ = apart(model, random_pairs(rng, 4), "padded")
        assert far <= 2e-5
        assert gradient <= 2e-5


@pytest.mark.parametrize("fault", ["without its path", "a cousin's path", "one token less"])
def test_a_wrong_path_is_noticed(fault, monkeypatch):
    """The negative controls."""
    monkeypatch.setattr("dpo.data.stream.LEAST_SHARED", 1)
    right = attention.attention_along_paths

    def wrong(segments, segment):
        if not segment.path:
            return ()
        (number, length), *rest = segment.path
        if fault == "without its path":
            return ()
        if fault == "one token less":
            return ((number, length - 1), *rest)
        cousins = (i for i, s in enumerate(segments) if s.length >= length and i != number)
        return ((next(cousins, number), length), *rest)

    def faulty(module, *states, dpo_segments, **others):
        each = dpo_segments.each
        changed = attention.Segments(
            tuple(type(s)(s.start, s.length, wrong(each, s)) for s in each), dpo_segments.device
        )
        out = right(module, *states, dpo_segments=changed, **others)
        dpo_segments.num_calls += 1
        return out

    rng, model = random.Random(5), with_lora(tiny()).train()
    pairs = random_pairs(rng, 5)
    assert apart(model, pairs)[0] <= 2e-5
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, faulty)
    assert apart(model, pairs)[0] > 1e-2


def test_a_shared_state_scored_once_instead_of_twice_is_noticed(monkeypatch):
    """The negative control of indexing: the second sequence loses the targets on its path."""
    monkeypatch.setattr("dpo.data.stream.LEAST_SHARED", 1)
    pairs = [([1, 5, 9], [7, 8, 2], [7, 9, 2])]
    stream, model = build_stream(pairs), tiny()
    predictors = stream.predictors.tolist()
    assert len(predictors) == 6 > len(set(predictors))
    logps = Scorer(model)(stream)
    once = torch.tensor([predictors.index(i) for i in sorted(set(predictors))])
    assert (logps.sum() - logps[once].sum()).detach().abs() > 1e-2
