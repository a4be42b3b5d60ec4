"""The reference's log-probs of every pair that a run will use, before it runs.

Training computes what is missing by itself. Ahead of it, the same can be done on other machines, or
once for many runs that start together: then none of them runs the reference on these pairs. If
interrupted, it continues where it stopped: what was computed is in the cache.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dpo.config import Config
from dpo.data.files import use_a_writable_cache
from dpo.data.loader import load_data
from dpo.data.order import Order, micro_batches
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.model.models import build_models
from dpo.model.named import load_tokenizer
from dpo.model.reference import Reference
from dpo.ranks import end_processes, main_first, sum_over_ranks
from dpo.train.budget import load_policy_to_fit, probe_pairs, settle_dtype
from dpo.train.launch import build_accelerator
from dpo.train.peers import watched

PAIRS_AT_ONCE = 256  # cut into micro-batches together


@watched()
def cache_reference(config: Config) -> str:
    """Fills `reference.cache` for this configuration; every rank computes its share.

    Returns:
        What was done, in words.

    Raises:
        UserError: the configuration has no cache, or no reference.
    """
    config.check()
    values = {"cache": config.reference.cache, "mode": config.reference_mode}
    if key := next((k for k, value in values.items() if value in ("off", "zero")), None):
        raise UserError(
            f"reference.{key}: got {values[key]}, so there is nothing to cache. Change it."
        )
    if not config.has_cache:
        raise UserError(
            "reference.cache: got auto, but nothing would be kept: the loss reads more of the "
            "reference than log-probs, or reference.update moves it. Train without this command."
        )
    accelerator = build_accelerator(config, [])
    for said in use_a_writable_cache(Path(config.train.output_dir)):
        if accelerator.is_main_process:
            print(said, file=sys.stderr)
    tokenizer = load_tokenizer(config.model)
    data = main_first(accelerator, lambda: load_data(config, tokenizer))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    order = Order.of(config.train, len(data.train), ranks)
    settle_dtype(config, accelerator)
    policy = load_policy_to_fit(config, accelerator, probe_pairs(data.train, order))
    policy.model.eval()
    reference = build_models(policy, config, accelerator, will_train=False).reference
    parts = [
        (data.train, order.seen()[rank::ranks]),
        (data.held_out, np.arange(len(data.held_out))[rank::ranks]),
    ]
    bar = tqdm(
        total=sum(len(indices) for _, indices in parts),
        unit="pair",
        desc="reference",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    try:
        for pairs, indices in parts:
            for start in range(0, len(indices), PAIRS_AT_ONCE):
                some = [*pairs.select(indices[start : start + PAIRS_AT_ONCE])]
                _compute(some, reference, config.train.scoring_tokens, accelerator.device)
                bar.update(len(some))
    finally:
        reference.flush()  # if stopped half-way, it keeps what it has
        bar.close()
    counts = torch.tensor([reference.num_computed, reference.num_found], device=accelerator.device)
    computed, found = sum_over_ranks(accelerator, counts).tolist()
    assert reference.store
    if reference.store.problem:
        raise UserError(f"{reference.store.problem}. Free some space, and start again.")
    end_processes(accelerator)
    return f"{computed} pairs computed, {found} were there: {reference.store.folder}"


def _compute(
    pairs: list[TokenizedPair], reference: Reference, budget: int, device: torch.device
) -> None:
    """Computes those of the pairs that the cache lacks, and puts them into it."""
    assert reference.store
    missing = [pair for pair in pairs if pair not in reference.store]
    reference.num_found += len(pairs) - len(missing)
    if missing:
        for positions in micro_batches([pair.num_stream_tokens for pair in missing], budget):
            reference(build_stream([missing[i] for i in positions]).to(device))
        reference.settle()
