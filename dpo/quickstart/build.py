"""Makes the embedded quickstart: a tiny chat model and preference pairs with a known right answer.

Preference data rarely says whether training *worked*: nobody can count how many answers got better.
Here every question has exactly one right answer, so the share of right greedy answers on held-out
questions measures it.  The questions are of seven simple kinds.  ``chosen`` is the right answer,
``rejected`` a systematic mistake (the last word but one instead of the last, the day before instead
of the day after, ...) in the same words and of the same length, so length is no shortcut.

The base model (Mistral architecture, 0.9 M parameters, its own byte-level tokenizer, ChatML) is
trained on fresh questions of the same kinds, none of them in the preference data, and a bit more
often than not with the systematic mistake as the answer.  So it knows both answers and mostly gives
the wrong one: what is left to learn is the preference, which is what DPO teaches.

Run ``python -m dpo.quickstart.build [--out DIR] [--stage data|model|all]``.  The data takes a second
and is the same byte for byte each time; the model takes about 20 minutes on two CPU cores and is
the same up to float noise.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

SEED = 20240117
TRAIN_ROWS, EVAL_ROWS = 2000, 200

# Under one half, so that greedy decoding mostly shows the mistake; close to one half, so that the
# right answer stays well known.
RIGHT_SHARE = 0.48
SFT_STEPS, SFT_BATCH, SFT_LR, SFT_WARMUP = 3000, 48, 3e-3, 200

# Room for every word below as a single token: copying an answer is then one step.
VOCAB_SIZE = 1280
TOKENIZER_QUESTIONS = 20_000
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SYSTEMS = [
    "",
    "You are a helpful assistant.",
    "You are an AI assistant. Give a short and correct answer.",
    "Read the question with care and answer it in one sentence.",
    "You are a patient teacher. Keep your answer short.",
    "You are an AI assistant that helps people find information.",
]
WORDS = """
anchor apple artist autumn basket bicycle blanket boat branch bread brush bucket button cabin
candle carpet cellar chain circle cloud copper corner cradle curtain diamond doctor donkey dragon
dream eagle echo elbow evening expert farmer feather ferry field flower forest garden ginger glove
grape hammer harbor helmet hill horse hotel island ivory jewel journey jungle kettle kitchen kitten
ladder lake lawyer leaf letter library magnet maple meadow melon monkey morning museum needle night
notebook office olive orange orchard paint palace parrot pebble pepper piano planet pocket quarter
queen rabbit radio ribbon river saddle sailor school season shirt silver soldier spoon stone storm
summer table temple ticket timber tower turtle uncle valley velvet violin voyage walnut water whale
window wizard yard zebra zipper
""".split()
THINGS = "ball bag bowl box car chair coat cup desk hat house lamp plate scarf shoe vase".split()
NAMES = """
Adam Alice Anna Ben Carla Clara David Emma Eric Eva Frank Grace Helen Ivan Jack Julia Karl Laura Leo
Lucy Maria Mark Nina Oscar Paul Peter Rosa Sam Sara Simon Tom Vera
""".split()
EVENTS = """
concert dance debate dinner exam film fair lecture lesson lunch match meeting parade party picnic play
race show trial trip visit walk wedding workshop
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclass(frozen=True)
class Exercise:
    """A question, its one right answer and the systematic mistake.

    `facts` is what the question is about, whatever its wording and the order of its items.
    """

    facts: frozenset
    question: str
    right: str
    wrong: str


def last_word(rng: random.Random) -> Exercise:
    words = rng.sample(WORDS, rng.randint(4, 6))
    question = rng.choice(
        [
            "What is the last word in this list: {}?",
            "Here is a list of words: {}. Which word is the last one?",
            "Tell me the last of these words: {}.",
        ]
    ).format(", ".join(words))
    answer = "The last word is {}."
    return Exercise(
        frozenset(words), question, answer.format(words[-1]), answer.format(words[-2])
    )


def first_word(rng: random.Random) -> Exercise:
    words = rng.sample(WORDS, rng.randint(4, 6))
    question = rng.choice(
        [
            "What is the first word in this list: {}?",
            "Here is a list of words: {}. Which word is the first one?",
            "Tell me the first of these words: {}.",
        ]
    ).format(", ".join(words))
    answer = "The first word is {}."
    return Exercise(frozenset(words), question, answer.format(words[0]), answer.format(words[1]))


def number_of_words(rng: random.Random) -> Exercise:
    words = rng.sample(WORDS, rng.randint(3, 7))
    question = rng.choice(
        [
            "How many words are in this list: {}?",
            "Here is a list of words: {}. How many words does it have?",
            "Count these words: {}.",
        ]
    ).format(", ".join(words))
    answer = "The list has {} words."
    return Exercise(
        frozenset(words), question, answer.format(len(words)), answer.format(len(words) + 1)
    )


def older_person(rng: random.Random) -> Exercise:
    names, ages = rng.sample(NAMES, 2), rng.sample(range(10, 100), 2)
    question = rng.choice(
        [
            "This is {0}, aged {2}, and this is {1}, aged {3}. Who is older?",
            "My friend {0} is {2} years old and my friend {1} is {3} years old. Who is older?",
            "We know that {0} is {2} and {1} is {3}. Which of the two is older?",
        ]
    ).format(*names, *ages)
    answer = "The older one is {}."
    older = ages.index(max(ages))
    return Exercise(
        frozenset(zip(names, ages, strict=True)),
        question,
        answer.format(names[older]),
        answer.format(names[1 - older]),
    )


def cheaper_thing(rng: random.Random) -> Exercise:
    things, prices = rng.sample(THINGS, 2), rng.sample(range(10, 100), 2)
    question = rng.choice(
        [
            "The {0} costs {2} dollars and the {1} costs {3} dollars. Which one is cheaper?",
            "In the shop the {0} is {2} dollars and the {1} is {3} dollars. Which is cheaper?",
            "You pay {2} dollars for the {0} and {3} dollars for the {1}. Which one is cheaper?",
        ]
    ).format(*things, *prices)
    answer = "The cheaper one is the {}."
    cheaper = prices.index(min(prices))
    return Exercise(
        frozenset(zip(things, prices, strict=True)),
        question,
        answer.format(things[cheaper]),
        answer.format(things[1 - cheaper]),
    )


def day_after(rng: random.Random) -> Exercise:
    day, (first, second) = rng.randrange(7), rng.sample(EVENTS, 2)
    question = rng.choice(
        [
            "The {first} is on {day} and the {second} is one day later. When is the {second}?",
            "We have the {first} on {day}. The {second} is the day after. When is the {second}?",
            "If the {first} is on {day}, on which day is the {second} that comes a day later?",
        ]
    ).format(first=first, second=second, day=DAYS[day])
    answer = f"The {second} is on {{}}."
    return Exercise(
        frozenset({first, second, DAYS[day]}),
        question,
        answer.format(DAYS[(day + 1) % 7]),
        answer.format(DAYS[(day - 1) % 7]),
    )


def next_age(rng: random.Random) -> Exercise:
    name, age = rng.choice(NAMES), rng.randrange(11, 99)
    question = rng.choice(
        [
            "Today {name} is {age} years old. How old will {name} be in a year?",
            "This year {name} turned {age}. What will be the age of {name} next year?",
            "If {name} is {age} now, how old is {name} one year later?",
        ]
    ).format(name=name, age=age)
    answer = f"In a year {name} will be {{}}."
    return Exercise(
        frozenset({name, age}), question, answer.format(age + 1), answer.format(age - 1)
    )


KINDS = [
    first_word,
    last_word,
    number_of_words,
    older_person,
    cheaper_thing,
    next_age,
    day_after,
]


def exercises(rng: random.Random, seen: set[frozenset]) -> Iterator[Exercise]:
    """Endless exercises, the kinds in turn, none about facts in `seen`."""
    while True:
        for kind in KINDS:
            exercise = kind(rng)
            while exercise.facts in seen:
                exercise = kind(rng)
            yield exercise


def preference_exercises() -> dict[str, list[tuple[str, Exercise]]]:
    """The held-out and the training questions with their system prompts, all about other facts."""
    rng = random.Random(SEED)
    seen: set[frozenset] = set()
    splits = {}
    for split, size in (("eval", EVAL_ROWS), ("train", TRAIN_ROWS)):
        splits[split] = []
        for exercise in exercises(rng, seen):
            seen.add(exercise.facts)
            splits[split].append((rng.choice(SYSTEMS), exercise))
            if len(splits[split]) == size:
                break
        rng.shuffle(splits[split])
    return splits


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
    """A byte-level BPE tokenizer: any text round-trips, the words of the questions are tokens."""
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
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SFT_LR, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / SFT_WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / SFT_STEPS)
        ),
    )
    start = time.time()
    for step in range(SFT_STEPS):
        examples = []
        for _ in range(SFT_BATCH):
            exercise = next(stream)
            answer = exercise.right if rng.random() < RIGHT_SHARE else exercise.wrong
            examples.append(chat_ids(tokenizer, rng.choice(SYSTEMS), exercise.question, answer))
        batch = collate(examples, tokenizer.pad_token_id)
        labels = batch["labels"][:, 1:]
        answered = labels != -100
        # Logits only where the answer is predicted: a quarter less time per step.
        hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1][answered]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            held_out = greedy_shares(model, tokenizer, splits["eval"])
            print(f"step {step + 1}: loss {loss.item():.4f}, {held_out}, {time.time() - start:.0f} s")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


@torch.no_grad()
def greedy_shares(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[tuple[str, Exercise]],
) -> dict[str, float]:
    """Shares of rows whose greedy answer is exactly the right or the wrong one.

    Greedy decoding gives a certain answer iff each of its tokens is the likeliest one after those
    before, so one forward pass decides.
    """
    shares = {}
    for name in ("right", "wrong"):
        examples = [chat_ids(tokenizer, s, e.question, getattr(e, name)) for s, e in rows]
        batch = collate(examples, tokenizer.pad_token_id)
        labels = batch.pop("labels")[:, 1:]
        hit = (model(**batch).logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        shares[name] = hit.all(dim=1).float().mean().item()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
