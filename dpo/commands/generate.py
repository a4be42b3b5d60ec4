"""Answers prompts with the model before and after training, side by side, from one loaded model.

dpo generate runs/quickstart "Tell me the last of these words: bread, tiger."
dpo generate runs/quickstart --chat
dpo generate RUN --prompts questions.jsonl --seeds 0 1 2 --output answers.jsonl
dpo generate MODEL_FOLDER --system "You are a helpful chatbot." < questions.txt

RUN is a run folder, or a model folder, which has no base beside it. A sampled answer depends on the
weights, the prompt, the seed and the sampling options, not on the other prompts or the batch size.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.cli import Parser, instance, new_parser, read_flags
from dpo.evaluate.sampling import Sampling


def parser(prog: str) -> Parser:
    """Who answers what, and how the answers are drawn."""
    new = new_parser(prog, __doc__)
    add = new.add_argument
    add("run", type=Path, help="run folder, or model folder")
    add(
        "prompt",
        nargs="*",
        default=[],
        help="what the user says; by default, the lines of standard input",
    )
    add(
        "--prompts",
        metavar="FILE",
        help=".txt: one a line; .jsonl: prompt, messages or preference rows; -: standard input",
    )
    add("--chat", action="store_true", help="a conversation on the terminal")
    add("--side", choices=("both", "policy", "base"), help="default: both; for a model: policy")
    add("--weights", help="of the run: final (default), best or checkpoint-N")
    add("--system", default="", help="system message for prompts that have none")
    new.add_class_arguments(Sampling, None)
    add("--seeds", type=int, nargs="+", default=[0], help="each gives one answer to each prompt")
    add("--batch_size", type=int, default=16, help="changes memory and speed alone")
    add("--output", type=Path, metavar="FILE", help="a new .jsonl file, one line a prompt and seed")
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints the answers, or writes them, or holds a conversation."""
    options = read_flags(parser, _words_first(parser, argv))
    sampling = instance(Sampling, options)
    from dpo.after.generate import (
        Speakers,
        answers,
        chat,
        check_request,
        print_answers,
        stream_answer,
        write_answers,
    )
    from dpo.after.prompts import read_prompts

    check_request(
        is_chat=options.chat,
        has_prompts=bool(options.prompt or options.prompts),
        output=options.output,
        seeds=options.seeds,
        batch_size=options.batch_size,
    )
    prompts = [] if options.chat else read_prompts(options.prompt, options.prompts, options.system)
    speakers = Speakers(options.run, options.side, options.weights)
    if options.chat:
        chat(speakers, options.system, options.seeds[0], sampling)
        return
    records = answers(speakers, prompts, options.seeds, sampling, options.batch_size)
    total = len(prompts) * len(options.seeds)
    if options.output:
        write_answers(options.output, records, total)
    elif total == 1 and sys.stdout.isatty():
        stream_answer(speakers, prompts[0], options.seeds[0], sampling)
    else:
        print_answers(records, speakers.sides, options.seeds)


def _words_first(parser: Parser, argv: Sequence[str]) -> list[str]:
    """RUN and prompts, then the flags: argparse wants its positional words in one place."""
    flags = {name: action for action in parser._actions for name in action.option_strings}
    words, rest, takes = [], [], 0
    for arg in argv:
        if arg.startswith("--"):
            nargs = flags[arg].nargs if arg in flags else 0
            takes = {None: 1, "+": len(argv)}.get(nargs, 0)
            rest.append(arg)
        elif takes:
            takes -= 1
            rest.append(arg)
        else:
            words.append(arg)
    return [*words, *rest]
