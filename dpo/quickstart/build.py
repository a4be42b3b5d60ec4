"""Makes the embedded quickstart: a tiny chat model and preference pairs with a known right answer.

Preference data rarely says whether training *worked*: nobody can count how many answers got better.
Here every question has exactly one right answer, so the share of right greedy answers on held-out
questions measures it. `chosen` is the right answer, `rejected` a systematic mistake (the last
word but one instead of the last, the day before instead of the day after, ...).

The base model (Mistral architecture, 0.7 M parameters, its own byte-level tokenizer, ChatML) is
trained on fresh questions of the same kinds, none of them in the preference data. The answer it is
shown is the systematic mistake a bit more often than not, so it knows both answers and often gives
the wrong one: what is left to learn is the preference, which is what DPO teaches.

Run `python -m dpo.quickstart.build [--out DIR] [--stage data|model|all]`. The data takes seconds
and is the same byte for byte each time; the model takes about twelve minutes on two CPU cores and
is the same up to float noise.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from dpo.quickstart.exercises import SEED, SYSTEMS, Exercise, exercises, preference_exercises

# Under one half, so that greedy decoding mostly shows the mistake; close to one half, so that the
# right answer stays well known.
RIGHT_SHARE = 0.48
SFT_STEPS, SFT_BATCH, SFT_LR, SFT_WARMUP = 2200, 48, 3e-3, 100

# Room for every word of the questions as a single token: copying an answer is then one step.
VOCAB_SIZE = 1024
TOKENIZER_QUESTIONS = 20_000
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_data(out: Path) -> None:
    """Writes train.jsonl and eval.jsonl with the columns of Intel/orca_dpo_pairs."""
    for split, rows in preference_exercises().items():
        with open(out / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for system, exercise in rows:
                row = {
                    "system": system,
                    "question": exercise.question,
                    "chosen": exercise.right,
                    "rejected": exercise.wrong,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_tokenizer(stream: Iterator[Exercise]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips, each word of the questions is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = "system\nuser\nassistant\n"
    texts = []
    for number in range(TOKENIZER_QUESTIONS):
        exercise = next(stream)
        system = SYSTEMS[number % len(SYSTEMS)]
        texts.append(f"{roles}{system}\n{exercise.question}\n{exercise.right}\n{exercise.wrong}")
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=PAD,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def chat_ids(
    tokenizer: PreTrainedTokenizerFast, system: str, question: str, answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of the ChatML prompt and of the answer with its end."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    prompt: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return (
        tokenizer(prompt, add_special_tokens=False).input_ids,
        tokenizer(f"{answer}{IM_END}\n", add_special_tokens=False).input_ids,
    )


def collate(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded batch; labels cover the answers only."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    input_ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), -100)
    for row, (prompt, answer) in enumerate(examples):
        length = len(prompt) + len(answer)
        input_ids[row, :length] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : length] = torch.tensor(answer)
    return {"input_ids": input_ids, "labels": labels}


def build_model(out: Path) -> None:
    """Trains the tokenizer and the base model and writes both to `out`/model."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 1)
    splits = preference_exercises()
    seen = {exercise.facts for rows in splits.values() for _, exercise in rows}
    stream = exercises(rng, seen)
    tokenizer = build_tokenizer(stream)
    model = untrained_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SFT_LR, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / SFT_WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / SFT_STEPS)),
    )
    start = time.time()
    for step in range(SFT_STEPS):
        examples = []
        for _ in range(SFT_BATCH):
            exercise = next(stream)
            answer = exercise.right if rng.random() < RIGHT_SHARE else exercise.wrong
            examples.append(chat_ids(tokenizer, rng.choice(SYSTEMS), exercise.question, answer))
        supervised_loss(model, collate(examples, tokenizer.pad_token_id)).backward()  # type: ignore[arg-type]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            held_out = greedy_shares(model, tokenizer, splits["eval"])
            print(f"step {step + 1}: {held_out}, {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    file = out / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())  # in words that transformers 4 reads as well
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=2) + "\n")


def untrained_model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """Mistral's architecture, small enough to ship: 0.7 M parameters."""
    special: Any = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            sliding_window=None,
            tie_word_embeddings=True,
            initializer_range=0.05,
            **special,
        )
    )
    model.generation_config = GenerationConfig(**special)
    return model


def supervised_loss(model: MistralForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; logits only where one is predicted."""
    labels = batch["labels"][:, 1:]
    answered = labels != -100
    hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1][answered]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[answered])


@torch.no_grad()
def greedy_shares(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[tuple[str, Exercise]],
) -> dict[str, float]:
    """Shares of rows whose greedy answer is exactly the right or the wrong one.

    Greedy decoding gives an answer exactly if each of its tokens is the likeliest one after those
    before it, so one forward pass decides.
    """
    shares = {}
    for name in ("right", "wrong"):
        examples = [chat_ids(tokenizer, s, e.question, getattr(e, name)) for s, e in rows]
        batch = collate(examples, tokenizer.pad_token_id)  # type: ignore[arg-type]
        labels = batch.pop("labels")[:, 1:]
        hit = (model(**batch).logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        shares[name] = round(hit.all(dim=1).float().mean().item(), 3)
    return shares


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--stage", choices=["data", "model", "all"], default="all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage in ("data", "all"):
        build_data(args.out)
    if args.stage in ("model", "all"):
        build_model(args.out)


if __name__ == "__main__":
    main()
