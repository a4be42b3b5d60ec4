"""Pairs to a Stream: the batch. One line of tokens, and a flat list of what is scored in it.

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

Where both answers begin alike, the common opening is computed once too (it joins the prompt in the
*shared* part) and its states are indexed twice; it is still scored for both answers. Causality
makes this exact: a state depends only on what stands before it, which is the same in both.

Computing a pair's prompt once is the idea of Wang and Hegde 2024 (arXiv:2410.20305). What is
different here: the batch has no padding, answers share their opening too, and every shared state
is scored for both answers.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor


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
        pairs = zip(self.chosen_ids[:longest], self.rejected_ids[:longest], strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), longest)

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
    """Where one pair lies in the stream, as plain integers: `[shared | chosen | rejected]`.

    `shared` counts the prompt and the common opening. Each answer attends to the shared part and,
    causally, to itself.
    """

    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        """Index after the pair's last token."""
        return self.start + self.shared + self.chosen + self.rejected


@dataclass(frozen=True)
class Stream:
    """A micro-batch. Axes: `tokens` (inputs), `scored` (targets of all answers, in order).

    `segments` says where each of `pairs` lies; both stay on the host.
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
        return len(self.segments)

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
    """Lays pairs (prompt_ids, chosen_ids, rejected_ids) end to end; an empty list is legal.

    Raises:
        ValueError: a prompt or an answer without tokens; nothing would predict, or be predicted.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    sequence_ids: list[int] = []
    segments: list[Segment] = []
    items = [pair if isinstance(pair, TokenizedPair) else TokenizedPair(*pair) for pair in pairs]
    for number, pair in enumerate(items):
        prompt, chosen, rejected = map(list, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if not (prompt and chosen and rejected):
            raise ValueError(
                f"pair {number}: got {len(prompt)} prompt, {len(chosen)} chosen and "
                f"{len(rejected)} rejected tokens, wanted at least one of each"
            )
        common = pair.num_shared_answer_tokens
        segment = Segment(
            start=len(input_ids),
            shared=len(prompt) + common,
            chosen=len(chosen) - 1 - common,
            rejected=len(rejected) - 1 - common,
        )
        input_ids += prompt + chosen[:-1] + rejected[common:-1]
        position_ids += range(segment.shared + segment.chosen)
        position_ids += range(segment.shared, segment.shared + segment.rejected)
        segments.append(segment)

        last_prompt = segment.start + len(prompt) - 1
        own_rejected = segment.start + segment.shared + segment.chosen
        for sequence, answer, scored, states in (
            # The states before each token of an answer. The chosen ones are contiguous.
            (2 * number, chosen, pair.chosen_scored, range(last_prompt, own_rejected)),
            (
                2 * number + 1,
                rejected,
                pair.rejected_scored,
                [*range(last_prompt, last_prompt + common + 1), *range(own_rejected, segment.end)],
            ),
        ):
            marks = [True] * len(answer) if scored is None else scored
            for state, token, is_scored in zip(states, answer, marks, strict=True):
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
        tuple(segments),
        tuple(items),
    )
