"""The command line: a YAML file, then flags; a user's mistake is one message and exit code 2.

`parse(argv)` reads `--config FILE` (YAML, nested like the classes of dpo.config) and then flags,
each of which sets one key: `--section.key value`. With no `--config` it starts from the packaged
quickstart configuration; with one, from the defaults of the classes.
"""

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dpo.config import PACKAGE, Config, DataSource, as_saved, map_paths, refusal, refuse
from dpo.errors import UserError

_LIST_KEYS = ("--lora.target_modules", "--train.report_to")
QUICKSTART = PACKAGE / "quickstart" / "config.yaml"
# Warnings of libraries about themselves, which give a user nothing to do.
_KNOWN_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # peft 0.21 reads what transformers 5.23 renamed
    "Paged optimizers are not supported on CPU",  # the run header says so
    "`broadcast_buffers` is deprecated",  # its successor is not in the oldest supported accelerate
)


def parse(argv: Sequence[str] | None = None, prog: str = "scripts/train.py") -> Config:
    """The checked configuration from command-line flags.

    Raises:
        UserError: an unknown key (with the nearest known ones), a value of the wrong type, or one
            that cannot be honoured.
    """
    import jsonargparse

    argv = _with_lists(sys.argv[1:] if argv is None else argv)
    parser = _parser(prog)
    instead: list[str] = []
    has_config = any(arg == "--config" or arg.startswith("--config=") for arg in argv)
    if not has_config:
        argv = ["--config", str(QUICKSTART), *argv]
    try:
        namespace = parser.parse_args(argv)
        if not has_config:
            instead = _instead_of_the_quickstarts(namespace)
        if instead:
            argv[2:2] = instead  # before the user's flags, which win
            namespace = parser.parse_args(argv)
    except (jsonargparse.ArgumentError, UnicodeDecodeError) as error:
        raise UserError(_explain(str(error))) from None
    _check_shape(namespace)
    sections = parser.instantiate(namespace)
    config = Config(**{section.name: sections[section.name] for section in fields(Config)})
    if "--loss.beta" in instead:
        config.note = (
            "loss.* and optim.* start from the article's values (beta 0.1, learning rate 5e-05): "
            "the quickstart's are for its own model"
        )
    map_paths(config, lambda path: os.path.expanduser(os.path.expandvars(path)))
    config.check()
    return config


def _with_lists(argv: Sequence[str]) -> list[str]:
    """Joins the words after a key that takes several: `--lora.target_modules q_proj v_proj`."""
    joined: list[str] = []
    words: list[str] = []
    for arg in [*argv, "--"]:
        if not arg.startswith("--"):
            words.append(arg)
            continue
        is_list = len(words) > 1 and joined and joined[-1] in _LIST_KEYS
        joined += [f"[{', '.join(words)}]"] if is_list else words
        words = []
        joined.append(arg)
    return joined[:-1]


def _instead_of_the_quickstarts(namespace: Any) -> list[str]:
    """Flags for what the quickstart's values do not fit: other data, or another model."""
    own: Any = yaml.safe_load(QUICKSTART.read_text())
    flags: list[str] = []
    if namespace["data.name_or_path"] != own["data"]["name_or_path"]:
        # Its held-out rows and its ground truth are about its own rows.
        flags += ["--data.eval_path", "null", "--train.eval_exact_match", "false"]
        flags += ["--train.metric_for_best_model", "null"]
    if namespace["model.name_or_path"] != own["model"]["name_or_path"]:
        # Its learning rate and beta are for its tiny model; the defaults are the article's.
        for section in ("loss", "optim"):
            for key in own[section]:
                flags += [f"--{section}.{key}", str(getattr(getattr(Config(), section), key))]
    return flags


@cache
def _parser(prog: str) -> Any:
    """Built once: it reads the sentence of every key from the source of the classes."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # No abbreviations: --optim.lr would mean lr_scheduler_type.
    parser: Any = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config, None)
    return parser


def _check_shape(namespace: Any) -> None:
    """Refuses what the parser lets through: a section without keys, a null where none may be."""
    for section in fields(Config):
        given = namespace[section.name]
        if not hasattr(given, "__dict__"):
            raise UserError(f"{section.name}: got {given!r}, wanted its keys, indented below it.")
        for key in fields(section.default_factory()):  # type: ignore[misc,arg-type]
            if given[key.name] is None and key.default is not None:
                refuse(f"{section.name}.{key.name}", None, f"a value such as {key.default!r}")


def known_keys() -> list[str]:
    """The name of every key: `section.key`."""
    return [
        f"{section.name}.{key.name}"
        for section in fields(Config)
        for key in fields(section.default_factory())  # type: ignore[misc,arg-type]
    ]


def _explain(message: str) -> str:
    """The parser's message in our words, with the nearest known keys to an unknown one."""
    if message.startswith("Unexpected config"):
        return "configuration: the file is empty, or not made of sections with keys below them."
    unknown = re.search(r"arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", message)
    name = (unknown[1] or unknown[2]) if unknown else ""
    if message.startswith('Parser key "data.name_or_path"'):
        keys = [key.name for key in fields(DataSource)]
        wrong_key = f" Unknown key {name}." if name else ""
        return (
            "data.name_or_path: wanted a hub id, a file or a folder, or a list of sources, "
            f"{{path: ID_OR_FILE}} each, with these keys: {', '.join(keys)} (only path is "
            f"required).{wrong_key}"
        )
    key = re.match(r'Parser key "([\w.]+)":', message)
    given = re.search(r"(?:Got|Given) value: (.*)", message)
    kinds = re.findall(r"Expected an? (.+?)\.?(?: Got value: .*)?$", message, re.MULTILINE)
    if key and given and kinds:  # several, where a union was wanted
        wanted = re.sub(
            r"<class '(\w+)'>|typing\.Literal", lambda m: m[1] or "one of ", " or ".join(kinds)
        )
        return refusal(key[1], given[1], wanted.replace("NoneType", "null"))
    if not unknown:
        return "configuration: " + re.sub(r'Parser key "([^"]+)":', r"--\1:", message)
    group = re.search(r"Group '(\w+)'", message)
    full = f"{group[1]}.{name}" if group else name
    near = difflib.get_close_matches(full, known_keys(), n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return f"configuration: unknown key {full}.{hint} All keys: scripts/train.py --help."


def save(config: Config, path: Path) -> None:
    """Writes every key, so that the run can be repeated from this file alone."""
    path.write_text(yaml.safe_dump(as_saved(config), sort_keys=False, allow_unicode=True))


def run_script(main: Callable[[], object], stopped: str = "stopped") -> None:
    """Runs a script: a user's mistake becomes one message and exit code 2, without a traceback.

    `stopped`: the message after Ctrl-C.
    """
    for known in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=known)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
