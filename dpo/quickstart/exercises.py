"""Questions of six simple kinds, each with one right answer and one systematic mistake.

Both use the same words and have the same length, so length is no shortcut to the right answer.

The two differ by a rule that the question alone shows (a place in a list, a step forward or back).
Picking the older of two people did not work: shown both answers at about equal rates, the base
model learned that it must be one of the two and little more, and DPO brought out no more than that.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SEED = 20240117
TRAIN_ROWS, EVAL_ROWS = 2000, 200

SYSTEMS = [
    "",
    "You are a helpful assistant.",
    "You are an AI assistant. Give a short and correct answer.",
    "Read the question with care and answer it in one sentence.",
    "You are a patient teacher. Keep your answer short.",
    "You are an AI assistant that helps people find information.",
]
WORDS = """
apple basket bird boat bread bridge button candle castle cherry cloud coffee dragon engine farmer
flower forest garden guitar hammer honey island jacket kitchen lemon market mirror monkey ocean
pencil piano river rocket silver stone sugar tiger tower violin window
""".split()
NAMES = """
Adam Alice Anna Ben Carla Clara David Emma Eric Eva Frank Grace Helen Ivan Jack Julia Karl Laura Leo
Lucy Maria Mark Nina Oscar Paul Peter Rosa Sam Sara Simon Tom Vera
""".split()
EVENTS = """
concert dance debate dinner exam film fair lecture lesson lunch match meeting parade party picnic
play race show trial trip visit walk wedding workshop
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """
January February March April May June July August September October November December
""".split()


@dataclass(frozen=True)
class Exercise:
    """A question, its one right answer and the systematic mistake.

    `facts` is what the question is about, whatever its wording and the order of its items.
    """

    facts: frozenset
    question: str
    right: str
    wrong: str


def ask(
    rng: random.Random,
    facts: Iterable,
    templates: list[str],
    values: Iterable,
    answer: str,
    right: object,
    wrong: object,
) -> Exercise:
    """An exercise in the words of one of the `templates`, filled with `values`."""
    question = rng.choice(templates).format(*values)
    return Exercise(frozenset(facts), question, answer.format(right), answer.format(wrong))


def first_word(rng: random.Random) -> Exercise:
    """The first word of a list; the mistake is the second."""
    words = rng.sample(WORDS, rng.randint(4, 6))
    templates = [
        "What is the first word in this list: {}?",
        "Here is a list of words: {}. Which word is the first one?",
        "Tell me the first of these words: {}.",
    ]
    return ask(
        rng, words, templates, [", ".join(words)], "The first word is {}.", words[0], words[1]
    )


def last_word(rng: random.Random) -> Exercise:
    """The last word of a list; the mistake is the last but one."""
    words = rng.sample(WORDS, rng.randint(4, 6))
    templates = [
        "What is the last word in this list: {}?",
        "Here is a list of words: {}. Which word is the last one?",
        "Tell me the last of these words: {}.",
    ]
    return ask(
        rng, words, templates, [", ".join(words)], "The last word is {}.", words[-1], words[-2]
    )


def number_of_words(rng: random.Random) -> Exercise:
    """The length of a list; the mistake is one too many."""
    words = rng.sample(WORDS, rng.randint(3, 7))
    templates = [
        "How many words are in this list: {}?",
        "Here is a list of words: {}. How many words does it have?",
        "Count these words: {}.",
    ]
    count = len(words)
    return ask(
        rng, words, templates, [", ".join(words)], "The list has {} words.", count, count + 1
    )


def hour_after(rng: random.Random) -> Exercise:
    """An hour later; the mistake is an hour earlier."""
    hour, names = rng.randrange(2, 12), rng.sample(NAMES, 2)
    templates = [
        "The guest {1} comes at {0} and the guest {2} one hour later. When does {2} come?",
        "We expect {1} at {0} and then {2} an hour later. At what time will {2} come?",
        "If {1} arrives at {0}, when does {2} arrive who comes an hour later?",
    ]
    values = [hour, *names]
    answer = f"The guest {names[1]} comes at {{}}."
    return ask(rng, values, templates, values, answer, hour + 1, hour - 1)


def day_after(rng: random.Random) -> Exercise:
    """The day after; the mistake is the day before."""
    day, events = rng.randrange(7), rng.sample(EVENTS, 2)
    templates = [
        "The {1} is on {0} and the {2} is one day later. When is the {2}?",
        "We have the {1} on {0}. The {2} is the day after. When is the {2}?",
        "If the {1} is on {0}, on which day is the {2} that comes a day later?",
    ]
    values = [DAYS[day], *events]
    answer = f"The {events[1]} is on {{}}."
    return ask(rng, values, templates, values, answer, DAYS[(day + 1) % 7], DAYS[day - 1])


def month_after(rng: random.Random) -> Exercise:
    """The month after; the mistake is the month before."""
    month, events = rng.randrange(12), rng.sample(EVENTS, 2)
    templates = [
        "The {1} is in {0} and the {2} is one month later. When is the {2}?",
        "We plan the {1} for {0}. The {2} is a month later. When is the {2}?",
        "If the {1} is in {0}, in which month is the {2} that comes a month later?",
    ]
    values = [MONTHS[month], *events]
    answer = f"The {events[1]} is in {{}}."
    return ask(rng, values, templates, values, answer, MONTHS[(month + 1) % 12], MONTHS[month - 1])


KINDS = [
    first_word,
    last_word,
    number_of_words,
    hour_after,
    day_after,
    month_after,
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
    """The held-out and training questions with their system prompts; no two share their facts."""
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
