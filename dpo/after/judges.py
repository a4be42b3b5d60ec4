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
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from dpo.errors import UserError
from dpo.evaluate.statistics import length_controlled, wilson
from dpo.imported import imported

MAX_REPLY = 10 * 2**20  # bytes
MAX_UNANSWERED = 8  # rows, one after another: then a server is not there


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
    The key is read from OPENAI_API_KEY when it is sent, and stored nowhere. No redirect is
    followed: urllib would send the key to whatever address the server names.

    Attributes:
        url: `.../v1`, or `.../v1/chat/completions`.
        model: the name that the server knows it by.
        timeout: seconds for one whole reply.
        tries: how often to ask when the server is busy (429), fails (5xx) or does not answer.
        wait: seconds before the second try, doubled each time; a server may ask for more, up to
            `timeout`.
    """

    url: str
    model: str
    timeout: float = 120.0
    tries: int = 6
    wait: float = 1.0
    workers: int = 8

    def __call__(self, answers: JudgedAnswers) -> Verdict:
        """The verdict over both orders; unclear if either reply holds none.

        Raises:
            UnansweredError: the server did not answer about this row.
            UserError: it will not answer about any: wrong address, key or certificate.
        """
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
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        reply = self._send(urllib.request.Request(url, json.dumps(body).encode(), headers))
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"] or ""
            return content.encode(errors="replace").decode()  # JSON may hold half a character
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UnansweredError(
                f"--judge {self.url}: got {_without_key(reply[:200])!r}, wanted a chat completion. "
                "Give the URL of an OpenAI-compatible server, up to /v1."
            ) from None

    def _send(self, request: urllib.request.Request) -> bytes:
        wait = self.wait
        for tried in range(1, self.tries + 1):
            longer, is_passing, is_about_all = 0.0, True, False
            try:
                reply = _within(self.timeout, lambda: _reply(request, self.timeout))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)  # refused, timed out, cut off
                problem, is_about_all = str(reason), isinstance(reason, ValueError)  # certificate
                is_passing = not is_about_all
            else:
                if reply.status < 300:
                    return reply.body
                to = f" (not followed: {reply.headers['Location']})" if reply.status < 400 else ""
                said = reply.body[:300].decode(errors="replace").strip()
                problem = f"HTTP {reply.status} {reply.reason}{to}: {said}"
                is_passing = reply.status == 429 or reply.status >= 500
                is_about_all = reply.status in (401, 403, 404) or reply.status < 400
                longer = min(_seconds(reply.headers.get("Retry-After", "")), self.timeout)
            if not is_passing:
                break
            if tried < self.tries:
                time.sleep(max(wait, longer))
                wait *= 2
        raise (UserError if is_about_all else UnansweredError)(
            f"--judge {self.url}: {_without_key(problem.encode())} (tried {tried} times). Check "
            f"the URL, --judge_model (got {self.model}) and the environment's OPENAI_API_KEY "
            f"({'is set' if _key() else 'is not set'})."
        )


class UnansweredError(UserError):
    """A judge's server gave no answer about one row; it may about the next."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class _Reply(NamedTuple):
    status: int
    reason: str
    headers: Message
    body: bytes


def _reply(request: urllib.request.Request, timeout: float) -> _Reply:
    response: Any
    try:
        response = _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        reply = _Reply(response.status, response.reason, response.headers, response.read(MAX_REPLY))
        if len(reply.body) == MAX_REPLY:
            raise OSError(f"the reply is larger than {MAX_REPLY >> 20} MiB")
        if response.length:
            raise OSError("the reply was cut off")
        return reply


T = TypeVar("T")


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives; a socket's own timeout begins anew with every byte.

    Raises:
        TimeoutError: it takes longer. It goes on in a thread of its own, which nothing waits for.
    """
    done: SimpleQueue[T | Exception] = SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except Exception as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError("timed out") from None
    if isinstance(result, Exception):
        raise result
    return result


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for: seconds, or a date (RFC 9110, section 10.2.3)."""
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return 0.0


def _key() -> str:
    """The key without white space around it, "" if there is none.

    Raises:
        UserError: it cannot be sent; the key is not printed.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "OPENAI_API_KEY: it holds a line end or a character that is not ASCII. Set it anew."
        )
    return key


def _without_key(said: bytes) -> str:
    """A server's words; some repeat the key that they refuse."""
    text = said.decode(errors="replace")
    return text.replace(key, "***") if (key := _key()) else text


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
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise UserError(
            f"--judge: got {name!r}, wanted exact_match, MODULE:FUNCTION or the URL of an "
            "OpenAI-compatible server."
        )
    return FunctionJudge(name, imported(name, "--judge"))


def judge_all(
    judge: FunctionJudge | EndpointJudge, answers: Sequence[JudgedAnswers], file: Path
) -> list[Verdict]:
    """A verdict on each; every one is written to `file` at once, for a person to read.

    A row about which a server gave no answer counts as unreadable; `file` says why.

    Raises:
        UserError: the judge cannot be asked at all, or not about MAX_UNANSWERED rows in a row.
    """
    verdicts, unanswered = [], 0
    with file.open("w", encoding="utf-8") as lines:
        for one, verdict in zip(answers, _verdicts(judge, answers), strict=True):
            problem = isinstance(verdict, UnansweredError)
            unanswered = unanswered + 1 if problem else 0
            if problem and unanswered in (MAX_UNANSWERED, len(answers)):
                raise verdict
            verdicts.append(Verdict(None, (f"error: {verdict}",)) if problem else verdict)
            value, said = vars(verdicts[-1]).values()
            line = vars(one) | {"verdict": value, "judge_said": list(said)}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    return verdicts


def _verdicts(
    judge: FunctionJudge | EndpointJudge, answers: Sequence[JudgedAnswers]
) -> Iterator[Verdict | UnansweredError]:
    def ask(one: JudgedAnswers) -> Verdict | UnansweredError:
        try:
            return judge(one)
        except UnansweredError as error:
            return error

    pool = ThreadPoolExecutor(judge.workers)
    try:
        yield from tqdm(
            pool.map(ask, answers), desc="judging", total=len(answers), leave=False, disable=None
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
