"""Answers written by the policy, in batches."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[int]]:
    """Token ids of one answer a prompt, the stop token included where one was reached.

    Temperature 0 is greedy. Prompts of a batch are padded on the left, under the model's own
    attention and its padding mask. The model is in eval mode meanwhile (4-bit layers excepted, see
    `model.load.keep_4bit_trainable`).
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        use_cache=True,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    answers: list[list[int]] = []
    # Longest first: a batch then pads little, and running out of memory happens at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = [list(prompts[i]) for i in order[start : start + batch_size]]
        longest = max(map(len, batch))
        padded = [[pad] * (longest - len(ids)) + ids for ids in batch]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch]
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )
        answers += [_until_stop(row, stop_ids) for row in output[:, longest:].tolist()]
    model.train(was_training)
    by_prompt = dict(zip(order, answers, strict=True))
    return [by_prompt[i] for i in range(len(prompts))]


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]
