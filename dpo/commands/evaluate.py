"""Measures a finished run: held-out pairs, win rate by a judge, lm-eval; base beside policy.

Writes held_out.json, win_rate.json (with judged.jsonl) and lm_eval.json, each if it is measured.

dpo evaluate runs/quickstart --judge exact_match
dpo evaluate RUN --judge https://api.openai.com/v1 --judge_model MODEL
dpo evaluate RUN --lm_eval open_llm_leaderboard        # the article's six tasks
dpo evaluate RUN --lm_eval my_task --include_path FOLDER_OF_ITS_YAML
"""

from collections.abc import Sequence
from pathlib import Path

from dpo.after.options import EvaluateOptions
from dpo.cli import Parser, instance, new_parser, read_flags


def parser(prog: str) -> Parser:
    """The run, and what to measure."""
    new = new_parser(prog, __doc__)
    new.add_argument("run", type=Path, help="run folder")
    new.add_class_arguments(EvaluateOptions, None)
    return new


def main(parser: Parser, argv: Sequence[str]) -> None:
    """Prints tables; writes every number to JSON files."""
    given = read_flags(parser, argv)
    options = instance(EvaluateOptions, given)
    from dpo.after.evaluate import evaluate_run

    for text in evaluate_run(given.run, options):
        print(text, flush=True)
