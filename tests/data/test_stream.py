from dataclasses import fields
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.stream import Segment, TokenizedPair, build_stream

TENSORS = ("input_ids", "position_ids", "predictors", "targets", "sequence_ids")

# A vocabulary of three makes common openings, prefixes and equal answers frequent. An answer is a
# list of (token, counts); a pair of several turns has tokens that do not count. TokenizedPair is
# made in the test: beartype draws random numbers, which hypothesis forbids in a strategy.
tokens = st.integers(0, 2)
prompts = st.lists(tokens, min_size=1, max_size=6)
answers = st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=6)
drawn_pair = st.tuples(prompts, answers, answers, st.booleans())
drawn_pairs = st.lists(drawn_pair, max_size=4)
law = settings(deadline=None)  # a busy machine is no failure


def tokenized(drawn):
    """The pair, with marks or without."""
    prompt, chosen, rejected, has_marks = drawn
    (chosen_ids, chosen_scored), (rejected_ids, rejected_scored) = (
        zip(*answer, strict=True) for answer in (chosen, rejected)
    )
    if has_marks:
        return TokenizedPair(prompt, chosen_ids, rejected_ids, chosen_scored, rejected_scored)
    return TokenizedPair(prompt, chosen_ids, rejected_ids)


def sequences(pairs):
    """(prompt, answer, its marks) in the order of `sequence_ids`."""
    for pair in pairs:
        for answer, marks in (
            (pair.chosen_ids, pair.chosen_scored),
            (pair.rejected_ids, pair.rejected_scored),
        ):
            yield pair.prompt_ids, answer, marks or [True] * len(answer)


def visible(segments, index):
    """The indices that a state attends to, oldest first: the path of its segment, then its own."""
    own = next(segment for segment in segments if segment.start <= index < segment.end)
    path = [(segments[number].start, length) for number, length in own.path]
    return [
        *(i for start, length in path for i in range(start, start + length)),
        *range(own.start, index + 1),
    ]


def lists(stream):
    return {name: getattr(stream, name).tolist() for name in TENSORS}


# ------------------------------------------------------------------------------ worked examples

A, B, C, X, Y, Z, DOT = range(10, 17)


def test_the_worked_example_of_the_docstring():
    """Prompt `a b c`, chosen `X Y .`, rejected `Z .`: 3 + 3 + 2 - 2 = 6 tokens, 5 scored."""
    stream = build_stream([([A, B, C], [X, Y, DOT], [Z, DOT])])
    assert lists(stream) == {
        "input_ids": [A, B, C, X, Y, Z],
        "position_ids": [0, 1, 2, 3, 4, 3],
        "predictors": [2, 3, 4, 2, 5],
        "targets": [X, Y, DOT, Z, DOT],
        "sequence_ids": [0, 0, 0, 1, 1],
    }
    assert stream.segments == (Segment(0, 5), Segment(5, 1, ((0, 3),)))
    assert stream.num_pairs == 1
    assert {getattr(stream, name).dtype for name in TENSORS} == {torch.int64}


def test_a_second_pair_starts_after_the_first():
    """The pair of the docstring twice: indices move by its 6 tokens, sequences by 2."""
    pair = ([A, B, C], [X, Y, DOT], [Z, DOT])
    stream = build_stream([pair, pair])
    assert lists(stream) == {
        "input_ids": [A, B, C, X, Y, Z] * 2,
        "position_ids": [0, 1, 2, 3, 4, 3] * 2,
        "predictors": [2, 3, 4, 2, 5, 8, 9, 10, 8, 11],
        "targets": [X, Y, DOT, Z, DOT] * 2,
        "sequence_ids": [0, 0, 0, 1, 1, 2, 2, 2, 3, 3],
    }
    assert [segment.start for segment in stream.segments] == [0, 5, 6, 11]


def test_a_common_opening_is_computed_once_and_scored_twice():
    """Prompt `a`, chosen `X Y Z .`, rejected `X Y .`: `X Y` joins the shared part.

    Tokens 1 + 4 + 3 - 2 - 2 (common) = 4: a X Y Z. Both answers read the states of a, X and Y.
    """
    stream = build_stream([([A], [X, Y, Z, DOT], [X, Y, DOT])])
    assert lists(stream) == {
        "input_ids": [A, X, Y, Z],
        "position_ids": [0, 1, 2, 3],
        "predictors": [0, 1, 2, 3, 0, 1, 2],
        "targets": [X, Y, Z, DOT, X, Y, DOT],
        "sequence_ids": [0, 0, 0, 0, 1, 1, 1],
    }
    assert stream.segments == (Segment(0, 4), Segment(4, 0, ((0, 3),)))


def test_a_chosen_answer_that_opens_the_rejected_one():
    """Chosen `X Y`, rejected `X Y Z`: `Y` ends the chosen answer, so only `X` is shared.

    Tokens 1 + 2 + 3 - 2 - 1 = 3: a X | Y, and the Y is an input of the rejected answer alone.
    """
    stream = build_stream([([A], [X, Y], [X, Y, Z])])
    assert lists(stream) == {
        "input_ids": [A, X, Y],
        "position_ids": [0, 1, 2],
        "predictors": [0, 1, 0, 1, 2],
        "targets": [X, Y, X, Y, Z],
        "sequence_ids": [0, 0, 1, 1, 1],
    }
    assert stream.segments == (Segment(0, 2), Segment(2, 1, ((0, 2),)))


SYSTEM = list(range(30, 50))  # 20 tokens that pairs share


def test_pairs_share_what_their_prompts_open_with():
    """Two questions after one system prompt; the second pair's answers share an opening, too.

    The 20 tokens are computed once, and every state before an answer's token is indexed by it.
    """
    stream = build_stream(
        [([*SYSTEM, A], [X, Y, DOT], [Z, DOT]), ([*SYSTEM, B, C], [X, Y, DOT], [X, Z, DOT])]
    )
    assert stream.input_ids.tolist() == [*SYSTEM, A, X, Y, Z, B, C, X, Y, Z]
    assert stream.position_ids.tolist() == [*range(23), 21, 20, 21, 22, 23, 23]
    assert stream.segments == (
        Segment(0, 23),
        Segment(23, 1, ((0, 21),)),
        Segment(24, 4, ((0, 20),)),
        Segment(28, 1, ((0, 20), (2, 3))),
    )
    assert stream.predictors.tolist() == [20, 21, 22, 20, 23, 25, 26, 27, 25, 26, 28]
    assert stream.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("common", "computed"), [(15, 2 * 19), (16, 2 * 19 - 16)])
def test_a_short_opening_of_two_pairs_is_not_shared(common, computed):
    """It would be worth less than the mask of an attention that is not plainly causal."""
    opening = SYSTEM[:common]
    stream = build_stream([([*opening, *[n] * (17 - common)], [X, DOT], [Y, DOT]) for n in (A, B)])
    assert len(stream.input_ids) == computed


def test_the_same_pair_twice_is_computed_once_and_scored_twice():
    pair = ([*SYSTEM, A], [X, Y, DOT], [Z, DOT])
    once, twice = build_stream([pair]), build_stream([pair, pair])
    assert torch.equal(once.input_ids, twice.input_ids)
    assert torch.equal(twice.predictors, torch.cat([once.predictors] * 2))
    assert torch.equal(twice.targets, torch.cat([once.targets] * 2))
    assert twice.num_pairs == 2


def test_identical_answers_share_all_inputs():
    """`X Y .` twice: 1 + 3 + 3 - 2 - 2 = 3 tokens, every state indexed twice."""
    stream = build_stream([([A], [X, Y, DOT], [X, Y, DOT])])
    assert stream.input_ids.tolist() == [A, X, Y]
    assert stream.predictors.tolist() == [0, 1, 2, 0, 1, 2]
    assert stream.targets.tolist() == [X, Y, DOT, X, Y, DOT]


def test_answers_of_one_token_add_no_input():
    """1 + 1 + 1 - 2 = 1 token: the prompt's, which predicts both."""
    stream = build_stream([([A], [X], [Y])])
    assert lists(stream) == {
        "input_ids": [A],
        "position_ids": [0],
        "predictors": [0, 0],
        "targets": [X, Y],
        "sequence_ids": [0, 1],
    }


def test_tokens_that_do_not_count_are_inputs_and_no_targets():
    """Chosen `X Y Z .` with `Y Z` a user's turn: X and . are scored, and all but . are inputs."""
    pair = TokenizedPair([A], [X, Y, Z, DOT], [B, DOT], chosen_scored=[True, False, False, True])
    stream = build_stream([pair])
    assert stream.input_ids.tolist() == [A, X, Y, Z, B]
    assert stream.predictors.tolist() == [0, 3, 0, 4]
    assert stream.targets.tolist() == [X, DOT, B, DOT]
    assert stream.sequence_ids.tolist() == [0, 0, 1, 1]


def test_an_empty_stream_is_legal():
    stream = build_stream([])
    assert lists(stream) == {name: [] for name in TENSORS}
    assert {getattr(stream, name).dtype for name in TENSORS} == {torch.int64}
    assert stream.num_pairs == 0


@pytest.mark.parametrize(
    ("pair", "counts"),
    [
        (([], [X], [Y]), "0 prompt, 1 chosen and 1 rejected"),
        (([A], [], [Y]), "1 prompt, 0 chosen and 1 rejected"),
        (([A], [X, Y], []), "1 prompt, 2 chosen and 0 rejected"),
    ],
)
def test_an_empty_prompt_or_answer_is_refused_with_its_number(pair, counts):
    with pytest.raises(ValueError, match=f"pair 1: got {counts} tokens, wanted at least one"):
        build_stream([([A], [X], [Y]), pair])


def test_marks_of_another_length_than_the_answer_are_refused():
    pair = TokenizedPair([A], [X, Y], [Z], chosen_scored=[True])
    with pytest.raises(ValueError, match="zip"):
        build_stream([pair])


def test_to_moves_every_tensor_and_keeps_the_segments():
    stream = build_stream([([A, B, C], [X, Y, DOT], [Z, DOT])])
    moved = stream.to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert moved.segments == stream.segments
    assert moved.pairs == stream.pairs
    assert lists(stream.to("cpu")) == lists(stream)
    assert {field.name for field in fields(stream)} == {*TENSORS, "segments", "pairs"}


def test_equal_pairs_have_equal_digests_and_no_two_others():
    """Where a part begins counts, and what is scored; what the ids are held in does not."""
    pair = TokenizedPair([A, B], [X, Y], [Z])
    assert TokenizedPair((A, B), (X, Y), (Z,)).digest == pair.digest
    others = [
        TokenizedPair([A], [B, X, Y], [Z]),
        TokenizedPair([A, B], [X], [Y, Z]),
        TokenizedPair([A, B], [Z], [X, Y]),
        TokenizedPair([A, B], [X, Y], [DOT]),
        TokenizedPair([A, B], [X, Y], [Z], chosen_scored=[False, True]),
        TokenizedPair([A, B], [X, Y], [Z], rejected_scored=[True]),
    ]
    assert len({pair.digest, *(other.digest for other in others)}) == len(others) + 1


def test_the_scored_tokens_of_a_pair_are_counted():
    assert TokenizedPair([A, B], [X, Y], [Z]).num_scored_tokens == 3
    assert TokenizedPair([A], [X, Y], [Z], chosen_scored=[False, True]).num_scored_tokens == 2


# ------------------------------------------------------------------------------------------ laws


@law
@given(drawn_pairs)
def test_the_targets_of_each_sequence_are_its_scored_answer_tokens(drawn):
    pairs = [*map(tokenized, drawn)]
    stream = build_stream(pairs)
    found = [[] for _ in range(2 * len(pairs))]
    for target, sequence in zip(stream.targets.tolist(), stream.sequence_ids.tolist(), strict=True):
        found[sequence].append(target)
    wanted = [
        [token for token, mark in zip(answer, marks, strict=True) if mark]
        for _, answer, marks in sequences(pairs)
    ]
    assert found == wanted
    assert stream.sequence_ids.tolist() == sorted(stream.sequence_ids.tolist())


@law
@given(drawn_pairs)
def test_a_predictor_stands_right_before_its_target_and_sees_all_that_came_before(drawn):
    """What it attends to, oldest first, is the prompt and the answer up to the target: no more.

    So its own token is the one before the target, its position is one less than the number of
    tokens before the target, and no answer sees the other's own part.
    """
    pairs = [*map(tokenized, drawn)]
    stream = build_stream(pairs)
    befores = [
        [*prompt, *answer[:i]]
        for prompt, answer, marks in sequences(pairs)
        for i, mark in enumerate(marks)
        if mark
    ]
    for before, index in zip(befores, stream.predictors.tolist(), strict=True):
        seen = visible(stream.segments, index)
        assert stream.input_ids[seen].tolist() == before
        assert stream.position_ids[seen].tolist() == list(range(len(before)))


@law
@given(drawn_pairs)
def test_the_segments_tile_the_stream_without_gaps(drawn):
    pairs = [*map(tokenized, drawn)]
    stream = build_stream(pairs)
    ends = [0, *(segment.end for segment in stream.segments)]
    assert [segment.start for segment in stream.segments] == ends[:-1]
    assert ends[-1] == len(stream.input_ids)
    assert stream.num_pairs == len(pairs)


@law
@given(drawn_pair)
def test_a_pair_costs_prompt_plus_answers_minus_two_minus_the_common_opening(drawn):
    """P + C + R - 2, less the opening that both share (at most up to the token before an end)."""
    pair = tokenized(drawn)
    prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    wanted = len(prompt) + len(chosen) + len(rejected) - 2 - common
    assert pair.num_shared_answer_tokens == common
    assert pair.num_stream_tokens == wanted
    assert len(build_stream([pair]).input_ids) == wanted


@law
@given(drawn_pair)
def test_the_inputs_are_the_prompt_and_both_answers_without_their_last_tokens(drawn):
    """The last token of an answer is never an input, except where the other answer reads on."""
    pair = tokenized(drawn)
    stream = build_stream([pair])
    first, second = stream.segments
    ids = stream.input_ids.tolist()
    assert ids[: first.end] == [*pair.prompt_ids, *pair.chosen_ids[:-1]]
    assert [*ids[: second.depth], *ids[first.end :]] == [*pair.prompt_ids, *pair.rejected_ids[:-1]]


@law
@given(drawn_pairs)
def test_a_pair_in_a_stream_is_the_pair_alone_moved(drawn):
    """No pair changes another: the stream is the streams of one pair, end to end."""
    pairs = [*map(tokenized, drawn)]
    stream = build_stream(pairs)
    start = sequence = scored = 0
    for pair in pairs:
        alone = build_stream([pair])
        own, own_scored = slice(start, start + len(alone.input_ids)), len(alone.targets)
        span = slice(scored, scored + own_scored)
        assert torch.equal(stream.input_ids[own], alone.input_ids)
        assert torch.equal(stream.position_ids[own], alone.position_ids)
        assert torch.equal(stream.predictors[span], alone.predictors + start)
        assert torch.equal(stream.sequence_ids[span], alone.sequence_ids + sequence)
        start, sequence, scored = own.stop, sequence + 2, span.stop


@law
@given(drawn_pair)
def test_a_tuple_and_a_tokenized_pair_give_one_stream(drawn):
    pair = tokenized(drawn)
    as_tuple = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    assert lists(build_stream([as_tuple])) == lists(build_stream([TokenizedPair(*as_tuple)]))


# ------------------------------------------------------------------------------ random tries


def branching(drawn):
    """Pairs whose sequences branch from one another: (where, tokens) grows a new one."""
    prompts, pairs = [[A]], []
    for which, at, tokens, chosen, rejected in drawn:
        stem = prompts[which % len(prompts)]
        prompt = [*stem[: 1 + at % len(stem)], *tokens]
        prompts.append(prompt)
        pairs.append((prompt, [*chosen, DOT], [*rejected, DOT]))
    return pairs


few = st.lists(st.sampled_from([A, B, X, Y]), max_size=5)
drawn_tries = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 99), few, few, few), min_size=1, max_size=6
)


@law
@given(drawn_tries)
def test_tokens_computed_are_the_nodes_of_the_trie(drawn):
    """With any opening shared: as many tokens as there are different openings of the sequences."""
    pairs = branching(drawn)
    with mock.patch("dpo.data.stream.LEAST_SHARED", 1):
        stream = build_stream(pairs)
    inputs = [[*p, *answer[:-1]] for p, c, r in pairs for answer in (c, r)]
    nodes = {tuple(ids[:i]) for ids in inputs for i in range(1, len(ids) + 1)}
    assert len(stream.input_ids) == len(nodes)
    for segment, ids in zip(stream.segments, inputs, strict=True):
        assert segment.depth + segment.length == len(ids)


@law
@given(drawn_tries, st.sampled_from([1, 3, 16]))
def test_what_a_trie_scores_does_not_depend_on_what_it_shares(drawn, least):
    """Before every target stand the tokens of its own sequence, wherever they are computed."""
    pairs = branching(drawn)
    with mock.patch("dpo.data.stream.LEAST_SHARED", least):
        stream = build_stream(pairs)
    wanted = [
        (number, [*prompt, *answer[:i]], answer[i])
        for number, (prompt, answer) in enumerate((p, a) for p, c, r in pairs for a in (c, r))
        for i in range(len(answer))
    ]
    for index, target, sequence, (number, before, token) in zip(
        stream.predictors.tolist(), stream.targets.tolist(), stream.sequence_ids.tolist(), wanted,
        strict=True,
    ):  # fmt: skip
        seen = visible(stream.segments, index)
        assert (sequence, target) == (number, token)
        assert stream.input_ids[seen].tolist() == before
        assert stream.position_ids[seen].tolist() == list(range(len(before)))
