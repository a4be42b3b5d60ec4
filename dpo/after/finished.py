"""A finished run, loaded again: the policy with its trained weights, and what it was before.

Merging, generating and evaluating start from a run folder, which records everything: the model,
the rows, the template. So nothing has to be named again, and nothing can be named differently.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo import run_folder
from dpo.cli import load
from dpo.config import Config
from dpo.data.files import use_a_writable_cache
from dpo.data.loader import PreferenceData, load_data
from dpo.data.order import spread
from dpo.data.stream import TokenizedPair
from dpo.data.tokens import template_digest
from dpo.device import choose_device
from dpo.errors import UserError
from dpo.model.fingerprint import weights_digest
from dpo.model.load import Policy, load_policy, load_weights
from dpo.model.named import load_tokenizer
from dpo.model.reference import Frozen, Reference, adapter_off, build_reference, choose_mode
from dpo.model.scorer import Scorer
from dpo.sealed import damage, is_sealed


def read_run(folder: Path) -> Config:
    """The configuration of a finished run.

    Raises:
        UserError: the folder holds none.
    """
    if not (folder / run_folder.CONFIG).exists() or not (folder / run_folder.FINAL).is_dir():
        raise UserError(
            f"{folder} holds no finished run: wanted a folder with config.yaml and final/. "
            "Name the train.output_dir of one."
        )
    return load(folder / run_folder.CONFIG)


class FinishedRun:
    """The policy of a finished run, its reference, and the rows that it was trained and judged on.

    Args:
        folder: the run folder.
        weights: which of its weights: `final`, `best` or `checkpoint-N`.

    Raises:
        UserError: the folder holds no finished run, or not these weights; its model or tokenizer
            has changed since; or torch cannot use this machine's GPU.
    """

    def __init__(self, folder: Path, weights: str = run_folder.FINAL):
        self.folder, self.config = folder, read_run(folder)
        self.weights = folder / weights
        is_lora = self.config.model.adapter == "lora"
        trained = "adapter_model.safetensors" if is_lora else "model*.safetensors"
        if not list(self.weights.glob(trained)):
            there = sorted({path.parent.name for path in folder.glob(f"*/{trained}")})
            raise UserError(
                f"{self.weights} holds no weights: wanted one of {', '.join(there)} of {folder}."
            )
        if is_sealed(self.weights) and (found := damage(self.weights)):
            raise UserError(f"{found}: {self.weights} cannot be trusted. Restore it.")
        for said in use_a_writable_cache(folder):
            print(said, file=sys.stderr)
        self.device = choose_device()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.config.model)
        model = self.config.model
        self._check_same("weights", lambda: weights_digest(model), f"the model {model.path}")
        template = partial(template_digest, self.tokenizer, self.config.data)
        self._check_same("template", template, f"the tokenizer or template of {model.path}")
        self.policy: Policy = load_policy(self.config, self.device)
        self.policy.model.eval()
        self.scorer = Scorer(self.policy.model, self.config.model.attention)
        load_weights(self.weights, self.policy.model)

    def _check_same(self, name: str, found: Callable[[], str], what: str) -> None:
        """Refuses what is not the same any more as when the run began."""
        then = run_folder.read_whole(self.folder / run_folder.DIGESTS, {}).get(name)
        if then and then != found():
            raise UserError(
                f"{self.folder}: {what} has changed since this run. What would be computed now is "
                "about something else. Restore what the run was made from, or train again."
            )

    @cached_property
    def _before(self) -> Frozen | None:
        """The model before training, loaded again; None for an adapter, which is switched off."""
        if self.policy.is_adapted:
            return None
        return Frozen(load_policy(self.config, self.device).model, self.scorer.layout)

    @cached_property
    def reference(self) -> Reference:
        """The reference that the run was trained against."""
        mode = choose_mode(self.config.reference_mode, self.policy)
        if mode == "frozen":
            assert self._before is not None
            return Reference(mode, self._before)
        return build_reference(mode, self.policy, self.scorer, self.scorer.layout)

    @contextmanager
    def before(self) -> Iterator[nn.Module]:
        """Gives the model as it was before training; within the block, an adapter is off."""
        if self._before is not None:
            yield self._before.model
        else:
            with adapter_off(self.policy):
                yield self.policy.model

    @cached_property
    def data(self) -> PreferenceData:
        """The run's rows, read again (the tokens are in the cache).

        Raises:
            UserError: they have changed since.
        """
        data = load_data(self.config, self.tokenizer)
        self._check_same("data", lambda: data.digest, "the rows")
        return data

    def some_pairs(self, wanted: int) -> tuple[Sequence[TokenizedPair], str]:
        """As PreferenceData.some_pairs: of those in the run folder if they are enough."""
        kept = run_folder.read_lines(self.folder / run_folder.PAIRS)
        if not kept or len(kept) == run_folder.NUM_PAIRS < wanted:
            return self.data.some_pairs(wanted)
        lines = [kept[i] for i in spread(len(kept), wanted)]
        kinds = [line.pop("kind") for line in lines]
        return [TokenizedPair(**line) for line in lines], kinds[0]
