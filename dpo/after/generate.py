"""The work of dpo generate: loads models, and lets them answer in batches or in a chat.

A run folder gives two speakers from one loaded model: the policy, and the base, which is what the
policy was before training. A model folder, such as a merged model, gives the policy alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
from torch import nn
from tqdm import tqdm
from transformers import TextStreamer

from dpo import run_folder
from dpo.after.finished import FinishedRun
from dpo.after.output import check_output
from dpo.after.prompts import Prompt, system_messages
from dpo.config import Config, ModelConfig
from dpo.data.chat import stop_ids
from dpo.data.formats import IM_START, Message
from dpo.data.templates import choose_template
from dpo.device import choose_device
from dpo.errors import UserError
from dpo.evaluate.samples import generate
from dpo.evaluate.sampling import Sampling
from dpo.hidden import visible
from dpo.model.load import load_base
from dpo.model.named import load_tokenizer
from dpo.plan.fit import choose_dtype


def check_request(
    *,
    is_chat: bool,
    has_prompts: bool,
    output: Path | None,
    seeds: Sequence[int],
    batch_size: int,
) -> None:
    """Refuses, before any work, what cannot be done.

    Raises:
        UserError: a conversation with prompts, a file or several seeds; an output file that
            exists or cannot be written; a batch size below 1.
    """
    too_much = {"prompts": has_prompts, "--output": output, "more than one of --seeds": seeds[1:]}
    for what in (name for name, given in too_much.items() if is_chat and given):
        raise UserError(f"--chat: got {what} as well, but a conversation is typed. Leave one out.")
    if output and output.exists():
        raise UserError(f"--output: {output} exists already. Name a new file.")
    if output:
        check_output(output)
    if batch_size < 1:
        raise UserError(f"--batch_size: got {batch_size}, wanted 1 or more.")


class Speakers:
    """Who answers: the policy of a run and its base, or a model alone.

    Args:
        path: run folder, or model folder.
        side: `both`, `base` or `policy`; None is both for a run, and the policy for a model.
        weights: of the run: `final` (None), `best` or `checkpoint-N`.

    Attributes:
        sides: the names of those who answer, in the order in which they answer.

    Raises:
        UserError: neither kind of folder, or a side or weights that it does not have.
    """

    def __init__(self, path: Path, side: str | None = None, weights: str | None = None):
        self._models: dict[str, Callable[[], AbstractContextManager[nn.Module]]]
        if (path / run_folder.CONFIG).exists():
            finished = FinishedRun(path, weights or run_folder.FINAL)
            self.weights, self._tokenizer = finished.weights, finished.tokenizer
            config = finished.config
            self._models = {
                "base": finished.before,
                "policy": lambda: nullcontext(finished.policy.model),
            }
            model: Any = finished.policy.model
        else:
            _refuse_as_model(path, side, weights)
            settings = ModelConfig(
                name_or_path=str(path), dtype="auto", quantization="none", adapter="none"
            )
            device = choose_device()
            settings.dtype, _ = choose_dtype(settings, device)
            self.weights, config = path, Config(model=settings)
            self._tokenizer = load_tokenizer(settings)
            model = load_base(settings, device).eval()
            self._models = {"policy": lambda: nullcontext(model)}
        self.sides = tuple(self._models) if side in (None, "both") else (side,)
        self._template = choose_template(self._tokenizer, config.data)
        self._stops = stop_ids(model, self._tokenizer, self._template)
        text_config = model.config.get_text_config()
        self._context = getattr(text_config, "max_position_embeddings", None)

    def tokenize(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """Token ids of a prompt.

        A model without a chat template continues a single user message as plain text.

        Raises:
            UserError: the template refuses it, there is none, or the model's context is too short.
        """
        said = prompt.said
        if self._template is None and not isinstance(said, str) and len(said) == 1:
            said = prompt.text
        ids = self._encode(said) if isinstance(said, str) else self._render(prompt)
        if self._context and len(ids) + max_new_tokens > self._context:
            raise UserError(
                f"{prompt.where} ({prompt.text[:40]!r}) has {len(ids)} tokens: with "
                f"--max_new_tokens {max_new_tokens} that is more than the {self._context} of the "
                "model's context. Shorten it, or lower --max_new_tokens."
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        """Tokenizes text; control tokens in it are plain text, but not in ready-made ChatML."""
        plain = IM_START not in text
        return self._tokenizer(text, add_special_tokens=plain, split_special_tokens=plain)[  # type: ignore[return-value]
            "input_ids"
        ]

    def _render(self, prompt: Prompt) -> list[int]:
        if self._template is None:
            raise UserError(
                f"{prompt.where}: a conversation, but the model has no chat template "
                "(data.chat_template of the run). Give single texts, and no --system."
            )
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
                prompt.said,  # type: ignore[arg-type]
                tools=prompt.tools,  # type: ignore[arg-type]
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{prompt.where}: the chat template refuses it: {error}") from None

    def answer(
        self,
        side: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        stream: bool = False,
    ) -> list[str]:
        """The answers of one side to a batch of tokenized prompts; `stream` prints a single one.

        Each prompt has a seed; base and policy draw with the same random numbers.
        """
        streamer = _Streamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        with self._models[side]() as model:
            answers = generate(
                model,
                self._tokenizer,
                prompts,
                stop_ids=self._stops,
                seed=seeds,
                batch_size=len(prompts),
                streamer=streamer if stream else None,
                **asdict(sampling),
            )
        ended = [ids[:-1] if ids[-1] in self._stops else ids for ids in answers]
        return [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in ended]  # type: ignore[union-attr]


class _Streamer(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(visible(text), stream_end)


def _refuse_as_model(path: Path, side: str | None, weights: str | None) -> None:
    if not (path / "config.json").exists():
        is_adapter = (path / "adapter_config.json").exists()
        raise UserError(
            f"{path} is neither a run folder (config.yaml and final/) nor a model folder "
            "(config.json). "
            + ("It holds an adapter: name its run folder." if is_adapter else "Correct the path.")
        )
    flag, value = ("--weights", weights) if weights else ("--side", side)
    if value not in (None, "policy"):
        raise UserError(
            f"{flag}: got {value}, but {path} is a model and not a run: it has one set of weights, "
            f"and no base beside it. Leave {flag} out, or name a run folder."
        )


def answers(
    speakers: Speakers,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """One record for each prompt and seed: the prompt, each side's answer, and the sampling.

    Raises:
        UserError: a prompt cannot be answered; raised before the first answer.
    """
    tokens = [speakers.tokenize(prompt, sampling.max_new_tokens) for prompt in prompts]
    asked = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        ids, batch_seeds = [tokens[i] for i, _ in batch], [seed for _, seed in batch]
        sides = [speakers.answer(side, ids, batch_seeds, sampling) for side in speakers.sides]
        for (i, seed), *said in zip(batch, *sides, strict=True):
            by_side = dict(zip(speakers.sides, said, strict=True))
            how = {**asdict(sampling), "weights": str(speakers.weights)}
            yield {**prompts[i].columns, "seed": seed, **by_side, **how}


def write_answers(file: Path, records: Iterator[dict[str, Any]], total: int) -> None:
    """Writes each record as a line of JSON as soon as it is ready; a terminal shows a bar.

    The file is made after the first record, so prompts that cannot be answered leave none behind.
    """
    first = next(records)
    with file.open("x", encoding="utf-8") as lines:
        for record in tqdm(chain([first], records), total=total, unit="answer", disable=None):
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()


def print_answers(
    records: Iterator[dict[str, Any]], sides: Sequence[str], seeds: Sequence[int]
) -> None:
    """Prints each prompt once, and below it every side's answer for every seed."""
    shown = None
    for record in records:
        said = record.get("prompt") or record["messages"]
        if said != shown:
            shown = said
            print("\n" + visible(said if isinstance(said, str) else said[-1]["content"]))
        for side in sides:
            seed = f" (seed {record['seed']})" if len(seeds) > 1 else ""
            print(f"{_label(side + seed)}{visible(record[side])}", flush=True)


def stream_answer(speakers: Speakers, prompt: Prompt, seed: int, sampling: Sampling) -> None:
    """Prints the answers to one prompt as they are written, like `print_answers`."""
    ids = speakers.tokenize(prompt, sampling.max_new_tokens)
    print(f"\n{visible(prompt.text)}")
    for side in speakers.sides:
        print(_label(side), end="", flush=True)
        speakers.answer(side, [ids], [seed], sampling, stream=True)


def _label(who: str) -> str:
    return f"  {who + ':':<7} "


def chat(speakers: Speakers, system: str, seed: int, sampling: Sampling) -> None:
    """Holds a conversation on the terminal; each side has a history of its own answers."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then edits its line and remembers the last ones

    print("/reset forgets the conversation, /quit or Ctrl-D ends it.")
    histories = {side: system_messages(system) for side in speakers.sides}
    try:
        while (said := input("\nyou: ").strip()) != "/quit":
            if said == "/reset":
                histories = {side: system_messages(system) for side in speakers.sides}
            elif said.startswith("/"):
                print(f"{said} is neither /reset nor /quit")
            elif said:
                _take_turn(speakers, histories, said, seed, sampling)
    except (EOFError, KeyboardInterrupt):
        print()


def _take_turn(
    speakers: Speakers,
    histories: dict[str, list[Message]],
    said: str,
    seed: int,
    sampling: Sampling,
) -> None:
    """Lets each side answer and adds the turn to its history; or says why it cannot."""
    turn = {"role": "user", "content": said}
    try:
        tokens = {
            side: speakers.tokenize(
                Prompt([*history, turn], "the conversation"), sampling.max_new_tokens
            )
            for side, history in histories.items()
        }
    except UserError as error:
        print(f"{error} Or /reset.")
        return
    for side, ids in tokens.items():
        print(f"{side}: ", end="", flush=True)
        (answer,) = speakers.answer(side, [ids], [seed], sampling, stream=True)
        histories[side] += [turn, {"role": "assistant", "content": answer}]
