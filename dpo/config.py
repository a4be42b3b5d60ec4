"""The configuration: a dataclass per section, a sentence per field, checked before weights load.

The defaults are those of the NeuralHermes article. `dpo.cli` reads files and flags. The losses are
imported where they are asked for, so that `--help` and a misspelt flag do not wait for torch.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from dpo.errors import UserError

if TYPE_CHECKING:
    from dpo.objective import Objective, Part

PACKAGE = Path(__file__).parent


def _located(name: str) -> str:
    """Resolves `quickstart/...` to what ships with the package; any other path or id is kept."""
    if name.startswith("quickstart/") and not Path(name).exists():
        return str(PACKAGE / name)
    return name


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class ModelConfig:
    """The policy, as it is before training."""

    name_or_path: str = "teknium/OpenHermes-2.5-Mistral-7B"
    """Hub id or folder of the model; a PEFT folder starts from its adapter."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Dtype = "bfloat16"
    """Type of weights and computation; auto: the checkpoint's, or float32 on a CPU faster at it."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "fp4"
    """How bitsandbytes stores the frozen base; fp4 is what load_in_4bit alone means."""
    dequantize_base: bool | Literal["auto"] = "auto"
    """Dequantise a 4-bit base once, before training: same numbers, faster; auto: if it fits."""
    adapter: Literal["lora", "none"] = "lora"
    """lora trains an adapter, none trains every weight."""
    attention: Literal["auto", "shared", "padded"] = "auto"
    """shared computes each prompt once, padded gives every answer a row; auto chooses."""
    lean_layers: bool = True
    """Keep less of each layer for the backward, where its kind is known (dpo.model.lean)."""
    compile: bool = False
    """torch.compile each layer's operations between products and attention; needs a compiler."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    allow_pickle: bool = False
    """Read weights that are no safetensors; torch's restricted reader runs no code of theirs."""

    @property
    def path(self) -> str:
        """`name_or_path`, with `quickstart/...` resolved."""
        return _located(self.name_or_path)


@dataclass(kw_only=True)
class LoraConfig:
    """The adapter (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

    r: int = 16
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r, or by alpha / sqrt(r) with use_rslora."""
    dropout: float = 0.05
    """Dropout on the adapter's input while training; the reference never has any."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter; all-linear takes all but the head."""
    init: str | bool = True
    """PEFT's init_lora_weights; true starts from a zero update."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """Train magnitudes and directions separately (DoRA)."""


@dataclass(kw_only=True)
class DataSource:
    """One of several sources."""

    path: str
    """Hub id, file or folder."""
    weight: float = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.5 is a random half of the rows."""
    format: str = "auto"
    """As data.format, for this source."""
    split: str = "train"
    """As data.split, for this source."""

    @property
    def location(self) -> str:
        """`path`, with `quickstart/...` resolved."""
        return _located(self.path)


@dataclass(kw_only=True)
class DataConfig:
    """The preference pairs."""

    name_or_path: str | list[DataSource] = "Intel/orca_dpo_pairs"
    """Hub id, .jsonl(.gz), .json, .parquet, or saved datasets folder; or a list of sources."""
    subset: str | None = None
    """Name of the hub data set's configuration."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str = "train"
    """Split to train on."""
    format: str = "auto"
    """Shape of the rows, a name of dpo.data.formats.FORMATS; auto recognises it."""
    ignored_columns: list[str] = field(default_factory=list[str])
    """Columns that are no part of a row although their names may be those of one."""
    max_dropped: float = 0.1
    """Largest share of the rows that may be dropped for one reason; overlong ones do not count."""
    eval_fraction: float = 0.0
    """Share of the prompts that is held out for evaluation; 0 evaluates nothing."""
    eval_path: str | None = None
    """Hub id, file or folder of held-out pairs, instead of eval_fraction."""
    eval_split: str = "train"
    """Split of eval_path."""
    max_prompt_length: int = 1024
    """Tokens; a longer prompt is cut as data.truncation says."""
    max_length: int = 1536
    """Tokens of prompt and one answer; a longer answer loses its end."""
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a pair that is too long."""
    truncation: Literal["frame", "left"] = "frame"
    """What a long prompt loses: frame, the beginning of its first user message; left, its own."""
    chat_template: str = "auto"
    """auto: the tokenizer's, or ChatML if it has none; chatml; none: refuse messages; or a file."""
    template_date: str | None = None
    """Day of a template that asks for today's, as 2026-01-31; null: that of the run's start."""
    template_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """For the template, e.g. {enable_thinking: false}; a row's chat_template_kwargs win."""

    @property
    def eval_source(self) -> DataSource | None:
        """The source that `eval_path` names, if it is set."""
        if not self.eval_path:
            return None
        return DataSource(path=self.eval_path, format=self.format, split=self.eval_split)


@dataclass(kw_only=True)
class LossPart:
    """One of several losses that are added."""

    type: str
    """As loss.type: a name of dpo.losses.LOSSES, or MODULE:FUNCTION."""
    weight: float = 1.0
    """What it is multiplied by."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """As loss.options, for this loss; also a beta of its own."""


@dataclass(kw_only=True)
class LossConfig:
    """The loss, one of dpo.losses.LOSSES, one's own, or a weighted sum."""

    type: str | list[LossPart] = "sigmoid"
    """Name of the loss; MODULE:FUNCTION, on Python's path; or a list of losses that are added."""
    beta: float = 0.1
    """Strength of the pull towards the reference; scales the rewards."""
    label_smoothing: float = 0.0
    """Probability that a label is flipped, in [0, 0.5), of the losses that take it."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else the loss takes, by the name in its function, such as {temperature: 0.1}."""
    pair_weights: bool = False
    """Multiply the loss of each pair by its row's weight (column weight)."""
    ld_alpha: float = 1.0
    """Tokens beyond the shorter answer's length count so many times (length desensitising)."""

    @property
    def parts(self) -> "list[Part]":
        """Every loss with its weight and all of its keyword arguments."""
        from dpo.objective import Part, takes_smoothing

        given = self.type
        if isinstance(given, str):
            given = [LossPart(type=given, options=self.options)]
        smoothing = {"label_smoothing": self.label_smoothing}
        return [
            Part(
                part.type,
                part.weight,
                {
                    "beta": self.beta,
                    **(smoothing if takes_smoothing(part.type, self.label_smoothing) else {}),
                    **part.options,
                },
            )
            for part in given
        ]


@dataclass(kw_only=True)
class ReferenceConfig:
    """What the policy is compared with: itself, as it was at step 0."""

    mode: Literal["auto", "adapter", "frozen", "zero"] = "auto"
    """adapter: the base under it; frozen: a copy; zero: none; auto: adapter if there is one."""
    cache: str = "auto"
    """Where its log-probs are kept from run to run: auto (beside the tokens), off, or a folder."""
    update: Literal["never", "soft", "hard"] = "never"
    """TR-DPO: soft moves it a part of the way to the policy, hard all of it; needs cache off."""
    update_steps: int = 512
    """Steps between two moves."""
    update_alpha: float = 0.6
    """The part of the way of a soft move."""


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw"] = (
        "paged_adamw_32bit"
    )
    """adamw is PyTorch's, the others are bitsandbytes'."""
    learning_rate: float = 5e-5
    """The highest, reached at the end of the warm-up."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """cosine and linear fall to 0 at the last step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    warmup_ratio: float | None = None
    """Share of all steps over which it rises, in place of warmup_steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up of a run of so many."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)


@dataclass(kw_only=True)
class TrainConfig:
    """The run."""

    output_dir: str = "runs/dpo"
    """Run folder."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU if there is one, and an error if torch cannot use it; cpu: the CPU."""
    per_device_train_batch_size: int = 4
    """Pairs of a step, once multiplied by gradient_accumulation_steps and the number of devices."""
    gradient_accumulation_steps: int = 4
    """See per_device_train_batch_size: only the product matters."""
    max_steps: int = 200
    """Optimizer steps; -1 goes by num_train_epochs. A run that is given more later goes on."""
    num_train_epochs: int = 1
    """Passes over the data, when max_steps is -1."""
    tokens_per_microbatch: int | Literal["auto"] = "auto"
    """How many tokens go through the model at once; the result is the same. auto: what fits,
    on a CPU what is fastest of that."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward: less memory, a third more work."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device, for train/mfu; null: looked up for common GPUs."""
    seed: int = 42
    """Seed of the order of the pairs, of the adapter and of dropout."""
    deterministic: bool = False
    """Give every sum one order on a GPU, so that the same steps have the same bits; slower."""
    logging_steps: int = 1
    """Log means over this many steps; the first step is always logged alone."""
    eval_steps: int = 0
    """Steps between evaluations; 0: only before and after training."""
    eval_prompts: int = 0
    """How many held-out prompts the policy answers at each evaluation, for eval/kl and samples."""
    eval_max_new_tokens: int = 128
    """Longest answer to such a prompt."""
    eval_exact_match: bool = False
    """The chosen answer is the only right one: also log how often a greedy answer equals it."""
    save_steps: int = 0
    """Steps between checkpoints; 0: only final/ is written."""
    save_total_limit: int = 2
    """How many checkpoints are kept; the oldest are deleted."""
    metric_for_best_model: str | None = None
    """Name of an eval/ metric: the adapter with its best value is kept in best/."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better metric_for_best_model."""
    resume: str = "auto"
    """auto: continue the run in the folder; never: put an old run aside; or a checkpoint."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is infinite or no number; skip: ten times at most."""
    timeout_minutes: float = 30.0
    """How long processes wait for one that hangs, before they name it and stop."""
    report_to: str | list[str] = "tensorboard"
    """Trackers that Accelerate knows (tensorboard, wandb, ...), or none."""
    write_report: bool = True
    """Write report.html at the end: all of the run in one file for a browser."""

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps > 0 else self.num_train_epochs * steps_per_epoch

    @property
    def scoring_tokens(self) -> int:
        """Tokens of a micro-batch that needs no gradient, and so little memory."""
        return 8192 if self.tokens_per_microbatch == "auto" else self.tokens_per_microbatch


@dataclass(kw_only=True)
class Config:
    """All sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def reference_mode(self) -> str:
        """`reference.mode`; auto is zero where no loss reads a reference."""
        from dpo.objective import needs_reference

        if self.reference.mode == "auto" and not needs_reference(self.loss.parts):
            return "zero"
        return self.reference.mode

    def objective(self) -> "Objective":
        """What the run minimises.

        Raises:
            UserError: the loss and its options cannot be honoured.
        """
        from dpo.objective import checked_objective

        loss = self.loss
        return checked_objective(
            loss.parts, self.reference_mode, pair_weights=loss.pair_weights, ld_alpha=loss.ld_alpha
        )

    @property
    def rewards_per_token(self) -> bool:
        """Whether rewards are beta x the mean log-prob of a token, without a reference."""
        from dpo.objective import rewards_per_token

        return rewards_per_token(self.loss.parts, self.reference_mode)

    @property
    def rewards(self) -> str:
        """What the run's rewards are, in words."""
        if self.reference_mode == "zero":
            of = "mean log-probs of a token" if self.rewards_per_token else "log-probs"
            return f"beta times {of}, without a reference"
        moving = " to a reference that moves" if self.reference.update != "never" else ""
        return f"beta times log-ratios{moving}"

    @property
    def has_cache(self) -> bool:
        """Whether the reference's log-probs are kept; auto keeps none that would not be enough."""
        from dpo.objective import needs_live_reference

        is_enough = self.has_fixed_reference and not needs_live_reference(self.loss.parts)
        return self.reference.cache != "off" and is_enough

    @property
    def has_fixed_reference(self) -> bool:
        """Whether there is a reference, and it stays what the policy was at step 0."""
        return self.reference_mode != "zero" and self.reference.update == "never"

    note = ""  # what the command line chose by itself, for the run header; no key

    def check(self) -> None:
        """Refuses what cannot be honoured.

        Raises:
            UserError: naming the key, what it got and what it wants.
        """
        map_paths(self, _on_this_machine)
        _check_ranges(self)
        _check_loss(self.loss, self.reference_mode)
        self._check_reference()
        self._check_model()
        self._check_held_out()

    def _check_reference(self) -> None:
        from dpo.objective import is_own, needs_live_reference

        reference, is_set = self.reference, self.reference.cache not in ("auto", "off")
        if self.reference_mode == "zero" and is_set:
            refuse("reference.cache", reference.cache, "auto or off, since reference.mode is zero")
        if reference.update == "never":
            known = [part for part in self.loss.parts if not is_own(part.name)]
            if is_set and needs_live_reference(known):
                names = " and ".join(part.name for part in self.loss.parts)
                wanted = f"auto or off: of log-probs alone, {names} cannot be computed"
                refuse("reference.cache", reference.cache, wanted)
            return
        if self.reference_mode == "zero":
            refuse("reference.update", reference.update, "never, since reference.mode is zero")
        if is_set:
            wanted = "auto or off: what is kept of a reference that moves is soon another one's"
            refuse("reference.cache", reference.cache, wanted)
        if reference.update == "soft" and self.model.adapter == "lora":
            wanted = (
                "hard or never, since model.adapter is lora: to mix two adapters' A and B is not "
                "to mix the updates, which are their products"
            )
            refuse("reference.update", "soft", wanted)

    def _check_model(self) -> None:
        model, reference = self.model, self.reference
        if model.adapter == "none" and model.quantization != "none":
            refuse(
                "model.quantization",
                model.quantization,
                "none, since model.adapter is none and quantised weights cannot train",
            )
        if model.dequantize_base is True and model.quantization not in ("nf4", "fp4"):
            refuse(
                "model.dequantize_base",
                True,
                f"auto or false, since model.quantization is {model.quantization}, not 4-bit",
            )
        if model.adapter == "none" and reference.mode == "adapter":
            refuse("reference.mode", "adapter", "auto, frozen or zero, since there is no adapter")
        if model.adapter == "lora" and reference.mode == "frozen":
            refuse(
                "reference.mode",
                "frozen",
                "auto or adapter: with an adapter the frozen model is the base under it, for free",
            )
        if model.adapter == "none" and model.dtype == "float16":
            refuse(
                "model.dtype",
                "float16",
                "bfloat16 or float32, since model.adapter is none: AdamW's steps underflow in "
                "float16 weights",
            )
        if self.lora.init not in (True, "gaussian"):
            refuse(
                "lora.init",
                self.lora.init,
                "true or gaussian: with the others the base under the adapter, which is the "
                "reference, is not the model that training starts from",
            )
        if self.lora.use_dora and model.dtype not in ("float32", "auto"):  # see settle_dtype
            refuse(
                "lora.use_dora",
                True,
                f"false, since model.dtype is {model.dtype}: DoRA's norms round there, and the "
                "policy would not start as its reference; or model.dtype float32",
            )

    def _check_held_out(self) -> None:
        data, train = self.data, self.train
        if data.eval_split != "train" and not data.eval_path:
            refuse("data.eval_split", data.eval_split, "train, since there is no data.eval_path")
        if data.eval_path and data.eval_fraction:
            refuse("data.eval_fraction", data.eval_fraction, "0, since data.eval_path is set")
        try:
            date.fromisoformat(data.template_date or "2026-01-31")
        except ValueError:
            refuse("data.template_date", data.template_date, "null, or a day such as 2026-01-31")
        if data.max_prompt_length >= data.max_length:
            refuse(
                "data.max_prompt_length",
                data.max_prompt_length,
                f"less than data.max_length ({data.max_length}), to leave room for an answer",
            )
        if train.max_steps == 0 or train.max_steps < -1:
            refuse("train.max_steps", train.max_steps, "a positive number, or -1 for epochs")
        if train.metric_for_best_model and not (data.eval_path or data.eval_fraction):
            refuse(
                "train.metric_for_best_model",
                train.metric_for_best_model,
                "null, since nothing is held out: set data.eval_path or data.eval_fraction",
            )
        if train.metric_for_best_model not in (None, *BEST_METRICS):
            refuse(
                "train.metric_for_best_model",
                train.metric_for_best_model,
                f"null or one of {', '.join(BEST_METRICS)}",
            )
        still = ("eval/logps/chosen", "eval/exact_match")
        if self.reference.update != "never" and train.metric_for_best_model not in (None, *still):
            refuse(
                "train.metric_for_best_model",
                train.metric_for_best_model,
                f"null, {' or '.join(still)}: the others begin anew when reference.update moves "
                "the reference",
            )
        if train.metric_for_best_model == "eval/kl" and self.reference_mode == "zero":
            refuse("reference.mode", "zero", "another, since eval/kl chooses the best model")
        if train.metric_for_best_model == "eval/kl" and not train.eval_prompts:
            refuse("train.eval_prompts", 0, "at least 1, since eval/kl chooses the best model")
        if train.metric_for_best_model == "eval/exact_match" and not train.eval_exact_match:
            refuse("train.eval_exact_match", False, "true, since it chooses the best model")
        if train.eval_exact_match and not train.eval_prompts:
            refuse("train.eval_prompts", 0, "at least 1, since train.eval_exact_match is true")
        if train.patience and not train.metric_for_best_model:
            wanted = (
                f"one of {', '.join(BEST_METRICS)}, since train.patience waits for a better one"
            )
            refuse("train.metric_for_best_model", None, wanted)
        if train.patience and not train.eval_steps:
            refuse("train.eval_steps", 0, "at least 1, since train.patience counts evaluations")


# The metrics that can choose the best weights.
BEST_METRICS = (
    "eval/loss eval/kl eval/rewards/accuracies eval/rewards/margins eval/rewards/chosen "
    "eval/logps/chosen eval/exact_match"
).split()

# What a number must satisfy, in words and as a test; by key.
_POSITIVE: tuple[str, Callable[[Any], bool]] = ("a number above 0", lambda x: x > 0)
_NOT_NEGATIVE: tuple[str, Callable[[Any], bool]] = ("0 or more", lambda x: x >= 0)
_SHARE: tuple[str, Callable[[Any], bool]] = ("at least 0 and below 1", lambda x: 0 <= x < 1)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora.r": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "lora.dropout": _SHARE,
    "data.eval_fraction": _SHARE,
    "data.max_dropped": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "data.max_prompt_length": _POSITIVE,
    "loss.beta": _POSITIVE,
    "loss.label_smoothing": ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5),
    "loss.ld_alpha": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "reference.update_steps": _POSITIVE,
    "reference.update_alpha": ("above 0, up to 1", lambda x: 0 < x <= 1),
    "optim.learning_rate": _POSITIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.warmup_ratio": (
        "null, or at least 0 and below 1",
        lambda x: x is None or 0 <= x < 1,
    ),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.max_grad_norm": _NOT_NEGATIVE,
    "train.per_device_train_batch_size": _POSITIVE,
    "train.gradient_accumulation_steps": _POSITIVE,
    "train.num_train_epochs": _POSITIVE,
    "train.tokens_per_microbatch": ("auto or a number above 0", lambda x: x == "auto" or x > 0),
    "train.peak_tflops": ("a number above 0", lambda x: x is None or x > 0),
    "train.seed": ("from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32),  # numpy's
    "train.logging_steps": _POSITIVE,
    "train.eval_steps": _NOT_NEGATIVE,
    "train.eval_prompts": _NOT_NEGATIVE,
    "train.eval_max_new_tokens": _POSITIVE,
    "train.save_steps": _NOT_NEGATIVE,
    "train.save_total_limit": _POSITIVE,
    "train.timeout_minutes": _POSITIVE,
    "train.patience": ("null or a number above 0", lambda x: x is None or x > 0),
}


def refusal(key: str, got: object, wanted: str) -> str:
    """The message about a value that a key cannot have."""
    return f"{key}: got {got!r}, wanted {wanted}. Change it in the config or by --{key}."


def refuse(key: str, got: object, wanted: str) -> NoReturn:
    """Raises `refusal` as a UserError."""
    raise UserError(refusal(key, got, wanted))


def map_paths(config: Config, change: Callable[[str], str]) -> None:
    """Changes the value of every key that may hold a path, in place."""
    model, data, train = config.model, config.data, config.train
    model.name_or_path = change(model.name_or_path)
    if isinstance(data.name_or_path, str):
        data.name_or_path = change(data.name_or_path)
    else:
        for source in data.name_or_path:
            source.path = change(source.path)
    data.eval_path = data.eval_path and change(data.eval_path)
    data.chat_template = change(data.chat_template)
    config.reference.cache = change(config.reference.cache)
    train.output_dir, train.resume = change(train.output_dir), change(train.resume)


def _on_this_machine(path: str) -> str:
    if "\0" in path:
        raise UserError(f"{path!r}: got a path with a NUL in it. Correct it.")
    if "://" in path:
        shown = re.sub("//[^/]*@", "//***@", path)  # it may hold a password
        raise UserError(
            f"{shown}: got an address, wanted a path on this machine or, for a model or data, a "
            "hub id. Mount the store, or copy from and to it."
        )
    return path


def as_saved(config: Config) -> dict[str, Any]:
    """All keys, nested, as config.yaml holds them: local paths are absolute.

    So a run can be evaluated, merged and resumed from any working directory.
    """
    saved = copy.deepcopy(config)
    map_paths(saved, absolute)
    return asdict(saved)


def absolute(name: str) -> str:
    """The absolute path of what exists here; any other name, such as a hub id, is kept."""
    is_word = name in ("auto", "none", "off", "never", "chatml")
    return name if is_word or not Path(name).exists() else str(Path(name).absolute())


def _check_ranges(config: Config) -> None:
    for key, (wanted, holds) in _RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not holds(value) or value == float("inf"):
            refuse(key, value, wanted)
    if isinstance(config.data.name_or_path, list):
        for source in config.data.name_or_path:
            if not 0 < source.weight < float("inf"):
                wanted = f"a weight above 0 for {source.path}"
                refuse("data.name_or_path", source.weight, wanted)


def _check_loss(loss: LossConfig, reference_mode: str) -> None:
    """Own functions are looked at where a run begins: to read a configuration runs no code."""
    from dpo.objective import checked_objective, is_own

    if isinstance(loss.type, list) and (loss.options or not loss.type):
        what = "no options beside a list" if loss.options else "a loss, or a list of some"
        refuse("loss.options" if loss.options else "loss.type", loss.options or loss.type, what)
    for part in loss.parts:
        if not 0 < part.weight < float("inf"):
            refuse("loss.type", part.weight, f"a weight above 0 for {part.name}")
    known = [part for part in loss.parts if not is_own(part.name)]
    checked_objective(known, reference_mode, pair_weights=loss.pair_weights, ld_alpha=loss.ld_alpha)
    if loss.label_smoothing and not any("label_smoothing" in p.arguments for p in loss.parts):
        names = " and ".join(part.name for part in loss.parts)
        wanted = f"0.0 (its default), since the {names} loss has no such option"
        refuse("loss.label_smoothing", loss.label_smoothing, wanted)
