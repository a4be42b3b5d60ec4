"""A judge's server may say anything, or nothing: each row is counted, and none is waited for."""

import http.server
import json
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from dpo.after import judges
from dpo.after.judges import EndpointJudge, JudgedAnswers, UnansweredError, judge_all
from dpo.errors import UserError

KEY = "sk-secret-of-the-test"
ROWS = [JudgedAnswers(str(i), f"Q{i}?", "right", "base", "policy", 1, 1) for i in range(10)]


def completion(text="[[A]]"):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@contextmanager
def server(answer, context=None):
    """An endpoint; `answer(handler, number)` writes what it likes. Gives its address."""
    count = iter(range(1, 10_000))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.asked = self.rfile.read(int(self.headers["Content-Length"]))
            with suppress(OSError):  # who asked has left
                answer(self, next(count))

        def log_message(self, *_):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    http_server = Quiet(("127.0.0.1", 0), Handler)
    scheme = "http"
    if context:
        http_server.socket = context.wrap_socket(http_server.socket, server_side=True)
        scheme = "https"
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"{scheme}://127.0.0.1:{http_server.server_port}/v1"
    finally:
        http_server.shutdown()
        http_server.server_close()


def sent(status, body, **headers):
    def answer(handler, number):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def drip(handler, number):
    """A byte every tenth of a second: a socket's own timeout begins anew with each."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def drip_error(handler, number):
    handler.send_response(500)
    handler.end_headers()
    drip_head(handler, number)


def drip_head(handler, number):
    for _ in range(100):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.1)


def cut(handler, number):
    sent(200, b"{", Content_Length="1000")(handler, number)
    handler.connection.close()


def judge_at(url, **options):
    return EndpointJudge(url, "m", **{"wait": 0.01, "timeout": 0.5, "tries": 2} | options)


WRONG = {
    "not JSON": (sent(200, b"<html>"), "wanted a chat completion"),
    "another shape": (sent(200, b'{"choices": {"message": 5}}'), "wanted a chat completion"),
    "content that is no text": (
        sent(200, b'{"choices": [{"message": {"content": [1]}}]}'),
        "wanted a chat completion",
    ),
    "nested too deeply": (sent(200, b"[" * 100_000), "wanted a chat completion"),
    "not UTF-8": (sent(200, b"\xff\xfe\x00"), "wanted a chat completion"),
    "larger than the limit": (sent(200, b"x" * 3_000_000), "larger than 2 MiB"),
    "a slow body": (drip, "timed out"),
    "a slow head": (drip_head, "timed out"),
    "cut off": (cut, "cut off"),
    "an error that drips": (drip_error, "timed out"),
    "busy": (sent(429, b"later"), "HTTP 429"),
    "broken": (sent(500, b"oops"), "HTTP 500"),
    "too long for its context": (sent(400, b"maximum context length"), "HTTP 400"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_reply_costs_its_row_and_is_said(kind, tmp_path, monkeypatch):
    """Whatever is asked about the second row goes wrong."""
    monkeypatch.setattr(judges, "MAX_REPLY", 2 * 2**20)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    wrong, said = WRONG[kind]

    def answer(handler, number):
        (wrong if b"Q1?" in handler.asked else sent(200, completion()))(handler, number)

    began = time.monotonic()
    with server(answer) as url:
        verdicts = judge_all(judge_at(url), ROWS[:3], tmp_path / "judged.jsonl")
    assert time.monotonic() - began < 5
    assert [verdict.value is None for verdict in verdicts] == [False, True, False]
    lines = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert "error: --judge" in lines[1]["judge_said"][0]
    assert said in lines[1]["judge_said"][0]
    assert KEY not in (tmp_path / "judged.jsonl").read_text()


@pytest.mark.parametrize("kind", WRONG)
def test_a_server_that_never_answers_right_ends_in_one_message(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "MAX_REPLY", 2 * 2**20)
    began = time.monotonic()
    with server(WRONG[kind][0]) as url, pytest.raises(UnansweredError):
        judge_all(judge_at(url), ROWS, tmp_path / "judged.jsonl")
    assert time.monotonic() - began < 10
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == judges.MAX_UNANSWERED - 1


def test_two_rows_of_two_without_an_answer_are_no_measurement(tmp_path):
    with server(sent(500, b"")) as url, pytest.raises(UnansweredError, match="HTTP 500"):
        judge_all(judge_at(url), ROWS[:2], tmp_path / "judged.jsonl")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_and_the_key_goes_nowhere_else(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    came = []

    def elsewhere(handler, number):
        came.append(handler.headers)

    with server(elsewhere) as other, server(sent(status, b"", Location=other)) as url:
        with pytest.raises(UserError, match=rf"HTTP {status} .*not followed: {other}") as refused:
            judge_at(url)(ROWS[0])
        assert not isinstance(refused.value, UnansweredError)
    assert came == []


@pytest.mark.parametrize("kind", ["seconds", "a date", "neither"])
def test_a_busy_server_says_how_long_to_wait(kind, monkeypatch):
    waited = []
    monkeypatch.setattr(judges, "time", SimpleNamespace(sleep=waited.append, time=time.time))
    after = {"seconds": "7", "a date": formatdate(time.time() + 7, usegmt=True), "neither": "soon"}

    def answer(handler, number):
        busy = sent(429, b"", Retry_After=after[kind])
        (busy if number == 1 else sent(200, completion()))(handler, number)

    with server(answer) as url:
        judge_at(url, timeout=30.0)(ROWS[0])
    (seconds,) = waited
    assert seconds == (0.01 if kind == "neither" else pytest.approx(7, abs=2))
    with server(sent(429, b"", Retry_After="99999")) as url, pytest.raises(UnansweredError):
        judge_at(url, timeout=30.0)(ROWS[0])
    assert waited[1:] == [30.0]  # and no more


def test_a_certificate_that_nobody_signed_is_refused_at_once(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*make, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with server(sent(200, completion()), context) as url:
        with pytest.raises(UserError, match=r"CERTIFICATE_VERIFY_FAILED.* \(tried 1 times") as no:
            judge_at(url)(ROWS[0])
        assert not isinstance(no.value, UnansweredError)


def test_a_server_that_repeats_the_key_does_not_put_it_into_the_message(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for status in (401, 200):
        body = f"Incorrect API key: {KEY}".encode()
        with server(sent(status, body)) as url, pytest.raises(UserError) as refused:
            judge_at(url)(ROWS[0])
        assert "Incorrect API key: ***" in str(refused.value)
        assert KEY not in str(refused.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-\u00e9", "sk-\u200b"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_printed(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY: ") as refused:
        judge_at("http://127.0.0.1:9/v1")(ROWS[0])
    assert key not in str(refused.value)


def test_half_a_character_in_a_reply_can_be_written(tmp_path):
    body = b'{"choices": [{"message": {"content": "\\ud800 [[A]]"}}]}'
    with server(sent(200, body)) as url:
        judge_all(judge_at(url), ROWS[:2], tmp_path / "judged.jsonl")
    line = json.loads((tmp_path / "judged.jsonl").read_text().splitlines()[0])
    assert line["judge_said"] == ["? [[A]]"] * 2
