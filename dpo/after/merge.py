"""Merges a finished run: scores the policy, merges, scores again, writes, and reads back.

The measure is the log-prob of every answer token, under the trained policy and under the merge. A
machine that holds the model once is enough: the policy is scored and freed before a base is
loaded, each merge before the next, and the last one before it is read back from the disk.
"""

import gc
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import run_folder
from dpo.after.card import write_run_card
from dpo.after.finished import FinishedRun, read_run
from dpo.after.merge_error import (
    HEADER,
    LayerProbe,
    MergeError,
    Scores,
    allowed,
    jitter,
    measure,
    probe_layers,
    score,
    wrong_layers,
)
from dpo.after.merged import cast, load_adapter, load_merge_base, merge_adapter, save_model
from dpo.after.push import write_record
from dpo.config import Config, ModelConfig
from dpo.data.chat import stop_ids
from dpo.data.stream import TokenizedPair
from dpo.data.templates import choose_template, template_to_save
from dpo.errors import UserError
from dpo.model.load import load_base
from dpo.model.named import stored_quantization
from dpo.model.scorer import Scorer

_INT8_EPSILON = 2 / 127  # LLM.int8 rounds activations to 1/127 of a token's largest


@dataclass(frozen=True)
class Trained:
    """What is kept of the trained policy: its scores and what they were made from, no weights.

    Attributes:
        config: the run's.
        weights: folder of the trained weights.
        tokenizer: the run's.
        pairs: the scored pairs; `pairs_are` describes them.
        dtype: the type of the weights that are not quantised.
        device: where models are scored.
        layout: the scorer's, the same for every model.
        policy: scores with the adapter.
        bare: scores of the same model without any adapter; None if every weight was trained.
    """

    config: Config
    weights: Path
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[TokenizedPair]
    pairs_are: str
    dtype: torch.dtype
    device: torch.device
    layout: Literal["shared", "padded"]
    policy: Scores
    bare: Scores | None

    @property
    def template(self) -> str | None:
        """The chat template that the run rendered its rows with."""
        return choose_template(self.tokenizer, self.config.data)

    def score(self, model: nn.Module) -> Scores:
        """Scores another model on the same pairs, in the same way."""
        scorer = Scorer(model, attention=self.layout)
        return score(scorer, self.pairs, self.config.train.scoring_tokens)

    def epsilon(self, dtype: torch.dtype) -> float:
        """The largest machine epsilon of the run's types and of a merge of type `dtype`."""
        epsilons = [torch.finfo(kind).eps for kind in (self.dtype, dtype)]
        if self.config.model.quantization == "int8":
            epsilons.append(_INT8_EPSILON)
        return max(epsilons)

    def refusal(self, error: MergeError, rounding: float, base: Scores | None) -> str:
        """Why a merge with that error is not the trained policy; "" if it is."""
        effect = self.policy.apart(self.bare) if self.bare else 0.0
        apart = base.apart(self.bare) if base and self.bare else 0.0
        at_most = allowed(rounding, effect, apart)
        if error.mean <= at_most:  # nan is wrong too
            return ""
        return (
            f"the merged model is {error.mean:.3g} nats per token off the trained policy, wanted "
            f"at most {at_most:.3g}: rounding moves it by {rounding:.3g}, the adapter by "
            f"{effect:.3g}"
        )


def merge_run(
    folder: Path,
    output: Path,
    *,
    weights: str = run_folder.FINAL,
    base: str = "auto",
    dtype: str = "auto",
    num_pairs: int = 64,
    max_shard_size: str = "5GB",
    unverified: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Merges a run's adapter and writes the standalone model, verified.

    Args:
        folder: the run folder.
        output: where the model goes; it must not exist, and is made only after verification.
        weights: `final`, `best` or `checkpoint-N`.
        base: `dequantized` or `16bit`, for a quantised run; auto takes the first.
        dtype: the type of the merged weights; auto takes the run's.
        num_pairs: how many pairs are scored.
        max_shard_size: the largest size of a safetensors file.
        unverified: keep a merge that is not the trained policy, marked so in its card and record.
        say: is called with each line of the account.

    Raises:
        UserError: no such run or weights, an output that exists, a base that the run does not
            have; or the merged model is not the trained policy, and nothing of it is left.
    """
    bases = choose_bases(read_run(folder), base)
    check_options(output, num_pairs, max_shard_size)
    trained = score_trained(folder, weights, num_pairs)
    merged_dtype = trained.dtype if dtype == "auto" else getattr(torch, dtype)
    say(_introduction(trained, merged_dtype))
    errors: dict[str, MergeError] = {}
    for which in reversed(bases):  # the one that is written comes last
        model = None
        gc.collect()  # models contain reference cycles, the trained policy's among them
        model, probes, base_scores = build_merged(trained, which, merged_dtype)
        errors[which] = measure(trained.policy, trained.bare, trained.score(model), base_scores)
        say(errors[which].row(which))
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as aside:
        unfinished = Path(aside) / run_folder.MERGED
        _save(trained, model, unfinished, max_shard_size)
        del model
        gc.collect()
        saved = _load_saved(trained, unfinished)
        scores = trained.score(saved)
        error = errors["read back"] = measure(trained.policy, trained.bare, scores, base_scores)
        say(error.row("read back"))
        wrong = wrong_layers(saved, probes)
        jitter(saved, trained.epsilon(merged_dtype))
        rounding = trained.score(saved).apart(scores)
        say(f"Rounding alone moves the merged model by {rounding:.2g} nats each, on average.")
        refused = trained.refusal(error, rounding, base_scores)
        same = 1.05 * errors[bases[0]].mean + 1e-5  # a device may add in another order
        if not error.mean <= same:
            refused = "the files on the disk do not read back as the merge"
        if wrong:
            refused = f"{len(wrong)} of {len(probes)} layers are wrong: {'; '.join(wrong[:3])}"
        if refused and not unverified:
            raise UserError(
                f"merge: {refused}. Nothing was written. Take --dtype float32, or keep it with "
                "--unverified, which marks it so."
            )
        how = {"base": bases[0], "dtype": _name(merged_dtype), "refused": refused}
        _describe(trained, unfinished, errors, rounding, **how)
        os.rename(unfinished, output)
    is_right = f"NOT verified: {refused}" if refused else "verified"
    say(f"The merged model is in {output} ({bases[0]} base, {_name(merged_dtype)}), {is_right}.")


def choose_bases(config: Config, base: str) -> list[str]:
    """The bases that are merged into and measured; the first is the one that is written.

    Raises:
        UserError: a choice of base for a run that has only one.
    """
    model = config.model
    if model.quantization == "none":
        if base != "auto":
            raise UserError(
                f"--base: got {base}, but model.quantization of this run was none: there is one "
                "base. Leave --base out."
            )
        return ["trained" if model.adapter == "none" else "original"]
    if stored := stored_quantization(model):
        if base == "16bit":
            raise UserError(
                f"--base: got 16bit, but the checkpoint of this run is stored in {stored}: there "
                "is no base in 16 bits. Leave --base out."
            )
        return ["dequantized"]
    return ["16bit", "dequantized"] if base == "16bit" else ["dequantized", "16bit"]


def check_options(output: Path, num_pairs: int, max_shard_size: str) -> None:
    """Refuses, before any work, options that would fail at its end.

    Raises:
        UserError: the output exists or cannot be made, or a number makes no sense.
    """
    if num_pairs < 1:
        raise UserError(f"--pairs: got {num_pairs}, wanted at least 1: the merge is verified.")
    if not re.fullmatch(r"\d+(KB|MB|GB)", max_shard_size):
        raise UserError(f"--max_shard_size: got {max_shard_size!r}, wanted a size such as 5GB.")
    if output.exists():
        raise UserError(
            f"--output: {output} exists, and nothing is overwritten. Name another folder, or move "
            "it away. (To push what an earlier merge wrote there, give --push_to_hub.)"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(
            f"--output: {output.parent} cannot be written to ({error.strerror}). Name another "
            "folder."
        ) from None


def score_trained(folder: Path, weights: str, num_pairs: int) -> Trained:
    """Scores the trained policy, whose weights are freed afterwards."""
    run = FinishedRun(folder, weights)
    pairs, kind = run.some_pairs(num_pairs)
    model, budget, bare = run.policy.model, run.config.train.scoring_tokens, None
    if run.policy.is_adapted:
        with model.disable_adapter():  # type: ignore[operator]
            bare = score(run.scorer, pairs, budget)
    return Trained(
        config=run.config,
        weights=run.weights,
        tokenizer=run.tokenizer,
        pairs=pairs,
        pairs_are=f"{len(pairs)} {kind} pairs",
        dtype=model.get_input_embeddings().weight.dtype,  # type: ignore[operator]
        device=run.device,
        layout=run.scorer.layout,
        policy=score(run.scorer, pairs, budget),
        bare=bare,
    )


def build_merged(
    trained: Trained, which: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, LayerProbe], Scores | None]:
    """The merged model, freshly loaded, in eval mode; what its layers must do; its base's scores.

    The scores are those of a base that differs from the trained one; else None.
    """
    if which == "trained":  # every weight: there is no adapter to merge
        model = _load_saved(trained, trained.weights)
        cast(model, trained.dtype, dtype)
        return model, {}, None
    base = load_merge_base(trained.config, which, dtype, trained.device).eval()
    scores = trained.score(base) if which == "16bit" else None
    adapted = load_adapter(base, trained.weights)
    probes = probe_layers(adapted)
    base = adapted.unload().eval()  # type: ignore[operator]
    return merge_adapter(base, trained.weights, dtype), probes, scores


def _save(trained: Trained, model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    save_model(
        model,
        trained.tokenizer,
        folder,
        source=trained.config.model,
        template=template_to_save(trained.tokenizer, trained.config.data),
        stops=stop_ids(model, trained.tokenizer, trained.template),
        max_shard_size=max_shard_size,
    )


def _describe(
    trained: Trained,
    folder: Path,
    errors: dict[str, MergeError],
    rounding: float,
    *,
    base: str,
    dtype: str,
    refused: str,
) -> None:
    write_run_card(
        folder,
        trained.weights.parent,
        trained.config,
        weights=trained.weights.name,
        base=base,
        dtype=dtype,
        errors=errors,
        rounding=rounding,
        refused=refused,
        pairs_are=trained.pairs_are,
        has_chat=trained.template is not None,
    )
    as_dicts = {name: asdict(error) for name, error in errors.items()}
    measured = {"errors_nats": as_dicts, "rounding_nats": rounding, "refused": refused}
    write_record(folder, trained.weights, base, dtype, measured)


def _load_saved(trained: Trained, folder: Path) -> PreTrainedModel:
    """Loads a whole model as a user would: in the type that its files name."""
    saved = ModelConfig(
        name_or_path=str(folder),
        dtype="auto",
        quantization="none",
        trust_remote_code=trained.config.model.trust_remote_code,
    )
    return load_base(saved, trained.device).eval()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _introduction(trained: Trained, dtype: torch.dtype) -> str:
    quantization = trained.config.model.quantization
    on = "" if quantization == "none" else f" on a base in {quantization}"
    lines = [
        f"{trained.weights}: trained in {_name(trained.dtype)}{on}. Scored by the trained policy: "
        f"{trained.pairs_are}, {len(trained.policy.tokens)} answer tokens."
    ]
    if trained.bare:
        effect = trained.policy.apart(trained.bare)
        lines.append(f"The adapter moves their log-probs by {effect:.2g} nats each, on average.")
        lines.append(f"Distance from the trained policy, merged in {_name(dtype)}, in nats:")
    else:
        lines.append("Every weight was trained: there is no adapter to merge.")
        lines.append(f"Distance from the trained policy, in {_name(dtype)}, in nats:")
    return "\n".join([*lines, HEADER])
