"""The command line: which file and flags make which configuration, and what is refused."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dpo.cli import QUICKSTART, known_keys, parse, save
from dpo.config import Config, DataSource, LossConfig
from dpo.errors import UserError


@pytest.fixture
def written(tmp_path):
    """A function that writes a configuration file and returns the arguments that name it."""

    def write(text):
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def refusal(argv):
    with pytest.raises(UserError) as caught:
        parse(argv)
    return str(caught.value)


def test_known_keys_are_every_section_and_key_once():
    keys = known_keys()
    assert len(keys) == len(set(keys))
    nested = asdict(Config())
    assert keys == [f"{section}.{key}" for section in nested for key in nested[section]]


# ------------------------------------------------------------------------------- file and flags


def test_without_a_config_it_starts_from_the_quickstart():
    """Each key that the file names has the file's value, every other its default."""
    config = parse([])
    given = yaml.safe_load(QUICKSTART.read_text())
    assert config.model.name_or_path == "quickstart/model"
    for section, defaults in asdict(Config()).items():
        assert asdict(config)[section] == defaults | given.get(section, {})


def test_a_flag_overrides_the_quickstart_and_leaves_the_rest():
    config, quickstart = parse(["--loss.beta", "0.3", "--train.seed=7"]), parse([])
    assert (config.loss.beta, config.train.seed) == (0.3, 7)
    quickstart.loss.beta, quickstart.train.seed = 0.3, 7
    assert config == quickstart


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.name_or_path", "my/pairs.jsonl"],
        ["--data.name_or_path=my/pairs.jsonl"],
        ["--data", '{"name_or_path": "my/pairs.jsonl"}'],
    ],
    ids=["two words", "equals", "a section as JSON"],
)
def test_other_data_drops_the_quickstarts_held_out_rows_and_ground_truth(flags):
    config = parse(flags)
    assert config.data.name_or_path == "my/pairs.jsonl"
    assert config.data.eval_path is None
    assert config.train.eval_exact_match is False
    assert config.train.metric_for_best_model is None
    assert config.train.tokens_per_microbatch == "auto"
    assert config.optim == parse([]).optim


def test_the_quickstarts_own_data_keeps_its_held_out_rows():
    """The negative control of the test above: it is other data that drops them, not the flag."""
    config = parse(["--data.name_or_path", "quickstart/train.jsonl"])
    assert config == parse([])
    assert config.data.eval_path == "quickstart/eval.jsonl"
    assert config.train.eval_exact_match is True


def test_other_data_with_held_out_rows_of_its_own_keeps_those():
    config = parse(["--data.name_or_path", "my/pairs.jsonl", "--data.eval_path", "my/eval.jsonl"])
    assert config.data.eval_path == "my/eval.jsonl"


def test_another_model_gets_the_articles_loss_and_optimizer_and_says_so():
    """The quickstart's learning rate of 1e-3 would destroy any other model."""
    config = parse(["--model.name_or_path", "some/model"])
    assert (config.loss, config.optim) == (Config().loss, Config().optim)
    assert config.note.startswith("loss.* and optim.* start from the article's values (beta 0.1")
    config = parse(["--model.name_or_path", "some/model", "--loss.beta", "0.2"])
    assert (config.loss.beta, config.optim.learning_rate) == (0.2, 5e-5)
    own = parse(["--model.dtype", "bfloat16"])
    assert (own.loss.beta, own.optim.learning_rate) == (0.3, 1e-3)
    assert own.note == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["[q_proj, v_proj]"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
    ],
)
def test_a_list_may_be_written_as_words(words, expected):
    config = parse(["--lora.target_modules", *words, "--loss.beta", "0.2"])
    assert (config.lora.target_modules, config.loss.beta) == (expected, 0.2)
    config = parse(["--train.max_steps", "3", "--lora.target_modules", *words])
    assert (config.lora.target_modules, config.train.max_steps) == (expected, 3)


def test_home_and_variables_are_expanded_in_every_path(written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BASE", "/models")
    flags = ["--train.output_dir", "~/runs/a", "--data.eval_path", "$BASE/held_out.jsonl"]
    flags += ["--reference.cache", "~/cache", "--data.chat_template", "${BASE}/t.jinja"]
    config = parse([*written("model: {name_or_path: '${BASE}/7b'}"), *flags])
    assert config.model.name_or_path == "/models/7b"
    assert config.train.output_dir == "/home/me/runs/a"
    assert config.data.eval_path == "/models/held_out.jsonl"
    assert config.data.chat_template == "/models/t.jinja"
    assert config.reference.cache == "/home/me/cache"
    sources = "data: {name_or_path: [{path: ~/a.jsonl}, {path: org/rows}]}"
    sources = parse(written(sources)).data.name_or_path
    assert [source.path for source in sources] == ["/home/me/a.jsonl", "org/rows"]


def test_a_saved_configuration_has_absolute_paths_and_keeps_hub_ids(tmp_path, monkeypatch):
    """So that a run can be evaluated from any working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "auto"):
        Path(name).write_text("")
    config = parse(["--model.name_or_path", "org/model", "--data.name_or_path", "rows.jsonl"])
    Path("runs").mkdir()
    config.train.output_dir = "runs"
    save(config, tmp_path / "saved.yaml")
    assert config.data.name_or_path == "rows.jsonl"  # what is printed stays short
    monkeypatch.chdir("/")
    again = parse(["--config", str(tmp_path / "saved.yaml")])
    assert again.data.name_or_path == str(tmp_path / "rows.jsonl")
    assert again.train.output_dir == str(tmp_path / "runs")
    assert again.model.name_or_path == "org/model"
    assert again.reference.cache == "auto"  # a word, although there is a file of that name


def test_with_a_config_it_starts_from_the_defaults(written):
    config = parse(written("loss:\n  beta: 0.3\ntrain:\n  report_to: [tensorboard, wandb]\n"))
    assert config.train.report_to == ["tensorboard", "wandb"]
    config.train.report_to = "tensorboard"
    assert config == Config(loss=LossConfig(beta=0.3))


@pytest.mark.parametrize("config_first", [True, False])
def test_flags_override_the_file(written, config_first):
    file, flag = written("loss:\n  beta: 0.3\n  type: ipo\n"), ["--loss.beta", "0.5"]
    config = parse([*file, *flag])
    assert (config.loss.type, config.loss.beta) == ("ipo", 0.5)


def test_the_equals_form_of_config_reads_the_file_too(written):
    _, path = written("loss:\n  beta: 0.3\n")
    assert parse([f"--config={path}"]) == Config(loss=LossConfig(beta=0.3))


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_a_learning_rate_may_be_written_in_any_way(written, text):
    """YAML 1.1 reads 1e-5 as a word; a user means the number."""
    assert parse(written(f"optim:\n  learning_rate: {text}\n")).optim.learning_rate == 1e-5
    assert parse(["--optim.learning_rate", text]).optim.learning_rate == 1e-5


SOURCES = """
data:
  name_or_path:
    - path: a/pairs
      weight: 2
    - path: b.jsonl
      format: ultrafeedback
      split: test
"""


def test_data_may_be_a_list_of_sources(written):
    config = parse(written(SOURCES))
    assert config.data.name_or_path == [
        DataSource(path="a/pairs", weight=2.0),
        DataSource(path="b.jsonl", weight=1.0, format="ultrafeedback", split="test"),
    ]


@pytest.mark.parametrize(
    "argv",
    [[], ["--data.name_or_path", "x"], ["--data.revision", "main", "--lora.init", "gaussian"]],
    ids=["quickstart", "other data", "strings where null and true stood"],
)
def test_a_saved_configuration_is_read_back_equal(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where none of its paths exists: they would be saved as absolute
    config = parse(argv)
    save(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_saved_list_of_sources_is_read_back_equal(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(
        [*written(SOURCES), "--lora.target_modules", "[q_proj, v_proj]", "--data.subset", "Größe"]
    )
    save(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(asdict(Config()))


# ---------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--train.sed", "train.seed"),
        ("--trian.seed", "train.seed"),
        ("--optim.lr", "optim.learning_rate"),
        ("--loss.label_smooting", "loss.label_smoothing"),
        ("--learning_rate", "optim.learning_rate"),
        ("--beta", "loss.beta"),
        ("--train.see", "train.seed"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_key(flag, nearest):
    """Abbreviations too: --train.see is not train.seed, nor --optim.lr lr_scheduler_type."""
    message = refusal([flag, "3"])
    assert f"unknown key {flag.removeprefix('--')}." in message
    assert nearest in re.search(r"Nearest: (.*?)\. ", message)[1].split(", ")
    assert "dpo train --help" in message


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("train:\n  sed: 3\n", "train.sed", "train.seed"),
        ("trian:\n  seed: 3\n", "trian.seed", "train.seed"),
        ("learning_rate: 3\n", "learning_rate", "optim.learning_rate"),
        ("loss:\n  beta: 0.1\n  label_smooting: 0.1\n", "loss.label_smooting", "loss.label_smooth"),
    ],
)
def test_an_unknown_key_in_the_file_is_refused_with_the_nearest(written, text, unknown, nearest):
    message = refusal(written(text))
    assert f"unknown key {unknown}." in message
    assert nearest in re.search(r"Nearest: (.*?)\. ", message)[1]


def test_an_abbreviated_config_flag_is_not_read_on_top_of_the_quickstart(written):
    _, path = written("loss:\n  beta: 0.3\n")
    assert "unknown key conf." in refusal(["--conf", path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  - path: a\n    weigth: 2", "Unknown key weigth"),
        ("  - weight: 2", "only path is required"),
        ("  - a\n  - b", "path: ID_OR_FILE"),
    ],
    ids=["unknown key", "no path", "bare names"],
)
def test_a_malformed_source_is_refused_in_words(written, text, said):
    message = refusal(written(f"data:\n  name_or_path:\n{text}\n"))
    assert message.startswith("data.name_or_path: wanted")
    assert said in message
    assert "path, weight, format, split" in message
    assert "Namespace" not in message
    assert "<class" not in message


# ----------------------------------------------------------------------------------- bad values


def test_a_value_outside_its_range_is_refused_from_flag_and_file(written):
    assert "loss.beta: got 0.0, wanted" in refusal(["--loss.beta", "0"])
    assert "loss.beta: got -1.0, wanted" in refusal(written("loss:\n  beta: -1\n"))


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("optim.learning_rate", "high", "wanted float"),
        ("optim.learning_rate", "nan", "wanted float"),
        ("lora.r", "1.5", "wanted int"),
        ("train.save_steps", "true", "wanted int"),
        ("model.dtype", "float8", "'auto', 'float32', 'bfloat16', 'float16'"),
        ("reference.mode", "none", "'auto', 'adapter', 'frozen', 'zero'"),
        ("train.gradient_checkpointing", "maybe", "wanted bool"),
        ("train.tokens_per_microbatch", "many", "'auto'"),
        ("train.peak_tflops", "many", "wanted float"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_key_got_and_wanted(key, given, wanted):
    message = refusal([f"--{key}", given])
    assert message.startswith(f"{key}: got ")
    assert given in message.lower()
    assert wanted in message
    assert f"--{key}" in message
    assert "<class" not in message


# -------------------------------------------------------------------------------- broken files


def test_a_missing_file_is_a_users_error(tmp_path):
    message = refusal(["--config", str(tmp_path / "nowhere.yaml")])
    assert "nowhere.yaml" in message
    assert "not exist" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: [\n", "line 2"),
        ("", "the file is empty"),
        ("- 1\n", "not made of sections"),
        ("optim: 3\n", "optim: got 3, wanted its keys"),
        ("loss:\n  beta: 0.1\noptim:\n", "optim: got None, wanted its keys"),
        ("train:\n  seed:\n", "train.seed: got None, wanted a value such as 42"),
    ],
    ids=["syntax", "empty", "a list", "a number as section", "an empty section", "null"],
)
def test_a_broken_file_is_a_users_error(written, text, said):
    assert said in refusal(written(text))


def test_a_file_that_is_no_text_is_a_users_error(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(["--config", str(tmp_path / "weights.yaml")]).startswith("configuration: ")


def test_a_flag_without_its_value_and_a_stray_word_are_users_errors():
    assert "--config" in refusal(["--config"])
    assert "stray" in refusal(["stray"])


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [(["--help"], 0, "--loss.beta"), (["--lora.rank", "8"], 2, "unknown key lora.rank")],
)
def test_help_and_a_misspelt_key_do_not_wait_for_torch(flags, code, said):
    run = (
        "import sys, dpo.cli\n"
        "try: dpo.cli.run_command(dpo.cli.parse)\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", run, *flags], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_a_script_says_one_line_and_exits_with_2():
    code = "from dpo.cli import parse, run_command; run_command(parse)"
    flags = ["--loss.beta", "0"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: loss.beta: got 0.0, wanted a number above 0. "
        "Change it in the config or by --loss.beta."
    ]
    assert done.stdout == ""


@pytest.mark.parametrize(
    "key",
    [
        "model.name_or_path",
        "data.name_or_path",
        "data.eval_path",
        "reference.cache",
        "train.output_dir",
        "train.resume",
    ],
)
def test_an_address_is_refused_at_once_where_a_path_is_wanted(key):
    with pytest.raises(UserError, match=r"s3://bucket/x: got an address, wanted a path"):
        parse([f"--{key}", "s3://bucket/x"])
