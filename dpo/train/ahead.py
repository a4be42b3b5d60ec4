"""The reference's log-probs of every pair that a run will use, before it runs.

Training computes what is missing by itself. Ahead of it, the same can be done on other machines, or
once for many runs that start together: then none of them runs the reference on these pairs.
Interrupted, it goes on where it stopped: what was computed is in the cache.
"""

import numpy as np
import torch
from tqdm import tqdm

from dpo.config import Config
from dpo.data.loader import load_data, micro_batches, step_indices
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.model.fingerprint import reference_digest
from dpo.model.load import load_policy, load_tokenizer
from dpo.model.reference import AdapterOff, Cached, Frozen, choose_mode, open_cache
from dpo.model.scorer import Scorer
from dpo.train.launch import build_accelerator, on_main
from dpo.train.trainer import step_counts

PAIRS_AT_ONCE = 256  # cut into micro-batches together


def cache_reference(config: Config) -> str:
    """Fills `reference.cache` for this configuration; every rank computes its share.

    Returns:
        What was done, in words.

    Raises:
        UserError: the configuration has no cache, or no reference.
    """
    config.check()
    if config.reference.cache == "off" or config.reference.mode == "zero":
        key = "cache" if config.reference.cache == "off" else "mode"
        raise UserError(
            f"reference.{key}: got {getattr(config.reference, key)}, so there is nothing to cache. "
            "Change it."
        )
    accelerator = build_accelerator(config, [])
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():
        data = load_data(config, tokenizer)
    policy = load_policy(config, accelerator.device)
    policy.model.eval()
    scorer = Scorer(policy.model, config.model.attention)
    is_adapter = choose_mode(config.reference.mode, policy) == "adapter"
    # Nothing trains here: the policy is the reference, once its adapter is off.
    live = AdapterOff(scorer, policy) if is_adapter else Frozen(policy.model, scorer.layout)
    kind = {"layout": scorer.layout, "device_type": accelerator.device.type}
    digest = on_main(accelerator, lambda: reference_digest(config.model, **kind))
    cached = Cached(live, open_cache(config.reference.cache, digest))

    rank, ranks = accelerator.process_index, accelerator.num_processes
    parts = [
        (data.train, used_indices(config, len(data.train), ranks)[rank::ranks]),
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
                _compute(some, cached, config.train.scoring_tokens, accelerator.device)
                bar.update(len(some))
    finally:
        cached.flush()  # stopped half-way, it keeps what it has
        bar.close()
    counts = torch.tensor([cached.num_computed, cached.num_found], device=accelerator.device)
    computed, found = accelerator.reduce(counts, reduction="sum").tolist()  # type: ignore[union-attr]
    accelerator.end_training()
    return f"{computed} pairs computed, {found} were there: {cached.store.folder}"


def _compute(pairs: list[TokenizedPair], cached: Cached, budget: int, device: torch.device) -> None:
    """Puts those of the pairs into the cache that are not there."""
    missing = [pair for pair in pairs if cached.store.get(pair) is None]
    cached.num_found += len(pairs) - len(missing)
    if missing:
        for positions in micro_batches([pair.num_stream_tokens for pair in missing], budget):
            cached(build_stream([missing[i] for i in positions]).to(device))
        cached.settle()


def used_indices(config: Config, num_pairs: int, num_processes: int) -> np.ndarray:
    """Of the training pairs, those that a run on as many processes sees in all its steps."""
    pairs_per_step, num_steps = step_counts(config.train, num_pairs, num_processes)
    if num_steps * pairs_per_step >= num_pairs:
        return np.arange(num_pairs)
    steps = (
        step_indices(num_pairs, pairs_per_step, config.train.seed, step)
        for step in range(num_steps)
    )
    return np.sort(np.concatenate([*steps]))
