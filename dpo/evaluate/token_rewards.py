"""Where in an answer the reward comes from: beta x (log pi - log pi_ref), token by token.

DPO's implicit reward of an answer is a sum over its tokens (Rafailov et al. 2023, arXiv:2305.18290,
eq. 5, up to a constant of the prompt), so it can be read token by token (Rafailov et al. 2024,
arXiv:2404.12358). One number per answer hides whether the policy learned the fact or the style.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo.data.loader import Pairs
from dpo.data.order import spread
from dpo.data.stream import TokenizedPair, build_stream
from dpo.losses import PairLogps, implicit_rewards
from dpo.model.reference import TokenLogps

EVENLY, LOWEST = 6, 3  # pairs to show: evenly over all, and those with the lowest margin


def pairs_to_show(logps: PairLogps, *, beta: float) -> list[tuple[int, str]]:
    """(index, why) of the pairs whose tokens are worth a look."""
    chosen, rejected = implicit_rewards(logps, beta=beta)
    lowest = (chosen - rejected).argsort()[:LOWEST].tolist()
    evenly = [i for i in spread(len(chosen), EVENLY).tolist() if i not in lowest]
    reasons = [(evenly, "spread over the held-out pairs"), (lowest, "lowest margin")]
    return [(index, why) for indices, why in reasons for index in indices]


def rewards_to_show(
    pairs: Pairs,
    logps: PairLogps,
    scorer: nn.Module,
    reference: TokenLogps,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beta: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Some of the pairs, chosen by their `logps`, token by token: what token_rewards.json holds."""
    context = (scorer, reference, tokenizer)
    return [
        {"row": pairs.row_name(i), "why": why}
        | token_rewards(pairs[i], *context, beta=beta, device=device)
        for i, why in pairs_to_show(logps, beta=beta)
    ]


def token_rewards(
    pair: TokenizedPair,
    scorer: nn.Module,
    reference: TokenLogps,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beta: float,
    device: torch.device,
) -> dict[str, Any]:
    """Text pieces of both answers with the reward of each, beta x nats; None if it is not scored.

    Returns:
        `{"prompt": text, "chosen": {"tokens": [...], "rewards": [...]}, "rejected": {...}}`.
    """
    stream = build_stream([pair]).to(device)
    with torch.no_grad():
        rewards = (beta * (scorer(stream) - reference(stream))).cpu()
    shown: dict[str, Any] = {"prompt": tokenizer.decode(list(pair.prompt_ids))}
    answers = (
        ("chosen", pair.chosen_ids, pair.chosen_scored),
        ("rejected", pair.rejected_ids, pair.rejected_scored),
    )
    for number, (name, ids, scored) in enumerate(answers):
        own = iter(rewards[stream.sequence_ids.cpu() == number].tolist())
        marks = [True] * len(ids) if scored is None else scored
        shown[name] = {
            "tokens": text_pieces(tokenizer, ids),
            "rewards": [next(own) if is_scored else None for is_scored in marks],
        }
    return shown


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], context: int = 8
) -> list[str]:
    """What each token adds to the text: joined, they are the text.

    A token decoded alone would lose its leading space (SentencePiece), or half of a character that
    two tokens share (bytes); such a character goes to the token that completes it.
    """

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]))).rstrip("\N{REPLACEMENT CHARACTER}")

    pieces = []
    for end in range(1, len(ids) + 1):
        start = max(0, end - 1 - context)
        pieces.append(decode(start, end)[len(decode(start, end - 1)) :])
    return pieces
