"""Which chat template writes messages: the model's own, ChatML or a file, with its arguments."""

import re
from dataclasses import replace
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig
from dpo.data.formats import IM_START
from dpo.errors import UserError

IM_END = "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def choose_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str | None:
    """The Jinja template that `data` means, with its `template_arguments` as defaults, on its day.

    None refuses messages: for `none`, and for `auto` if the tokenizer has neither a template nor
    ChatML's control tokens (plain text needs neither).

    Raises:
        UserError: ChatML for a tokenizer that does not know its control tokens, or no such file.
    """
    template = _named_template(tokenizer, data.chat_template)
    defaults = data.template_arguments.items()
    # A literal of Python is one of Jinja.
    bound = (f"{{% set {k} = {k} if {k} is defined else {v!r} %}}" for k, v in defaults)
    return None if template is None else "".join(bound) + _on_day(data.template_date, template)


def template_to_save(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str | None:
    """The template of a saved model: that of training, but its users ask for their own day."""
    return choose_template(tokenizer, replace(data, template_date=None))


def _on_day(day: str | None, template: str) -> str:
    """The template with the day written out where it asks for today's; None: as it is."""
    if day is None:
        return template
    written = date.fromisoformat(day)
    return _TODAY.sub(lambda call: repr(written.strftime(call[2])), template)


_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def _named_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str | None:
    if choice == "none":
        return None
    if choice == "auto":
        if isinstance(tokenizer.chat_template, dict):
            return _by_tools(tokenizer.chat_template)
        if tokenizer.chat_template:
            return tokenizer.get_chat_template()
        return None if _missing_in_chatml(tokenizer) else CHATML
    if choice == "chatml":
        require_chatml(tokenizer, "data.chat_template: got chatml")
        return CHATML
    if not Path(choice).is_file():
        raise UserError(
            f"data.chat_template: got {choice!r}, wanted auto, chatml, none or an existing file. "
            "Give the path of a Jinja template."
        )
    return Path(choice).read_text(encoding="utf-8")


def _by_tools(named: dict[str, str]) -> str:
    """One template for several: as transformers does, `tool_use` writes what has tools."""
    if "default" not in named:
        raise UserError(
            f"the tokenizer's templates are {', '.join(named)}, and none is the default. Give one "
            "as a file in data.chat_template."
        )
    plain, with_tools = named["default"], named.get("tool_use", named["default"])
    if plain == with_tools:
        return plain
    # Jinja drops one line break at a template's end.
    plain, with_tools = (text.removesuffix("\n") for text in (plain, with_tools))
    return f"{{% if tools %}}{with_tools}{{% else %}}{plain}{{% endif %}}"


def require_chatml(tokenizer: PreTrainedTokenizerBase, problem: str) -> None:
    """Refuses ChatML for a tokenizer that would spell its control tokens out as text."""
    if missing := _missing_in_chatml(tokenizer):
        raise UserError(
            f"{problem}, but the tokenizer {tokenizer.name_or_path!r} does not know "
            f"{' and '.join(missing)} as single tokens. Take a model that does, or give its own "
            "template as a file in data.chat_template."
        )


def _missing_in_chatml(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    known = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [token for token in (IM_START, IM_END) if token not in known]
