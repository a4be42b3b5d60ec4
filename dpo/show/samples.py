"""Answers written by the policy, in batches; and by the base beside it, from one model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpo.config import UserError
from dpo.data.chat import choose_template, stop_ids
from dpo.data.formats import Message
from dpo.model.load import Policy, load_policy, load_tokenizer, load_weights
from dpo.model.reference import adapter_off
from dpo.show.finished import read_run


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


def answer_side_by_side(
    run_folder: Path, conversations: Sequence[list[Message]], **sampling: float
) -> list[tuple[str, str]]:
    """(answer before training, answer after it) for each conversation, from one loaded model.

    `sampling`: temperature, top_p, max_new_tokens, seed as for `generate`; both answers start from
    the same seed. An adapter is switched off and on; without one, the trained weights replace the
    base's in between.

    Raises:
        UserError: the folder holds no finished run, or the model has no chat template.
    """
    config = read_run(run_folder)
    tokenizer = load_tokenizer(config.model)
    template = choose_template(tokenizer, config.data.chat_template)
    if template is None:
        raise UserError(f"{run_folder}: data.chat_template was none, so there is no chat to go on.")
    prompts = [
        tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        for conversation in conversations
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(config, device)

    def write() -> list[str]:
        answers = generate(
            policy.model,
            tokenizer,
            prompts,  # type: ignore[arg-type]
            stop_ids=stop_ids(policy.model, tokenizer, template),
            **sampling,  # type: ignore[arg-type]
        )
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]  # type: ignore[union-attr]

    return list(zip(*_before_and_after(policy, run_folder / "final", write), strict=True))


def _before_and_after(
    policy: Policy, final: Path, write: Callable[[], list[str]]
) -> tuple[list[str], list[str]]:
    if hasattr(policy.model, "peft_config"):
        load_weights(final, policy.model)
        with adapter_off(policy):
            before = write()
    else:
        before = write()
        load_weights(final, policy.model)
    return before, write()
