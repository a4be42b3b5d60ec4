r"""Answers prompts with the model before and after training, side by side, from one loaded model.

python scripts/generate.py runs/quickstart "Tell me the last of these words: bread, tiger."
python scripts/generate.py runs/quickstart --chat
python scripts/generate.py RUN --prompts questions.jsonl --seeds 0 1 2 --output answers.jsonl
python scripts/generate.py MODEL_FOLDER --system "You are a helpful chatbot." < questions.txt

RUN is a run folder, or a model folder, which has no base beside it. A sampled answer depends on the
weights, the prompt, the seed and the sampling options, not on the other prompts or the batch size.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

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
from dpo.cli import run_script
from dpo.evaluate.samples import Sampling


def main() -> None:
    """Prints the answers, or writes them, or holds a conversation."""
    options = arguments()
    sampling = Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder, or model folder")
    add("prompt", nargs="*", help="what the user says; by default, the lines of standard input")
    add(
        "--prompts",
        metavar="FILE",
        help=".txt: one a line; .jsonl: prompt, messages or preference rows; -: standard input",
    )
    add("--chat", action="store_true", help="a conversation on the terminal")
    add("--side", choices=("both", "policy", "base"), help="default: both; for a model: policy")
    add("--weights", help="of the run: final (default), best or checkpoint-N")
    add("--system", default="", help="system message for prompts that have none")
    add("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    add("--top_p", type=float, default=Sampling.top_p)
    add("--max_new_tokens", type=int, default=Sampling.max_new_tokens)
    add("--seeds", type=int, nargs="+", default=[0], help="each gives one answer to each prompt")
    add("--batch_size", type=int, default=16, help="changes memory and speed alone")
    add("--output", type=Path, metavar="FILE", help="a new .jsonl file, one line a prompt and seed")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_script(main)
