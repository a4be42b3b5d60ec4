"""Pairs to a Stream: the batch. A trie of token sequences, and a flat list of what is scored in it.

For one pair with prompt `a b c`, chosen answer `X Y .` and rejected answer `Z .` (`.` ends a turn):

    index              0  1  2  3  4  5
    input_ids          a  b  c  X  Y  Z        prompt once | chosen[:-1] | rejected[:-1]
    position_ids       0  1  2  3  4  3        rejected restarts after the prompt

    predictors         2  3  4  2  5           the state at this index ...
    targets            X  Y  .  Z  .           ... predicts this token
    sequence_ids       0  0  0  1  1           ... of this answer: chosen_0, rejected_0, ...

The shift by one between input and target happens here and nowhere else. The last state of the
prompt is indexed twice: it predicts the first token of both answers. The last token of an answer is
a target and never an input. Prompt tokens are never targets, and there is no padding.

The prompt is no special case. A sequence, prompt and answer, adds to the stream only what no
earlier one begins with: its *segment*, whose *path* is the opening that is there already. So
answers share their prompt, and an opening of their own; pairs share a system prompt:

    system prompt, question, chosen_0          segment 0
                        `--- rejected_0        segment 1, path: 0
        `----------- question, chosen_1        segment 2, path: 0
                              `--- rejected_1  segment 3, path: 0 (up to the question), 2

Each sequence indexes the states on its path as well as its own, so what is scored, and how often,
does not depend on what is shared. Causality makes this exact: a state depends only on the tokens
before it, which are the same.

Computing a pair's prompt once is the idea of Wang and Hegde 2024 (arXiv:2410.20305). What is
different here: the batch has no padding, sequences share any opening, within a pair and across
pairs, and every shared state is scored for each of them.
"""

import hashlib
from array import array
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dpo.data.openings import LEAST_SHARED, common_prefix


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids. `*_scored` marks which answer tokens count (None: all).

    `numbers`: what else is known of it, by name (`dpo.data.formats.NUMBERS`).
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    chosen_scored: Sequence[bool] | None = None
    rejected_scored: Sequence[bool] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def num_stream_tokens(self) -> int:
        """How many tokens this pair adds to a stream: what its forward costs."""
        shared = self.num_shared_answer_tokens
        answers = len(self.chosen_ids) + len(self.rejected_ids)
        return len(self.prompt_ids) + answers - shared - 2

    @property
    def num_shared_answer_tokens(self) -> int:
        """Length of the answers' common opening; an answer's last token, no input, is not in it."""
        longest = min(len(self.chosen_ids), len(self.rejected_ids)) - 1
        return common_prefix(self.chosen_ids[:longest], self.rejected_ids[:longest])

    @property
    def num_scored_tokens(self) -> int:
        """How many targets this pair adds to a stream."""
        answers = (self.chosen_ids, self.chosen_scored), (self.rejected_ids, self.rejected_scored)
        return sum(len(ids) if scored is None else sum(scored) for ids, scored in answers)

    @property
    def reversed(self) -> "TokenizedPair":
        """The pair that prefers the other answer."""
        return TokenizedPair(
            self.prompt_ids,
            self.rejected_ids,
            self.chosen_ids,
            self.rejected_scored,
            self.chosen_scored,
        )

    @property
    def digest(self) -> bytes:
        """16 bytes that tell pairs apart: tokens, where each part begins, which are scored."""
        whole = hashlib.blake2b(digest_size=16)
        for ids in (self.prompt_ids, self.chosen_ids, self.rejected_ids):
            whole.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
        for scored in (self.chosen_scored, self.rejected_scored):
            whole.update(b"all" if scored is None else bytes(scored))
        return whole.digest()


@dataclass(frozen=True)
class Segment:
    """What one sequence adds to the stream, as plain integers; it may be nothing.

    Its tokens attend to all of its path and, causally, to themselves.

    Attributes:
        start: where they begin.
        length: how many there are.
        path: what comes before them, from the beginning of the sequence: earlier segments, and how
            many of their first tokens.
    """

    start: int
    length: int
    path: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        """Index after the last token."""
        return self.start + self.length

    @property
    def depth(self) -> int:
        """Tokens on its path: the position of its first one."""
        return sum(length for _, length in self.path)


@dataclass(frozen=True)
class Stream:
    """A micro-batch. Axes: `tokens` (inputs), `scored` (targets of all answers, in order).

    `segments` says where each sequence lies, chosen_0, rejected_0, chosen_1, ...; they and the
    `pairs` stay on the host.
    """

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    predictors: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    sequence_ids: Int[Tensor, " scored"]
    segments: tuple[Segment, ...]
    pairs: tuple[TokenizedPair, ...]

    @property
    def num_pairs(self) -> int:
        """Pairs in the stream; twice as many sequences."""
        return len(self.pairs)

    def to(self, device: torch.device | str) -> "Stream":
        """The same stream on another device; the copy does not wait for the device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        there = packed_to_device([*tensors.values()], device)
        return replace(self, **dict(zip(tensors, there, strict=True)))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies without making the host wait, which takes page-locked memory on its side."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def packed_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> tuple[Tensor, ...]:
    """Copies several one-dimensional tensors of one type at once, and returns their parts."""
    return torch.split(to_device(torch.cat([*tensors]), device), [*map(len, tensors)])


def build_stream(
    pairs: Sequence[TokenizedPair | tuple[Sequence[int], Sequence[int], Sequence[int]]],
) -> Stream:
    """Lays the sequences of pairs (prompt_ids, chosen_ids, rejected_ids) into one trie.

    An empty list is legal.

    Raises:
        ValueError: a prompt or an answer without tokens; nothing would predict, or be predicted.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    sequence_ids: list[int] = []
    openings = _Openings()
    items = [pair if isinstance(pair, TokenizedPair) else TokenizedPair(*pair) for pair in pairs]
    for number, pair in enumerate(items):
        prompt, chosen, rejected = map(list, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if not (prompt and chosen and rejected):
            raise ValueError(
                f"pair {number}: got {len(prompt)} prompt, {len(chosen)} chosen and "
                f"{len(rejected)} rejected tokens, wanted at least one of each"
            )
        for sequence, answer, scored in (
            (2 * number, chosen, pair.chosen_scored),
            (2 * number + 1, rejected, pair.rejected_scored),
        ):
            ids = prompt + answer[:-1]
            states = openings.add(ids, mate=2 * number if sequence % 2 else None)
            depth = openings.segments[-1].depth
            input_ids += ids[depth:]
            position_ids += range(depth, len(ids))
            marks = [True] * len(answer) if scored is None else scored
            before = states[len(prompt) - 1 :]  # the states before each token of the answer
            for state, token, is_scored in zip(before, answer, marks, strict=True):
                if is_scored:
                    predictors.append(state)
                    targets.append(token)
                    sequence_ids.append(sequence)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long)

    return Stream(
        tensor(input_ids),
        tensor(position_ids),
        tensor(predictors),
        tensor(targets),
        tensor(sequence_ids),
        tuple(openings.segments),
        tuple(items),
    )


class _Openings:
    """The sequences of a stream, and where in it their tokens are.

    Attributes:
        segments: one a sequence.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._ids: list[list[int]] = []
        self._states: list[list[int]] = []
        self._sorted: list[tuple[list[int], int]] = []

    def add(self, ids: list[int], *, mate: int | None) -> list[int]:
        """Adds a sequence; returns where its tokens are, shared ones included.

        An opening of fewer than LEAST_SHARED tokens is shared only with its `mate`.
        """
        place = bisect(self._sorted, (ids, 0))
        # Of sorted sequences, no other shares a longer opening than the two neighbours.
        neighbours = self._sorted[max(0, place - 1) : place + 1]
        shared, other = max(
            ((common_prefix(known, ids), number) for known, number in neighbours), default=(0, -1)
        )
        if shared < LEAST_SHARED:
            shared, other = (0, -1) if mate is None else (common_prefix(self._ids[mate], ids), mate)
        path = self._path(other, shared) if shared else ()
        start = self.segments[-1].end if self.segments else 0
        own = range(start, start + len(ids) - shared)
        states = [*(self._states[other][:shared] if shared else ()), *own]
        self._sorted.insert(place, (ids, len(self.segments)))
        self._ids.append(ids)
        self._states.append(states)
        self.segments.append(Segment(start, len(own), path))
        return states

    def _path(self, number: int, length: int) -> tuple[tuple[int, int], ...]:
        """The segments that hold the first tokens of a sequence."""
        segment, path = self.segments[number], list[tuple[int, int]]()
        for place, its_length in (*segment.path, (number, segment.length)):
            if taken := min(its_length, length):
                path.append((place, taken))
                length -= taken
        return tuple(path)
