"""Preferences to tokenise, and what came of them."""

from dpo.config import Config, DataConfig
from dpo.data.audit import Audit
from dpo.data.chat import ChatTokenizer
from dpo.data.formats import Preference
from dpo.data.limits import Limits
from dpo.data.loader import load_data
from dpo.data.templates import choose_template
from tests.data.tokenizers import BASE, Family, build

ROOM = Limits(1000, 2000, "truncate")


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def as_turns(answer):
    return answer if isinstance(answer, list) else [assistant(answer)]


def messages(prompt="Name a river.", chosen="The Rhine.", rejected="Paris.", tools=None):
    prompt = prompt if isinstance(prompt, list) else [user(prompt)]
    return Preference(
        kind="messages",
        prompt=prompt,
        chosen=as_turns(chosen),
        rejected=as_turns(rejected),
        tools=tools,
    )


def text(prompt="Once", chosen=" upon", rejected=" more"):
    return Preference(kind="text", prompt=prompt, chosen=chosen, rejected=rejected)


def chatml(chosen, rejected="Paris.<|im_end|>\n"):
    prompt = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    return Preference(kind="chatml", prompt=prompt, chosen=chosen, rejected=rejected)


class Run:
    """Tokenises preferences as rows 1, 2, ...; shows what came of them."""

    def __init__(self, family, *preferences, limits=ROOM, choice="auto", pad=None, **keys):
        self.tokenizer = build(family, pad=pad)
        self.audit = Audit()
        template = choose_template(self.tokenizer, DataConfig(chat_template=choice, **keys))
        chat = ChatTokenizer(self.tokenizer, template, limits, self.audit)
        rows = list(enumerate(preferences, start=1))
        self.kept = dict(chat.tokenize(rows))

    @property
    def pair(self):
        assert not self.audit.dropped
        (pair,) = self.kept.values()
        return pair

    @property
    def texts(self):
        pair = self.pair
        return [*map(self.tokenizer.decode, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))]

    @property
    def scored(self):
        """The scored stretches of the chosen answer, as text."""
        stretches, previous = [], False
        for token, marked in zip(self.pair.chosen_ids, self.pair.chosen_scored, strict=True):
            if marked and not previous:
                stretches.append([])
            if marked:
                stretches[-1].append(token)
            previous = marked
        return [self.tokenizer.decode(stretch) for stretch in stretches]

    @property
    def dropped(self):
        return {reason: tally.rows for reason, tally in self.audit.dropped.items()}

    @property
    def noted(self):
        return {reason: tally.rows for reason, tally in self.audit.noted.items()}

    def count(self, token, side="chosen_ids"):
        return list(getattr(self.pair, side)).count(self.tokenizer.convert_tokens_to_ids(token))


def cut_by_offsets(tokenizer, preference, whole, limit):
    """What is left of a long prompt, by the offsets of its one rendering; fast tokenizers only."""

    def rendered(prompt):
        return tokenizer.apply_chat_template(
            prompt, tools=preference.tools, tokenize=False, add_generation_prompt=True
        )

    text, marked = rendered(preference.prompt), [turn.copy() for turn in preference.prompt]
    next(turn for turn in marked if turn["role"] == "user")["content"] = "\0"
    before, after = rendered(marked).split("\0")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first, last = len(before), len(text) - len(after)
    content = [
        token
        for token, (start, end) in enumerate(offsets["offset_mapping"][: len(whole)])
        if first <= start and end <= last
    ]
    excess = max(len(whole) - limit, 0)
    keeps_frame = excess < len(content)
    gone = content[:excess] if keeps_frame else range(excess)
    return [token for i, token in enumerate(whole) if i not in gone], keeps_frame


def config(path, seed=42, **data):
    settings = Config()
    settings.data.name_or_path = path
    settings.train.seed = seed
    settings.data.max_dropped = 1.0  # a few rows, of which some are bad
    for key, value in data.items():
        setattr(settings.data, key, value)
    return settings


def load(path, family=BASE, **options):
    return load_data(config(path, **options), build(family))


def row(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rows(number):
    return [row(f"question {i}") for i in range(1, number + 1)]


def chat_row(prompt, chosen, rejected):
    def turns(value, role):
        return value if isinstance(value, list) else [{"role": role, "content": value}]

    sides = {"chosen": turns(chosen, "assistant"), "rejected": turns(rejected, "assistant")}
    return {"prompt": turns(prompt, "user"), **sides}


def names(pairs):
    return [pairs.row_name(i) for i in range(len(pairs))]


# Renders a prompt otherwise once an answer follows it.
FICKLE = Family(
    template="{% for m in messages %}{{ m.role + m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt and '!' in messages[0].content %}<think>{% endif %}",
    special=("</s>",),
    eos="</s>",
)


def fickle_rows(number, differing):
    return [chat_row("!" if i in differing else "?", "A.", "B.") for i in range(1, number + 1)]
