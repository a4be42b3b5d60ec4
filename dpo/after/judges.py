"""Win rate of the policy against the model before training, by a judge.

A judge reads a prompt and two answers to it, and says which is better:
    exact_match      an answer is right if it equals the chosen one; a tie if both or neither do
    MODULE:FUNCTION  function(prompt, policy, base, chosen) -> 1.0 (the policy's answer is better),
                     0.5 (a tie) or 0.0, or anything between; four texts, `prompt` as the model
                     reads it, control tokens included; the module is found as Python finds
                     modules, in the current folder first
    a URL            of an OpenAI-compatible server, such as https://api.openai.com/v1
"""

import http.client
import importlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from dpo.errors import UserError
from dpo.evaluate.statistics import length_controlled, wilson


@dataclass(frozen=True)
class JudgedAnswers:
    """The texts that a judge compares; lengths in tokens, the turn end included."""

    row: str
    prompt: str
    chosen: str
    base: str
    policy: str
    base_length: int
    policy_length: int


@dataclass(frozen=True)
class Verdict:
    """1.0 if the policy's answer is better, 0.5 for a tie, else 0.0; None if the judge is unclear.

    `said` holds the judge's own words, if it has any.
    """

    value: float | None
    said: tuple[str, ...] = ()


def exact_match(prompt: str, policy: str, base: str, chosen: str) -> float:
    """The answer that equals the chosen one wins; a tie if both or neither does."""
    return 0.5 + ((policy == chosen) - (base == chosen)) / 2


@dataclass(frozen=True)
class FunctionJudge:
    """Asks a Python function."""

    name: str
    function: Callable[[str, str, str, str], Any]
    workers: int = 1  # a function need not be safe to call from several threads

    def __call__(self, answers: JudgedAnswers) -> Verdict:
        """The function's verdict; UserError if it is not a number from 0 to 1."""
        value = self.function(answers.prompt, answers.policy, answers.base, answers.chosen)
        if isinstance(value, int | float | np.number) and 0 <= value <= 1:
            return Verdict(float(value))
        raise UserError(
            f"--judge {self.name}: got {value!r} for row {answers.row}, wanted 1.0 (the policy's "
            "answer is better), 0.5 (a tie) or 0.0. Correct the function."
        )


INSTRUCTION = """\
You compare two answers, A and B, to the last message of a conversation. Judge by how correct, \
helpful and clear they are. Do not reward length, and do not let their order influence you. Think \
in at most three sentences, then end with your verdict alone: [[A]] if A is better, [[B]] if B is \
better, [[C]] if they are equally good."""


@dataclass(frozen=True)
class EndpointJudge:
    """Asks a model behind an OpenAI-compatible chat-completions endpoint, at temperature 0.

    Judges favour the first or the second answer (Zheng et al. 2023, arXiv:2306.05685). So both
    orders are asked, and an answer wins only if it wins both; two different verdicts are a tie.
    The key is read from OPENAI_API_KEY when it is sent, and stored nowhere.

    Attributes:
        url: `.../v1`, or `.../v1/chat/completions`.
        model: the name that the server knows it by.
        timeout: seconds for one reply.
        tries: how often to ask when the server is busy (429), fails (5xx) or does not answer.
        wait: seconds before the second try; doubled each time.
    """

    url: str
    model: str
    timeout: float = 120.0
    tries: int = 6
    wait: float = 1.0
    workers: int = 8

    def __call__(self, answers: JudgedAnswers) -> Verdict:
        """The verdict over both orders; unclear if either reply holds none."""
        said = tuple(
            self._ask(answers.prompt, *order)
            for order in ((answers.policy, answers.base), (answers.base, answers.policy))
        )
        first, second = map(_read_verdict, said)
        if first is None or second is None:
            return Verdict(None, said)
        in_order = {"A": 1.0, "B": 0.0, "C": 0.5}
        mean = (in_order[first] + 1 - in_order[second]) / 2
        return Verdict(mean if mean in (0.0, 1.0) else 0.5, said)

    def _ask(self, prompt: str, a: str, b: str) -> str:
        question = f"[Conversation]\n{prompt}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}"
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": question},
        ]
        body = {"model": self.model, "messages": messages, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        reply = self._send(request)
        try:
            return json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"--judge {self.url}: got {reply[:200]!r}, wanted a chat completion. Give the URL "
                "of an OpenAI-compatible server, up to /v1."
            ) from None

    def _send(self, request: urllib.request.Request) -> bytes:
        wait = self.wait
        for tried in range(1, self.tries + 1):
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace").strip()
                problem = f"HTTP {error.code} {error.reason}: {said}"
                is_passing = error.code == 429 or error.code >= 500
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, cut off
                problem, is_passing = str(getattr(error, "reason", error)), True
            if not is_passing:
                break
            if tried < self.tries:
                time.sleep(wait)
                wait *= 2
        raise UserError(
            f"--judge {self.url}: {problem} (tried {tried} times). Check the URL, --judge_model "
            f"(got {self.model}) and the environment's OPENAI_API_KEY "
            f"({'is set' if 'OPENAI_API_KEY' in os.environ else 'is not set'})."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: urllib would send the key to the address that a server names."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _read_verdict(reply: str) -> str | None:
    found = re.findall(r"\[\[([ABC])\]\]", reply)
    return found[-1] if found else None


def load_judge(name: str, model: str | None = None) -> FunctionJudge | EndpointJudge:
    """The judge that `--judge` and `--judge_model` mean.

    Raises:
        UserError: no such judge, module or function, an endpoint without a model, or a model
            without an endpoint.
    """
    is_url = name.startswith(("http://", "https://"))
    if model and not is_url:
        raise UserError(f"--judge_model: got {model}, but {name} asks no server. Leave it out.")
    if name == "exact_match":
        return FunctionJudge(name, exact_match)
    if is_url:
        if not model:
            raise UserError(f"--judge_model: wanted the model that {name} is to judge with.")
        if "@" in urlsplit(name).netloc:
            raise UserError("--judge: the URL holds a password. Set OPENAI_API_KEY instead.")
        return EndpointJudge(name, model)
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(
            f"--judge: got {name!r}, wanted exact_match, MODULE:FUNCTION or the URL of an "
            "OpenAI-compatible server."
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"--judge {name}: {error}. Give a module in the current folder or installed, and a "
            "function in it."
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise UserError(f"--judge {name}: got a {type(function).__name__}, wanted a function.")
    return FunctionJudge(name, function)


def judge_all(
    judge: FunctionJudge | EndpointJudge, answers: Sequence[JudgedAnswers], file: Path
) -> list[Verdict]:
    """A verdict on each; every one is written to `file` at once, for a person to read."""
    verdicts = []
    with file.open("w", encoding="utf-8") as lines:
        for one, verdict in zip(answers, _verdicts(judge, answers), strict=True):
            line = vars(one) | {"verdict": verdict.value, "judge_said": list(verdict.said)}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            verdicts.append(verdict)
    return verdicts


def _verdicts(
    judge: FunctionJudge | EndpointJudge, answers: Sequence[JudgedAnswers]
) -> Iterator[Verdict]:
    pool = ThreadPoolExecutor(judge.workers)
    try:
        yield from tqdm(
            pool.map(judge, answers), desc="judging", total=len(answers), leave=False, disable=None
        )
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the rest is not needed


def win_rate_statistics(
    answers: Sequence[JudgedAnswers], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Win rate of the policy over the clear verdicts, a tie as half a win; lengths over all."""
    clear = [(a, v.value) for a, v in zip(answers, verdicts, strict=True) if v.value is not None]
    values = np.array([value for _, value in clear])
    longer_by = [a.policy_length - a.base_length for a, _ in clear]
    figures: dict[str, Any] = {
        "prompts": len(answers),
        "unreadable_verdicts": len(answers) - len(clear),
        "wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values < 0.5).sum()),
        "win_rate": float(values.mean()) if clear else None,
        "win_rate_95": wilson(float(values.sum()), len(values)) if clear else None,
        "win_rate_length_controlled": length_controlled(values, longer_by) if clear else None,
    }
    for side in ("base", "policy"):
        lengths = [getattr(a, f"{side}_length") for a in answers]
        figures[f"length_{side}"] = sum(lengths) / len(lengths)
    return figures
