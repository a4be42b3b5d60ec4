"""Judges: functions, and an endpoint on a server of our own."""

import json
import re
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpo.after.judges import (
    EndpointJudge,
    FunctionJudge,
    JudgedAnswers,
    Verdict,
    exact_match,
    judge_all,
    load_judge,
    win_rate_statistics,
)
from dpo.errors import UserError

KEY = "sk-secret-of-the-test"


def answers(base="wrong", policy="right", base_length=3, policy_length=3):
    lengths = {"base_length": base_length, "policy_length": policy_length}
    return JudgedAnswers("7", "2 + 2?", chosen="right", base=base, policy=policy, **lengths)


@contextmanager
def server(reply):
    """An endpoint; `reply(number, body)` gives (status, text of the answer, or bytes of a body).

    Yields its URL and the requests as they come: (path, headers, body).
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            status, content = reply(len(requests), body)
            if isinstance(content, str):
                content = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Location", "/v1/elsewhere")
            self.end_headers()
            with suppress(BrokenPipeError):  # who waited has left
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def judge_at(url, **options):
    return EndpointJudge(url, "judge-1", **{"wait": 0.01, "timeout": 5.0, "tries": 3} | options)


def asked_about(body):
    """Answers A and B of a request."""
    text = body["messages"][-1]["content"]
    return re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)", text).groups()


def prefers_right(_, body):
    a, b = asked_about(body)
    verdict = "C" if a == b else "A" if a == "right" else "B"
    return 200, f"I could say [[B]] or [[A]], but my verdict is [[{verdict}]]"


@pytest.mark.parametrize(
    ("base", "policy", "verdict"),
    [("wrong", "right", 1.0), ("right", "wrong", 0.0), ("right", "right", 0.5), ("x", "y", 0.5)],
)
def test_exact_match_is_won_by_the_only_right_answer(base, policy, verdict):
    assert exact_match("", policy, base, "right") == verdict


@pytest.mark.parametrize(
    ("base", "policy", "verdict"),
    [("wrong", "right", 1.0), ("right", "wrong", 0.0), ("right", "right", 0.5)],
)
def test_an_endpoint_is_asked_in_both_orders(base, policy, verdict):
    with server(prefers_right) as (url, requests):
        assert judge_at(url)(answers(base, policy)).value == verdict
    assert [asked_about(body) for _, _, body in requests] == [(policy, base), (base, policy)]
    assert {path for path, _, _ in requests} == {"/v1/chat/completions"}
    assert all("2 + 2?" in body["messages"][-1]["content"] for _, _, body in requests)
    assert {body["model"] for _, _, body in requests} == {"judge-1"}


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_a_judge_that_sees_only_the_place_gives_ties(favourite):
    with server(lambda *_: (200, f"[[{favourite}]]")) as (url, _):
        assert judge_at(url)(answers()).value == 0.5


def test_a_verdict_and_a_tie_are_a_tie():
    with server(lambda number, _: (200, "[[A]]" if number == 1 else "[[C]]")) as (url, _):
        assert judge_at(url)(answers()).value == 0.5


@pytest.mark.parametrize("reply", ["Both are fine.", "[[D]]", ""])
def test_an_unreadable_verdict_is_no_tie(reply):
    with server(lambda number, _: (200, reply if number == 2 else "[[A]]")) as (url, _):
        verdict = judge_at(url)(answers())
    assert verdict == Verdict(None, ("[[A]]", reply))
    clear = Verdict(1.0)
    figures = win_rate_statistics([answers()] * 3, [clear, verdict, clear])
    assert (figures["unreadable_verdicts"], figures["ties"], figures["win_rate"]) == (1, 0, 1.0)
    assert win_rate_statistics([answers()], [verdict])["win_rate"] is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    def reply(number, body):
        return (status, b"busy") if number < 3 else prefers_right(number, body)

    with server(reply) as (url, requests):
        assert judge_at(url)(answers()).value == 1.0
    assert len(requests) == 4


@pytest.mark.parametrize(("status", "asked"), [(503, 3), (401, 1), (404, 1), (307, 1), (302, 1)])
def test_a_server_that_refuses_is_a_user_error_without_the_key(status, asked, monkeypatch):
    """Passing failures are tried three times, others once; and a redirect is not followed."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with server(lambda *_: (status, b"no")) as (url, requests):
        with pytest.raises(
            UserError, match=rf"HTTP {status} .*: no \(tried {asked} times"
        ) as error:
            judge_at(url)(answers())
        assert len(requests) == asked
    assert KEY not in str(error.value)
    assert "OPENAI_API_KEY (is set)" in str(error.value)


def test_a_server_that_is_not_there_or_too_slow_is_a_user_error():
    with server(prefers_right) as (url, _):
        pass
    with pytest.raises(UserError, match=r"refused \(tried 3 times"):
        judge_at(url)(answers())
    leave = threading.Event()
    with server(lambda *_: (leave.wait(5), (200, "[[A]]"))[1]) as (url, requests):
        with pytest.raises(UserError, match=r"timed out \(tried 2 times"):
            judge_at(url, timeout=0.2, tries=2)(answers())
        leave.set()
    assert len(requests) == 2


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b'{"choices": []}', b"[]"])
def test_what_is_no_chat_completion_is_a_user_error(body):
    with (
        server(lambda *_: (200, body)) as (url, _),
        pytest.raises(UserError, match="wanted a chat completion"),
    ):
        judge_at(url)(answers())


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with server(prefers_right) as (url, requests):
        judge = load_judge(url + "/chat/completions", "judge-1")
        judge_all(judge, [answers()], tmp_path / "judged.jsonl")
        monkeypatch.delenv("OPENAI_API_KEY")
        judge_all(judge, [answers()], tmp_path / "judged.jsonl")
    sent = [headers.get("Authorization") for _, headers, _ in requests]
    assert sent == [f"Bearer {KEY}"] * 2 + [None] * 2
    assert {path for path, _, _ in requests} == {"/v1/chat/completions"}
    assert KEY not in repr(judge) + (tmp_path / "judged.jsonl").read_text()


def test_judged_answers_are_written_in_their_order(tmp_path):
    """Several threads ask at once; the answers come back as they went."""
    many = [answers(policy="right" if i % 3 else "wrong", policy_length=i) for i in range(20)]
    with server(prefers_right) as (url, _):
        verdicts = judge_all(judge_at(url), many, tmp_path / "judged.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [line["policy_length"] for line in lines] == list(range(20))
    # Two wrong answers: each order's verdict names the other place, which is a tie.
    assert [line["verdict"] for line in lines] == [1.0 if i % 3 else 0.5 for i in range(20)]
    assert [v.value for v in verdicts] == [line["verdict"] for line in lines]
    assert all(len(line["judge_said"]) == 2 for line in lines)


def test_an_error_keeps_the_answers_judged_before_it(tmp_path):
    def function(prompt, policy, base, chosen):
        return 1.0 if policy == "right" else "yes"

    judge = FunctionJudge("mine", function)
    with pytest.raises(UserError, match=r"mine: got 'yes' for row 7, wanted 1\.0"):
        judge_all(judge, [answers(), answers(policy="x"), answers()], tmp_path / "judged.jsonl")
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("value", [None, "1", 2.0, -1, float("nan")])
def test_a_function_gives_a_number_from_0_to_1(value):
    with pytest.raises(UserError, match=r"wanted 1\.0"):
        FunctionJudge("mine", lambda *_: value)(answers())


def test_a_function_of_the_current_folder_is_a_judge(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(
        "def shorter(prompt, policy, base, chosen):\n"
        "    assert (prompt, chosen) == ('2 + 2?', 'right')\n"
        "    return float(len(policy) < len(base))\nNUMBER = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = load_judge("my_judge:shorter")
    assert judge(answers("long", "no")).value == 1.0
    assert judge(answers("no", "long")).value == 0.0
    for name, said in [("my_judge:nothing", "no attribute"), ("my_judge:NUMBER", "got a int")]:
        with pytest.raises(UserError, match=said):
            load_judge(name)


def test_a_judge_of_the_current_folder_leaves_the_search_path_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "judge_in_passing.py").write_text("def tie(*_):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    load_judge("judge_in_passing:tie")
    with pytest.raises(UserError):
        load_judge("no_such_module:judge")
    assert sys.path == before


def test_a_judge_with_a_syntax_error_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "misspelt_judge.py").write_text("def judge(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"invalid syntax \(misspelt_judge.py, line 1\)"):
        load_judge("misspelt_judge:judge")


def test_a_model_for_a_judge_that_asks_no_server_is_refused():
    for name in ("exact_match", "my_judge:shorter"):
        with pytest.raises(UserError, match=f"got judge-1, but {name} asks no server"):
            load_judge(name, "judge-1")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exact", "wanted exact_match, MODULE:FUNCTION or the URL"),
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("http://127.0.0.1:1/v1", "--judge_model"),
    ],
)
def test_what_is_no_judge_is_a_user_error(name, said):
    with pytest.raises(UserError, match=said):
        load_judge(name)


def test_a_password_in_the_url_is_refused():
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        load_judge("https://me:hunter2@example.org/v1", "judge-1")
    assert "hunter2" not in str(error.value)


def test_a_tie_is_half_a_win():
    """Two wins, one tie, one loss: 2.5 of 4."""
    verdicts = [Verdict(v) for v in (1.0, 1.0, 0.5, 0.0)]
    figures = win_rate_statistics([answers(base_length=2, policy_length=6)] * 4, verdicts)
    assert figures["win_rate"] == 0.625
    assert [figures[k] for k in ("wins", "ties", "losses")] == [2, 1, 1]
    low, high = figures["win_rate_95"]
    assert 0.2 < low < 0.625 < high < 1
    assert (figures["length_base"], figures["length_policy"]) == (2, 6)
    assert figures["win_rate_length_controlled"] is None  # every answer 4 tokens longer


def test_the_win_rate_of_a_judge_of_length_is_half_when_controlled():
    lengths = [3 + i % 8 for i in range(200)]  # the policy's; the base's answers have 5 tokens
    judged = [answers(base_length=5, policy_length=n) for n in lengths]
    verdicts = [Verdict((n > 5) + (n == 5) / 2) for n in lengths]
    figures = win_rate_statistics(judged, verdicts)
    assert figures["win_rate"] > 0.65
    assert figures["win_rate_length_controlled"] == pytest.approx(0.5, abs=0.06)
