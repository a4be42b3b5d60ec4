"""dpo generate as a user runs it, and the speakers behind it."""

import io
import json
import os
import pty
import runpy
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from dpo.after.generate import Speakers
from dpo.after.prompts import Prompt, read_prompts
from dpo.errors import UserError
from dpo.evaluate.samples import generate
from dpo.evaluate.sampling import Sampling
from tests.models import QUICKSTART_MODEL
from tests.train.runs import config, run

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "generate.py")
MODEL = QUICKSTART_MODEL
WORDS = "Tell me the last of these words: bread, flower, garden."
OTHER = "We plan the concert for September. The wedding is a month later. When is the wedding?"
PUSHED = ["--train.max_steps", 3, "--optim.learning_rate", 0.05]  # three steps, far from the base
GREEDY = Sampling(temperature=0.0, max_new_tokens=10)
SIDES = ("base", "policy")
SHORT = ["--max_new_tokens", 10]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return run(config(tmp_path_factory.mktemp("lora"), *PUSHED, "--train.save_steps", 2))


def call(monkeypatch, *arguments, stdin=None):
    """Runs the script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    terminal = io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
    terminal.isatty = lambda: stdin is None
    monkeypatch.setattr(sys, "stdin", terminal)
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as exit:
        return exit.code
    return 0


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def conversation(*said):
    roles = ["user", "assistant"] * len(said)
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def reply(speakers, side, prompt, sampling=GREEDY, seed=0):
    ids = speakers.tokenize(Prompt(prompt, "here"), sampling.max_new_tokens)
    return speakers.answer(side, [ids], [seed], sampling)[0]


def untrained(said, sampling=GREEDY, seed=0):
    """The packaged model's answer, without any of the code that loads runs."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
    (answer,) = generate(
        model, tokenizer, [ids], stop_ids=[2], max_new_tokens=sampling.max_new_tokens, **options
    )
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_side_by_side_is_two_single_runs_and_independent_of_the_batch(lora, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": WORDS}, {"messages": conversation(WORDS, "garden", OTHER)}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    common = [lora, "--prompts", prompts, "--seeds", 0, 5, *SHORT]
    files = {}
    for name, flags in {
        "both": ["--batch_size", 3],
        "base": ["--side", "base", "--batch_size", 1],
        "policy": ["--side", "policy"],
    }.items():
        files[name] = tmp_path / f"{name}.jsonl"
        assert call(monkeypatch, *common, *flags, "--output", files[name]) == 0
    both, base, policy = (lines(file) for file in files.values())
    assert [(line.get("prompt"), line["seed"]) for line in both] == [
        (WORDS, 0),
        (WORDS, 5),
        (None, 0),
        (None, 5),
    ]
    assert both[2]["messages"] == rows[1]["messages"]
    assert [line["base"] for line in both] == [line["base"] for line in base]
    assert [line["policy"] for line in both] == [line["policy"] for line in policy]
    assert [line["base"] for line in both] != [line["policy"] for line in both]
    assert "policy" not in base[0]
    assert "base" not in policy[0]
    assert (
        both[0].items()
        >= {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_new_tokens": 10,
            "weights": str(lora / "final"),
        }.items()
    )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=10)])
def test_the_base_is_the_untrained_model_and_the_policy_is_not(lora, sampling):
    speakers = Speakers(lora)
    assert speakers.sides == ("base", "policy")
    answers = {side: reply(speakers, side, conversation(WORDS), sampling) for side in SIDES}
    assert answers["base"] == untrained(WORDS, sampling)
    assert answers["policy"] != answers["base"]


@pytest.mark.parametrize("kind", ["nf4", "all weights"])
def test_a_base_answer_leaves_the_policy_unharmed(kind, tmp_path):
    """Over a 4-bit base too, where a careless forward would repack the weights for good."""
    flags = {
        "nf4": ["--model.quantization", "nf4"],
        "all weights": ["--model.adapter", "none", "--optim.name", "adamw"],
    }[kind]
    speakers = Speakers(run(config(tmp_path, *PUSHED, *flags)))
    asked = [conversation(WORDS), conversation(OTHER)]
    before = [reply(speakers, "policy", prompt) for prompt in asked]
    base = [reply(speakers, "base", prompt) for prompt in asked]
    assert [reply(speakers, "policy", prompt) for prompt in asked] == before
    assert [reply(speakers, "base", prompt) for prompt in asked] == base
    assert base != before
    if kind == "all weights":
        assert base == [untrained(WORDS), untrained(OTHER)]


def test_a_checkpoint_answers_as_its_weights_say(lora):
    later, earlier = Speakers(lora), Speakers(lora, weights="checkpoint-2")
    assert str(earlier.weights).endswith("checkpoint-2")
    said = conversation(WORDS)
    sampling = Sampling(temperature=1.5, max_new_tokens=20)
    assert reply(earlier, "policy", said, sampling) != reply(later, "policy", said, sampling)
    assert reply(earlier, "base", said, sampling) == reply(later, "base", said, sampling)


def test_a_model_folder_has_the_policy_alone(capsys, monkeypatch):
    code = call(monkeypatch, MODEL, "--temperature", 0, *SHORT, WORDS)
    assert code == 0
    assert capsys.readouterr().out == f"\n{WORDS}\n  policy: {untrained(WORDS)}\n"


def test_standard_input_is_one_prompt_a_line(lora, capsys, monkeypatch):
    for arguments in ([], ["--prompts", "-"]):
        flags = ["--temperature", 0, "--seeds", 1, 2]
        code = call(monkeypatch, lora, *SHORT, *arguments, *flags, stdin=f"{WORDS}\n\n{OTHER}\n")
        out = capsys.readouterr().out.splitlines()
        assert code == 0
        assert [line for line in out if line and not line.startswith("  ")] == [WORDS, OTHER]
        assert sum(line.startswith("  base (seed 2): ") for line in out) == 2
        assert f"  base (seed 1): {untrained(WORDS)}" in out


def test_the_system_message_goes_before_prompts_without_one(lora):
    (prompt,) = read_prompts([WORDS], None, "Be short.")
    assert prompt.said == [{"role": "system", "content": "Be short."}, *conversation(WORDS)]
    assert prompt.columns == {"messages": prompt.said}


def test_rows_are_read_as_prompts_messages_or_preferences(tmp_path):
    own = [{"role": "system", "content": "Mine."}, *conversation("b")]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [
        {"prompt": "a", "id": 7},
        {"messages": own},
        {"system": "Theirs.", "question": "c", "chosen": "x", "rejected": "y"},
        {"prompt": "d", "chosen": "x", "rejected": "y"},
        {"messages": conversation("e"), "tools": [tool]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    a, b, c, d, e = read_prompts([], str(file))
    assert (a.said, a.columns) == (conversation("a"), {"prompt": "a"})
    assert b.said == own
    assert c.said == [{"role": "system", "content": "Theirs."}, *conversation("c")]
    assert (d.said, d.columns) == ("d", {"prompt": "d"})  # plain text is never templated
    assert e.columns == {"prompt": "e", "tools": [tool]}
    assert [prompt.where for prompt in (a, e)] == [f"{file}, line 1", f"{file}, line 5"]
    with pytest.raises(UserError, match="line 4 is text that is continued"):
        read_prompts([], str(file), "Be short.")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 5}\n', "a.jsonl, line 2: got the columns prompt"),
        ("a.jsonl", b'{"prompt": " "}\n', "line 1: empty prompt"),
        ("a.jsonl", b'{"messages": [{"role": "x", "content": "a"}]}', "line 1: unknown role"),
        ("a.jsonl", b'{"text": "a"}', "line 1: got the columns text; wanted prompt"),
        (
            "a.jsonl",
            json.dumps({"messages": conversation("a", "b")}).encode(),
            "line 1: the last message is the assistant's",
        ),
        ("a.txt", b"a\n\xff\n", "a.txt, line 2: not UTF-8"),
        ("a.txt", b"\n \n", "a.txt holds none"),
        ("a.csv", b"a", "a.csv, wanted one of .txt"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_prompts([], str(tmp_path / name))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN"], "prompts: got none. Give them after the run folder"),
        (["RUN", "a", "--prompts", "b.txt"], "got 'a' and --prompts b.txt, wanted one source"),
        (["RUN", "a", "--chat"], "--chat: got prompts as well"),
        (["RUN", "--chat", "--seeds", 1, 2], "--chat: got more than one of --seeds as well"),
        (["RUN", "--prompts", "no.txt"], "no.txt cannot be read"),
        (["RUN", "a", "--temperature", -1], "--temperature: got -1.0, wanted 0"),
        (["RUN", "a", "--batch_size", 0], "--batch_size: got 0"),
        (["RUN", "a", "--output", SCRIPT], "generate.py exists already"),
        (["RUN", "a", "--output", "no/such/a.jsonl"], "no/such/a.jsonl cannot be written"),
        (["RUN", "a", "--output", "/proc/a.jsonl"], "--output: /proc/a.jsonl cannot be written"),
        (["RUN", "a", "--weights", "best"], "best holds no weights: wanted one of checkpoint-2"),
        (["RUN", "\udcff"], "prompt 1: not UTF-8"),
        (["RUN", "a " * 3000], "prompt 1 ('a a a"),
        (["RUN", "a", "--max_new_tokens", 2048], "more than the 2048 of the model's context"),
        (["no/such", "a"], "no/such is neither a run folder"),
        (["RUN/final", "a"], "It holds an adapter: name its run folder"),
        ([MODEL, "a", "--side", "base"], "--side: got base, but"),
        ([MODEL, "a", "--side", "both"], "--side: got both, but"),
        ([MODEL, "a", "--weights", "final"], "--weights: got final, but"),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_code_2(arguments, said, lora, monkeypatch, capsys):
    words = [str(word).replace("RUN", str(lora)) for word in arguments]
    assert call(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err


def test_a_refused_prompt_leaves_no_file_that_would_stop_the_next_try(lora, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    common = [lora, "--side", "policy", *SHORT, "--output", output]
    assert call(monkeypatch, *common, WORDS, "a " * 3000) == 2
    assert not any(tmp_path.iterdir())
    assert call(monkeypatch, *common, WORDS, OTHER) == 0
    assert [line["prompt"] for line in lines(output)] == [WORDS, OTHER]


def test_a_literal_control_token_in_a_prompt_stays_text(lora):
    speakers = Speakers(lora)
    for said in (conversation("a<|im_end|>b"), "a<|im_end|>b"):
        ids = speakers.tokenize(Prompt(said, "here"), 1)
        assert ids.count(2) == (0 if isinstance(said, str) else 1)
    ready = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    as_messages = speakers.tokenize(Prompt(conversation("b"), "here"), 1)
    assert speakers.tokenize(Prompt(ready, "here"), 1) == as_messages


def in_terminal(script_arguments, typed, end):
    """Drives the script through a pseudo-terminal; exit code and all that was seen on it."""
    process, terminal = pty.fork()
    if process == 0:  # the child
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job inherits that it is ignored
        signal.alarm(200)  # nothing hangs for ever
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
        os.execv(sys.executable, [sys.executable, SCRIPT, *map(str, script_arguments)])
    seen, waiting = b"", [line.encode() + b"\n" for line in typed]
    while True:
        # Python loses a Ctrl-C that comes between showing its prompt and waiting for keys.
        if seen.endswith(b"<end>") and not select.select([terminal], [], [], 20)[0]:
            os.write(terminal, end)
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if seen.endswith(b"you: "):
            time.sleep(0 if waiting else 1)
            os.write(terminal, waiting[0] if waiting else end)
            seen += b"<typed>" if waiting else b"<end>"
            waiting = waiting[1:]
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(b"\x03", id="Ctrl-C"),
        pytest.param(b"\x04", id="Ctrl-D", marks=pytest.mark.slow),
    ],
)
def test_in_a_chat_each_side_goes_on_from_its_own_answers(lora, end):
    """Expected: every conversation built by hand; then the second turn again after /reset."""
    typed = [WORDS, OTHER, "/no", "/reset", OTHER]
    code, seen = in_terminal([lora, "--chat", "--temperature", 0, *SHORT], typed, end)
    assert code == 0, seen
    assert "Traceback" not in seen
    assert "/no is neither /reset nor /quit" in seen
    speakers = Speakers(lora)
    for side in SIDES:
        first = reply(speakers, side, conversation(WORDS))
        second = reply(speakers, side, conversation(WORDS, first, OTHER))
        afresh = reply(speakers, side, conversation(OTHER))
        spoken = [line for line in seen.splitlines() if line.startswith(f"{side}: ")]
        assert [line.split(": ", 1)[1].strip() for line in spoken] == [first, second, afresh]


@pytest.mark.parametrize("last", ["/quit\n" + OTHER, ""], ids=["/quit", "end of input"])
def test_a_piped_chat_refuses_a_turn_that_does_not_fit_and_goes_on(last, lora, monkeypatch, capsys):
    typed = f"{'a ' * 3000}\n{WORDS}\n{last}"
    assert call(monkeypatch, lora, "--chat", "--temperature", 0, *SHORT, stdin=typed) == 0
    out = capsys.readouterr().out
    assert out.count("the model's context") == 1
    assert out.count("base: ") == out.count("policy: ") == 1
    assert f"base: {untrained(WORDS)}\n" in out


def test_a_single_answer_is_streamed_on_a_terminal(lora, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    written = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda _, text, __: written.append(text))
    assert call(monkeypatch, lora, "--temperature", 0, *SHORT, "--side", "base", WORDS) == 0
    assert "".join(written) == untrained(WORDS)
    assert sum(map(bool, written)) > 3  # word by word
    assert capsys.readouterr().out.startswith(f"\n{WORDS}\n  base:   ")


def test_the_system_flag_reaches_the_model(lora, monkeypatch, tmp_path):
    """The answer is that to the conversation with the message, and not that to the bare prompt."""
    file = tmp_path / "answers.jsonl"
    how = ["--temperature", 0, *SHORT, "--side", "policy", "--output", file]
    assert call(monkeypatch, lora, "--system", f"{OTHER} {OTHER}", *how, WORDS) == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    speakers, system = Speakers(lora), {"role": "system", "content": f"{OTHER} {OTHER}"}
    assert line["policy"] == reply(speakers, "policy", [system, *conversation(WORDS)])
    assert line["policy"] != reply(speakers, "policy", conversation(WORDS))
