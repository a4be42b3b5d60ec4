r"""Answers prompts with the model before and after training, side by side, from one loaded model.

python scripts/generate.py runs/quickstart "Which of these words is the last one: hat, bell?"
python scripts/generate.py RUN "What is a Large Language Model?" \
        --system "You are a helpful assistant chatbot." --temperature 0.7 --top_p 0.9
"""

import argparse
from pathlib import Path

from dpo.config import run
from dpo.show.samples import answer_side_by_side


def main() -> None:
    """Prints both answers to every prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("prompts", nargs="+", help="what the user says, one answer each")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    folder, prompts, system = (options.pop(name) for name in ("run", "prompts", "system"))
    opening = [{"role": "system", "content": system}] if system else []
    conversations = [[*opening, {"role": "user", "content": prompt}] for prompt in prompts]
    for prompt, (before, after) in zip(
        prompts, answer_side_by_side(folder, conversations, **options), strict=True
    ):
        print(f"{prompt}\n  before: {before}\n  after:  {after}\n")


if __name__ == "__main__":
    run(main)
