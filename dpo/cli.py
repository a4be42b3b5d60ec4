"""The command line: a YAML file, then flags; a user's mistake is one message and exit code 2.

A command of dpo.commands makes its parser by `new_parser`, or by `config_parser` if it takes the
configuration: `--config FILE` (YAML, nested like the classes of dpo.config), then the variables
`DPO_SECTION__KEY=value`, then the flags `--section.key value`; the later one wins. With no
`--config` it starts from the packaged quickstart configuration; with one, from the defaults of the
classes.
"""

import argparse
import difflib
import errno
import logging
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import jsonargparse
import yaml

from dpo import signals
from dpo.config import PACKAGE, Config, DataSource, as_saved, map_paths, refusal, refuse
from dpo.errors import UserError
from dpo.signals import Stopped

_LIST_KEYS = ("--lora.target_modules", "--train.report_to")
QUICKSTART = PACKAGE / "quickstart" / "config.yaml"
RECIPES = PACKAGE / "recipes"
MAX_NODES = 10_000  # of a configuration file; one with every key has 200
# Warnings of libraries about themselves, which give a user nothing to do.
_KNOWN_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # peft 0.21 reads what transformers 5.23 renamed
    "Paged optimizers are not supported on CPU",  # the run header says so
    "CUDA initialization",  # dpo.device says it
    "`broadcast_buffers` is deprecated",  # its successor is not in the oldest supported accelerate
)

# No space, no more of a quota, a file as large as it may be, no permission to write at all.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

T = TypeVar("T")
Parser = Any  # jsonargparse.ArgumentParser, whose methods are not typed
# The sentence below a field of a dataclass is the help of its flag.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of a module's docstring, and calls a type by its name."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r"<class '(\w+)'>", r"\1", super()._expand_help(action))


def new_parser(prog: str, description: str | None) -> Parser:
    """A parser that raises its errors, for `read_flags`."""
    # No abbreviations: --optim.lr would mean lr_scheduler_type.
    return jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
    )


def config_parser(prog: str, description: str | None = None) -> Parser:
    """A parser of `--config` and a flag for every key, for `read_config`."""
    parser = new_parser(prog, description)
    parser.usage = f"{prog} [--config FILE] [--section.key value ...]"
    parser.add_argument("--config", action="config", help="YAML file, or name of a recipe")
    parser.add_class_arguments(Config, None)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> Any:
    """The namespace of what was given.

    Raises:
        UserError: an unknown flag (with the nearest known ones), or a value of the wrong type.
    """
    try:
        return parser.parse_args(argv)
    except (jsonargparse.ArgumentError, ValueError) as error:  # a NUL, bytes that are no text
        raise UserError(_explain(str(error), parser)) from None


def instance(kind: Callable[..., T], given: Any) -> T:
    """A dataclass from the values that a namespace has for its fields."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names})


def parse(argv: Sequence[str] | None = None) -> Config:
    """The checked configuration from the flags of `dpo train`; see `read_config`."""
    return read_config(_train_parser(), sys.argv[1:] if argv is None else argv)[0]


@cache
def _train_parser() -> Parser:
    """Built once: it reads the sentence of every key from the source of the classes."""
    return config_parser("dpo train")


def load(file: Path) -> Config:
    """The configuration that a run has saved, whatever the environment says now."""
    return read_config(_train_parser(), ["--config", str(file)], environment={})[0]


def read_config(
    parser: Parser, argv: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[Config, Any]:
    """The checked configuration, and the namespace with the command's own flags.

    Raises:
        UserError: as `read_flags`, or a value that cannot be honoured.
    """
    files, flags = _config_files(argv)
    flags = [*_variables(environment), *_with_lists(flags)]
    instead: list[str] = []
    if files:
        namespace = read_flags(parser, [*files, *flags])
    else:
        files = ["--config", str(QUICKSTART)]
        namespace = read_flags(parser, [*files, *flags])
        instead = _instead_of_the_quickstarts(namespace)
        if instead:
            namespace = read_flags(parser, [*files, *instead, *flags])
    _check_shape(namespace)
    config = instance(Config, parser.instantiate(namespace))
    if "--loss.beta" in instead:
        config.note = (
            "loss.* and optim.* start from the article's values (beta 0.1, learning rate 5e-05): "
            "the quickstart's are for its own model"
        )
    map_paths(config, _expand)
    config.check()
    return config, namespace


def _expand(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))


def _config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config FILE` or NAME, resolved, and the other flags, which win wherever they stand."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--config", action="append", default=[])
    try:
        given, flags = own.parse_known_args(argv)
    except argparse.ArgumentError:
        raise UserError("--config: got no file after it.") from None
    files_given = [recipe_file(name) for name in given.config]
    for file in files_given:
        _check_yaml(file)
    return [word for file in files_given for word in ("--config", str(file))], flags


def _check_yaml(file: Path) -> None:
    """Refuses what readers of YAML take in silence: a key given twice, and aliases that multiply.

    Raises:
        UserError: naming the key and its lines.
    """
    try:
        root = cast(yaml.Node | None, yaml.compose(file.read_text("utf-8"), yaml.SafeLoader))  # type: ignore[reportUnknownMemberType]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return  # the parser says it
    if root is not None and _size(root, {}, file) > MAX_NODES:
        raise UserError(
            f"{file}: with its aliases written out it has more than {MAX_NODES} values. Write it "
            "without anchors (&)."
        )


def _size(node: yaml.Node, sizes: dict[int, int | float], file: Path) -> int | float:
    """How many nodes it has once its aliases are written out; one inside itself has no end."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            first = lines.setdefault(str(key.value), line := key.start_mark.line + 1)
            if first != line:
                raise UserError(
                    f"{file}: key {key.value} is given twice, on lines {first} and {line}. Keep "
                    "one."
                )
            inside += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        inside = list(node.value)
    sizes[id(node)] = 1 + sum(_size(child, sizes, file) for child in inside)
    return sizes[id(node)]


def recipe_file(name: str) -> Path:
    """The YAML file at a path, or the packaged recipe of that name.

    Raises:
        UserError: neither.
    """
    for file in (Path(_expand(name)), RECIPES / f"{name}.yaml"):
        if file.is_file():
            return file
    known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    raise UserError(
        f"--config: {name} does not exist. Name a YAML file, or one of the recipes: {known}."
    )


def _variables(environment: Mapping[str, str]) -> list[str]:
    """A flag for each `DPO_SECTION__KEY` of the environment.

    Raises:
        UserError: there is no such key.
    """
    flags = {f"DPO_{key.replace('.', '__').upper()}": f"--{key}" for key in known_keys()}
    given = {name: value for name, value in environment.items() if re.match("DPO_[A-Z]+__", name)}
    for name in given.keys() - flags.keys():
        near = difflib.get_close_matches(name, flags, n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise UserError(f"environment: {name} sets no key.{hint} Correct it, or unset it.")
    return [f"{flags[name]}={value}" for name, value in given.items()]


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
        # Its number is for its short rows.
        flags += ["--train.tokens_per_microbatch", "auto"]
    if namespace["model.name_or_path"] != own["model"]["name_or_path"]:
        flags += ["--model.dtype", "auto"]
        # Its learning rate and beta are for its tiny model; the defaults are the article's.
        for section in ("loss", "optim"):
            for key in own[section]:
                flags += [f"--{section}.{key}", str(getattr(getattr(Config(), section), key))]
    return flags


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


def _explain(message: str, parser: Parser) -> str:
    """The parser's message in our words, with the nearest known keys to an unknown one."""
    known = list(parser.get_defaults().keys())
    takes_config = "loss.beta" in known
    about = "configuration" if takes_config else parser.prog
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
        return f"{about}: " + re.sub(r'Parser key "([^"]+)":', r"--\1:", message)
    group = re.search(r"Group '(\w+)'", message)
    full = f"{group[1]}.{name}" if group else name
    near = difflib.get_close_matches(full, known, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    kind = "key" if takes_config else "flag"
    return f"{about}: unknown {kind} {full}.{hint} All {kind}s: {parser.prog} --help."


def save(config: Config, path: Path) -> None:
    """Writes every key, so that the run can be repeated from this file alone."""
    path.write_text(yaml.safe_dump(as_saved(config), sort_keys=False, allow_unicode=True))


def run_command(main: Callable[[], object], stopped: str = "stopped") -> None:
    """Runs a command: a user's mistake becomes one message and exit code 2, without a traceback.

    `stopped`: the message after a signal.
    """
    for known in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=known)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    signals.listen()
    try:
        main()
        _end_ranks(0)
    except UserError as error:
        signals.leave()
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # the launcher stops us when the first rank has left, and has said it
        print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(
            f"error: {error.filename or 'a file'}: {error.strerror}. Free some space, or name "
            "another disk.",
            file=sys.stderr,
        )
        _exit(2)
    except KeyboardInterrupt as interrupt:
        stop = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":
            print(stop.said or stopped, file=sys.stderr)
        _exit(stop.exit_code)


def _exit(code: int) -> None:
    _end_ranks(code)
    sys.exit(code)


def _end_ranks(code: int) -> None:
    """Ends one of several processes at once, without taking apart what it has built.

    To free a process group, Python's lock is held while gloo's threads end, and they may want it.
    """
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
