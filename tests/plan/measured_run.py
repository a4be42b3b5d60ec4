"""Two steps in a process of their own, which prints by how many bytes its memory grew at most."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from dpo.cli import parse
from dpo.config import Config
from dpo.data.stream import build_stream
from dpo.model.load import Policy, load_policy
from dpo.model.reference import build_reference, choose_mode
from dpo.model.scorer import Scorer
from dpo.plan.plan import given_lengths
from dpo.train.optim import build_optimizer


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (at most), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(config: Config, lengths: str, steps: int) -> Policy:
    """Loads and trains on one pair of these lengths, again and again."""
    policy = load_policy(config, "cpu")
    for weight in policy.model.parameters():
        weight.sum()  # the file is mapped: what was never read would not count
    scorer = Scorer(policy.model, config.model.attention)
    mode = choose_mode(config.reference.mode, policy)
    reference = build_reference(mode, policy, scorer, scorer.layout)
    optimizer = build_optimizer(policy.model, config.optim)
    (pair,) = given_lengths(lengths).pairs
    assert isinstance(config.train.tokens_per_microbatch, int)
    count = config.train.tokens_per_microbatch // pair.num_stream_tokens
    # The first tokens differ, so that the pairs share nothing.
    prompts = ([n % 50, *pair.prompt_ids[1:]] for n in range(count))
    stream = build_stream([replace(pair, prompt_ids=prompt) for prompt in prompts])
    for _ in range(steps):
        logps = scorer(stream)
        (logps - reference(stream)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the trainer keeps them too
    return policy


def main() -> None:
    """Arguments: a tiny model, whose run imports and starts everything; lengths; train's flags."""
    torch.set_num_threads(1)
    warm_up, lengths, *flags = sys.argv[1:]
    config = parse(flags)
    small = parse([*flags, "--model.name_or_path", warm_up])
    run(small, "5,5,5", steps=1)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident("VmRSS")
    run(config, lengths, steps=2)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
