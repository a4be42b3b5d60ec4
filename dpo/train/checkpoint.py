"""Run folders and checkpoints: what is written, and how it is verified when it is read back.

A checkpoint is the trained weights (PEFT's or transformers' files), the optimizer, `state.json`.
The order of the pairs, the dropout and the learning rate are pure functions of the step and need no
state. A checkpoint is a sealed folder (`dpo.sealed`), complete before any older one is deleted; a
damaged one is passed over. Nothing is deleted that this trainer has not written.

Left out on purpose: Accelerate's `save_state`. It writes the whole base, does not load again with
NF4, and pickles its random states.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dpo import run_folder
from dpo.cli import load, save
from dpo.config import Config, absolute, as_saved
from dpo.data.loader import list_sources
from dpo.data.order import Order
from dpo.errors import UserError
from dpo.model.load import is_adapted, load_weights
from dpo.model.named import explained
from dpo.run_folder import (
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    read_lines,
    read_whole,
)
from dpo.sealed import damage, written_aside
from dpo.train.optim import load_moments
from dpo.train.tree import load_tree, save_tree

# They say when a run ends: with others, also a finished run goes on.
_END_KEYS = "train.max_steps train.num_train_epochs train.patience".split()
# May differ between a run and its continuation: they do not change what is computed.
_FREE_KEYS = (
    "train.output_dir train.resume train.report_to train.write_report "
    "train.save_steps train.save_total_limit "
    "train.logging_steps train.eval_steps train.eval_prompts train.eval_max_new_tokens "
    "train.eval_exact_match train.metric_for_best_model train.tokens_per_microbatch "
    "train.gradient_checkpointing train.peak_tflops train.deterministic train.device "
    "train.timeout_minutes train.on_nonfinite reference.cache data.template_date "
    # Their product with the number of ranks is compared instead, in _check_same_run.
    "train.per_device_train_batch_size train.gradient_accumulation_steps"
).split()


@dataclass(frozen=True)
class Identity:
    """What a run and its continuation must have in common, apart from the configuration.

    Attributes:
        pairs_per_step: on all ranks together.
        data: digest of the training pairs and their order.
        weights: digest of the model's files before training.
        reference_logps: token log-probs of a few pairs under the reference.
    """

    pairs_per_step: int
    data: str
    weights: str
    reference_logps: list[float]


def find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint that `train.resume` means, None for a fresh start; it locks an old run.

    Also says which newer checkpoints were passed over, and why.

    Raises:
        UserError: the folder is not a run's or another run writes into it, the run is finished and
            has no new end or no checkpoint, none of its checkpoints is whole, or the
            configuration changed.
    """
    folder = Path(config.train.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"train.output_dir: got {folder}, but {existing} is no folder that can be written to. "
            "Name another."
        )
    _lock_old_run(folder)
    checkpoint, passed_over = _named_checkpoint(config, folder)
    if checkpoint is None or checkpoint.resolve().parent != folder.resolve():
        _check_put_aside(config, folder)
    if checkpoint:
        _check_same_config(config, checkpoint)
    return checkpoint, passed_over


def _named_checkpoint(config: Config, folder: Path) -> tuple[Path | None, list[str]]:
    resume = config.train.resume
    if resume == "never":
        return None, []
    if resume == "auto":
        found = list_checkpoints(folder)
        if (folder / run_folder.SUMMARY).exists():
            _check_finished(config, folder, has_checkpoint=any(map(is_checkpoint, found)))
        return _newest_whole(found)
    if not (Path(resume) / "state.json").exists():
        raise UserError(
            f"train.resume: got {resume!r}, wanted auto, never, or a checkpoint folder (with a "
            "state.json)."
        )
    if found := damage(Path(resume)):
        raise UserError(
            f"train.resume: {found}: the checkpoint cannot be trusted. Name another, or set "
            "train.resume to auto, which takes the newest whole one."
        )
    return Path(resume), []


def _newest_whole(checkpoints: list[Path]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole; and why newer ones were passed over, in words.

    Raises:
        UserError: there are some, and all are damaged.
    """
    passed_over = []
    for checkpoint in reversed(checkpoints):
        found = damage(checkpoint)
        if not found:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name} was passed over: {found}")
    if any(map(is_checkpoint, checkpoints)):
        raise UserError(
            f"train.resume: no checkpoint in {checkpoints[0].parent} is whole: "
            f"{'; '.join(passed_over)}. Restore one, or set train.resume to never: the old run is "
            "then put aside."
        )
    return None, passed_over


def is_checkpoint(folder: Path) -> bool:
    """Whether this trainer wrote the folder, damaged or not: others are never deleted."""
    return (folder / "state.json").exists() and not folder.is_symlink()


def _lock_old_run(folder: Path) -> None:
    """Locks the folder of an old run; a folder that holds anything else is refused."""
    found = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    if found == [run_folder.DATA_REPORT]:  # of rows that were refused
        return
    if found and not run_folder.is_run(folder):
        raise UserError(
            f"train.output_dir: got {folder}, which holds {', '.join(found[:5])} and is no run's "
            "folder. Name a new or an empty one."
        )
    if found:
        run_folder.lock(folder)


def _check_put_aside(config: Config, folder: Path) -> None:
    """Refuses to rename a folder that this run needs where it is."""
    data = config.data
    sources = [*list_sources(data), *([data.eval_source] if data.eval_source else [])]
    needed = [Path(config.model.path), *(Path(s.location) for s in sources), Path.cwd()]
    for path in needed if run_folder.is_run(folder) else ():
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"train.output_dir: the old run in {folder} would be put aside, and {path} with "
                "it. Name another folder."
            )


def check_end(config: Config, checkpoint: Path, order: Order) -> int:
    """How many steps the run of the checkpoint was to have; `order` is that of the run now.

    Raises:
        UserError: the run has taken as many steps as it is to have now, or more.
    """
    folder, done = checkpoint.parent, _step_of(checkpoint)
    saved = load(checkpoint / run_folder.CONFIG).train
    ends = {key: getattr(saved, key) for key in ("max_steps", "num_train_epochs")}
    planned = replace(config.train, **ends).num_steps(order.steps_per_epoch)
    is_finished = config.train.resume == "auto" and (folder / run_folder.SUMMARY).exists()
    if is_finished:
        done = read_lines(folder / run_folder.METRICS, ends=True)[-1]["step"]
    if order.num_steps <= done and (is_finished or order.num_steps != planned):
        raise UserError(
            f"train.max_steps: the run is to end after step {order.num_steps}, but {folder} has "
            f"taken {done}. Raise it (or train.num_train_epochs), or set train.resume to never: "
            "the old run is then put aside."
        )
    return planned


def prepare_run_folder(folder: Path, checkpoint: Path | None) -> None:
    """Makes the run folder, or takes over the one that the checkpoint is in.

    Another run in that folder is renamed to `NAME.old-1` and so on, and so is what `dpo evaluate`
    measured before a run goes on; only checkpoints of steps that are taken again are deleted. A
    checkpoint of another folder brings along what was logged before it.
    """
    is_here = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if run_folder.is_run(folder) and not is_here:
        _put_aside(folder.resolve())  # a link stays, and leads to the new folder
    folder.resolve().mkdir(parents=True, exist_ok=True)
    run_folder.lock(folder)
    (folder / run_folder.SUMMARY).unlink(missing_ok=True)  # it says that the run is finished
    if checkpoint and is_here:
        for later in filter(is_checkpoint, list_checkpoints(folder)):
            if (checkpoint_step(later) or 0) > _step_of(checkpoint):
                shutil.rmtree(later)
        for name in (*run_folder.MEASURED.values(), run_folder.JUDGED):
            if (folder / name).exists():
                _put_aside(folder / name)
    elif checkpoint:
        for name in run_folder.LOGS:
            if (checkpoint.parent / name).exists():
                shutil.copy(checkpoint.parent / name, folder / name)
        if (checkpoint.parent / run_folder.BEST).exists():
            shutil.copytree(checkpoint.parent / run_folder.BEST, folder / run_folder.BEST)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    identity: Identity,
    state: dict[str, Any],
    reference: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes `checkpoint-{step}`, then deletes the oldest; one process calls it.

    `reference`: the weights of a reference that moves.

    Raises:
        OSError: it cannot be written; the older ones are as they were.
    """
    checkpoint = folder / checkpoint_name(step)
    if os.path.lexists(checkpoint) and not is_checkpoint(checkpoint):
        _put_aside(checkpoint)
    with written_aside(checkpoint) as files:
        save_weights(model, files)
        with _disk_errors():
            save_tree(optimizer.state_dict(), files / "optimizer")
            if reference is not None:
                save_tree(reference, files / "reference")
        (files / "state.json").write_text(json.dumps({"step": step, **asdict(identity), **state}))
        save(config, files / run_folder.CONFIG)
    written = [*filter(is_checkpoint, list_checkpoints(folder))]
    for old in written[: -config.train.save_total_limit]:
        shutil.rmtree(old)
    return checkpoint


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity
) -> dict[str, Any]:
    """Restores weights and optimizer; returns the saved state.

    Raises:
        UserError: it is not the same run: what `identity` holds has changed since.
    """
    state = read_whole(checkpoint / "state.json", {})
    for name in ("step", "skipped", "misses", "evaluated_at"):
        if not isinstance(state.get(name, 0), int):
            raise TypeError(f"{name} is {state[name]!r}")
    _check_same_run(checkpoint, state, identity)
    load_weights(checkpoint, model)
    pickled = checkpoint / "optimizer.pt"  # of versions up to 0.4.0
    if pickled.exists():
        saved = torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        saved = load_tree(checkpoint / "optimizer")
    load_moments(optimizer, saved)
    return state


def load_reference(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that the reference had moved to."""
    return load_tree(checkpoint / "reference")


def explained_state(checkpoint: Path | None) -> AbstractContextManager[None]:
    """Inside, what is wrong with the contents of a checkpoint whose sums are right is one message.

    Such a one was written by others: sums protect from damage, not from strangers.
    """
    remedy = "Take another checkpoint, or set train.resume to never."
    problem = f"train.resume: {checkpoint} cannot be read"
    return explained(problem, remedy) if checkpoint else nullcontext()


def _check_same_run(checkpoint: Path, state: dict[str, Any], now: Identity) -> None:
    if "weights" not in state:
        raise UserError(
            f"train.resume: {checkpoint} is of a version before 0.3.0, which kept no digest "
            "of the reference. Set train.resume to never."
        )
    if state["pairs_per_step"] != now.pairs_per_step:
        raise UserError(
            f"train.resume: {checkpoint} took {state['pairs_per_step']} pairs a step, now it "
            f"would be {now.pairs_per_step}. Set train.per_device_train_batch_size and "
            "train.gradient_accumulation_steps so that the product over devices is the same."
        )
    if state["data"] != now.data:
        raise UserError(
            f"train.resume: the pairs have changed since {checkpoint}: their tokens or their "
            "order differ. Restore the rows, or set train.resume to never."
        )
    both = zip(now.reference_logps, state["reference_logps"], strict=True)
    moved = max(abs(new - old) for new, old in both)
    if state["weights"] != now.weights or not moved <= 0.02:
        raise UserError(
            f"train.resume: the reference has changed since {checkpoint}: the files of the model "
            f"differ, or the log-prob of a token does (by {moved:.3g} nats). Restore the model at "
            "model.name_or_path, or set train.resume to never."
        )


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes the adapter in PEFT's format, or the whole model, and reads it back to compare.

    Raises:
        OSError: it cannot be written.
        RuntimeError: what is on the disk is not what was trained.
    """
    if is_adapted(model):
        import peft

        with _disk_errors():
            model.save_pretrained(  # type: ignore[operator]
                folder, selected_adapters=["default"], save_embedding_layers=False
            )
        (folder / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in
        live = peft.get_peft_model_state_dict(
            model, adapter_name="default", save_embedding_layers=False
        )
    else:
        with _disk_errors():
            model.save_pretrained(folder)  # type: ignore[operator]
        live = model.state_dict()
    written = {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    same = all(torch.equal(tensor, live[name].cpu()) for name, tensor in written.items())
    if not written or not same or len(written) < len(trained):
        raise RuntimeError(
            f"{folder}: read back {len(written)} tensors, wanted {len(trained)} or more, equal to "
            "those in memory. Check the disk."
        )


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Inside, what safetensors raises of a full disk becomes an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(0, str(error)) from None


def _check_finished(config: Config, folder: Path, *, has_checkpoint: bool) -> None:
    if not _changed(config, folder / run_folder.CONFIG).keys() & _END_KEYS:
        raise UserError(
            f"train.output_dir: {folder} holds a finished run. Raise train.max_steps (or "
            "train.num_train_epochs) to train it further, name another folder, or set "
            "train.resume to never: the old run is then put aside."
        )
    if not has_checkpoint:
        raise UserError(
            f"train.output_dir: {folder} holds a finished run without a checkpoint, so it cannot "
            "go on: its optimizer was not kept. Set train.save_steps, and train.resume to never, "
            "to take all steps again. Or start a new run in another folder from its weights, with "
            f"model.name_or_path {folder / run_folder.FINAL}: they are then the reference as well."
        )


def _check_same_config(config: Config, checkpoint: Path) -> None:
    changed = _changed(config, checkpoint / run_folder.CONFIG)
    listed = [said for key, said in changed.items() if key not in (*_FREE_KEYS, *_END_KEYS)]
    if listed:
        raise UserError(
            f"train.resume: {checkpoint} was trained with another configuration: "
            f"{', '.join(listed)}. Set it back, or set train.resume to never: the old run is then "
            "put aside."
        )


def _changed(config: Config, file: Path) -> dict[str, str]:
    """The keys that have another value than in a saved configuration, and both values in words.

    A `model.dtype` of auto means the saved one.
    """
    saved = read_whole(file, {}, yaml.safe_load)
    old, new = (
        {
            f"{section}.{key}": value
            for section, keys in nested.items()
            if isinstance(keys, dict)
            for key, value in keys.items()
        }
        for nested in (saved, as_saved(config))
    )
    return {
        key: f"{key} (was {old.get(key)!r}, is {value!r})"
        for key, value in new.items()
        if _moved(old.get(key)) != value and (key, value) != ("model.dtype", "auto")
    }


def _moved(value: Any) -> Any:
    """A saved value as it would be saved now: versions up to 0.4.0 kept relative paths."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    return absolute(value) if isinstance(value, str) else value


def _step_of(checkpoint: Path) -> int:
    step = read_whole(checkpoint / "state.json", {}).get("step")
    if not isinstance(step, int):
        raise UserError(
            f"train.resume: {checkpoint}/state.json has step {step!r}, wanted a number. Take "
            "another checkpoint, or set train.resume to never."
        )
    return step


def _put_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
