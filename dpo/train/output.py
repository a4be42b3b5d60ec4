"""What a run writes into its folder and prints at its end; on the main process alone."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpo import run_folder, signals
from dpo.cli import save
from dpo.config import Config
from dpo.data.loader import PreferenceData
from dpo.data.templates import template_to_save
from dpo.data.tokens import template_digest
from dpo.errors import UserError
from dpo.evaluate.token_rewards import rewards_to_show
from dpo.model.fingerprint import weights_digest
from dpo.model.load import save_config
from dpo.model.models import Models
from dpo.model.named import save_tokenizer
from dpo.plan.disk import cannot_write, written_bytes
from dpo.report.page import write_report
from dpo.sealed import written_aside
from dpo.train.checkpoint import save_weights
from dpo.train.tracking import Tracker, closing_table, side_by_side


@dataclass
class Output:
    """Writes the files of one run.

    Attributes:
        about: the header of the run.
    """

    config: Config
    models: Models
    data: PreferenceData
    tokenizer: PreTrainedTokenizerBase
    tracker: Tracker
    device: torch.device
    about: str = ""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.train.output_dir)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of one `checkpoint`, of `best` and of `final`."""
        return written_bytes(self.config, self.models.trained)

    @cached_property
    def weights_before(self) -> str:
        """Digest of the model's files; every one of them is read."""
        return weights_digest(self.config.model)

    def start(self) -> None:
        """Writes what is known of the run before its first step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.config, self.folder / run_folder.CONFIG)
        self._json(run_folder.DATA_REPORT, self.data.report)
        (self.folder / run_folder.HEADER).write_text(self.about + "\n")
        some, kind = self.data.some_pairs(run_folder.NUM_PAIRS)
        kept = ({"kind": kind, **asdict(pair)} for pair in some)
        run_folder.write_lines(self.folder / run_folder.PAIRS, kept)
        digests = {
            "weights": self.weights_before,
            "template": template_digest(self.tokenizer, self.config.data),
            "data": self.data.digest,
        }
        self._json(run_folder.DIGESTS, digests)

    def attempt(self, name: str, write: Callable[[], object]) -> str:
        """Writes something into the folder; says what prevented it, "" if nothing did."""
        try:
            if not run_folder.is_run(self.folder):  # someone has deleted it
                self.start()
            write()
            return ""
        except OSError as error:
            return cannot_write(self.folder / name, error, self.sizes[name.split("-")[0]])

    def weights(self, name: str, also: dict[str, Any] | None = None) -> str:
        """Writes weights, tokenizer and some JSON files in place of a folder; as `attempt`."""
        return self.attempt(name, partial(self._weights, name, also or {}))

    def _weights(self, name: str, also: dict[str, Any]) -> None:
        source, policy = self.config.model, self.models.policy
        template = template_to_save(self.tokenizer, self.config.data)
        with written_aside(self.folder / name) as files:
            save_weights(policy.model, files)
            save_tokenizer(source, self.tokenizer, template, files)
            if not policy.is_adapted:
                save_config(source, policy.model, files)  # type: ignore[arg-type]
            for file, value in also.items():
                (files / file).write_text(json.dumps(value))

    def end(self, stopped: str) -> None:
        """Writes `final/` and the figures of the end, and prints them.

        Args:
            stopped: why the run ends before its last step, in words; "" if it does not.

        Raises:
            UserError: `final/` cannot be written.
        """
        if problem := self.weights(run_folder.FINAL):
            raise UserError(f"{problem} {self.way_on()}")
        self.tracker.close_bar()
        evaluations = self.tracker.evaluations()
        after = evaluations[-1] if evaluations else {}
        before = next((line for line in evaluations if line["step"] == 0), {})  # or its log is lost
        summary: dict[str, Any] = {"before": before, "after": after}
        if stopped:
            summary["stopped"] = stopped
            self.tracker.say(stopped)
            with (self.folder / run_folder.HEADER).open("a") as file:
                file.write(f"note: {stopped}\n")
        self._json(run_folder.TOKEN_REWARDS, self._token_rewards())
        self._json(run_folder.SUMMARY, summary)
        if before:
            old, new = (self.tracker.samples_at(line["step"]) for line in (before, after))
            print(f"\n{closing_table(before, after)}\n\n{side_by_side(old, new)}")
        if about_cache := self.models.reference.summary():
            print(about_cache)
        print(f"The trained model is in {self.folder / run_folder.FINAL}.")

    def way_on(self) -> str:
        """How to go on after a full disk, in words."""
        there = [path.name for path in run_folder.list_checkpoints(self.folder)]
        start = there[-1] if there else "the start"
        return f"Free some space; the same command then goes on from {start} (train.resume auto)."

    def report(self) -> None:
        """Writes the report; all else is saved by now, so a failure is told and fails no run.

        Raises:
            Stopped: a signal came before it was written.
        """
        later = f"The run is complete; dpo report {self.folder} writes it later."
        try:
            with signals.at_once():
                print(f"The report is in {write_report(self.folder)}.")
        except signals.Stopped as stop:
            said = f"{signals.name(stop.number)}: stopped before the report was written. {later}"
            raise signals.Stopped(stop.number, said) from None
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"The report could not be written ({reason}). {later}", file=sys.stderr)

    def _token_rewards(self) -> list[dict[str, Any]]:
        """Some held-out pairs, token by token, under the weights as they are now."""
        logps = self.tracker.last_held_out()
        if logps is None:
            return []
        self.models.scorer.eval()
        return rewards_to_show(
            self.data.held_out,
            logps,
            self.models.scorer,
            self.models.reference,
            self.tokenizer,
            beta=self.config.loss.beta,
            device=self.device,
        )

    def _json(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(json.dumps(value, indent=1))
