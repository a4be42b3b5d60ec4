r"""Measures a finished run: held-out pairs, win rate by a judge, lm-eval; base beside policy.

Writes held_out.json, win_rate.json (with judged.jsonl) and lm_eval.json, each if it is measured.

python scripts/evaluate.py runs/quickstart --judge exact_match
python scripts/evaluate.py RUN --judge https://api.openai.com/v1 --judge_model MODEL
python scripts/evaluate.py RUN --lm_eval open_llm_leaderboard        # the article's six tasks
python scripts/evaluate.py RUN --lm_eval my_task --include_path FOLDER_OF_ITS_YAML
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from dpo.after.evaluate import Options, evaluate_run
from dpo.cli import run_script


def main() -> None:
    """Prints tables; writes every number to JSON files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--weights", help="final, best or checkpoint-N")
    add("--data_path", help="other pairs than the held-out ones: a file in any known format")
    add("--data_format", help="their format, as data.format in training")
    add("--prompts", type=int, help="held-out prompts to answer: for KL and judge")
    add("--max_new_tokens", type=int, help="longest answer; the run's train.eval_max_new_tokens")
    add("--temperature", type=float, help="of the judged answers; 0 is greedy")
    add("--top_p", type=float, help="of the judged answers")
    add("--seed", type=int)
    add(
        "--judge", help="exact_match, MODULE:FUNCTION (prompt, policy, base, chosen -> 0..1) or URL"
    )
    add("--judge_model", help="model at that URL; its key comes from OPENAI_API_KEY")
    add("--lm_eval", help="open_llm_leaderboard, or names of lm-eval tasks, with commas")
    add("--include_path", type=Path, help="folder with the YAML of lm-eval tasks of your own")
    add("--limit", type=int, help="most documents of each lm-eval task, for a trial")
    add("--batch_size", type=int, help="answers written, or documents scored, at once")
    add("--output", type=Path, help="folder of the files; default: the run folder")
    parser.set_defaults(**asdict(Options()))
    options = vars(parser.parse_args())
    folder = options.pop("run")
    for text in evaluate_run(folder, Options(**options)):
        print(text, flush=True)


if __name__ == "__main__":
    run_script(main)
