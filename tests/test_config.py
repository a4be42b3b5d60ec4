import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml

from dpo.config import (
    _RANGES,
    PACKAGE,
    QUICKSTART,
    Config,
    DataConfig,
    DataSource,
    LoraConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    TrainConfig,
    known_keys,
    parse,
    resolve,
    save,
)
from dpo.errors import UserError

ARTICLE = {
    "model.name_or_path": "teknium/OpenHermes-2.5-Mistral-7B",
    "model.dtype": "bfloat16",
    "model.quantization": "fp4",
    "model.adapter": "lora",
    "lora.r": 16,
    "lora.alpha": 16,
    "lora.dropout": 0.05,
    "data.name_or_path": "Intel/orca_dpo_pairs",
    "data.max_prompt_length": 1024,
    "data.max_length": 1536,
    "loss.type": "sigmoid",
    "loss.beta": 0.1,
    "loss.label_smoothing": 0.0,
    "optim.name": "paged_adamw_32bit",
    "optim.learning_rate": 5e-5,
    "optim.lr_scheduler_type": "cosine",
    "optim.warmup_steps": 100,
    "train.per_device_train_batch_size": 4,
    "train.gradient_accumulation_steps": 4,
    "train.max_steps": 200,
}

CONTRACT = """
model: name_or_path revision dtype quantization adapter attention trust_remote_code
lora: r alpha dropout target_modules init use_rslora use_dora
data: name_or_path subset revision split format eval_fraction eval_path max_prompt_length
    max_length on_overlong chat_template
loss: type beta label_smoothing
reference: mode cache
optim: name learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm
train: output_dir per_device_train_batch_size gradient_accumulation_steps max_steps
    num_train_epochs tokens_per_microbatch gradient_checkpointing seed logging_steps eval_steps
    save_steps save_total_limit resume report_to
"""


def contract_keys():
    section = None
    for word in CONTRACT.split():
        if word.endswith(":"):
            section = word[:-1]
        else:
            yield f"{section}.{word}"


def value(config, key):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_values(values):
    """The defaults with some keys set, not yet checked."""
    config = Config()
    for key, given in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, given)
    return config


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


# ------------------------------------------------------------------------------------- defaults


def test_memory_is_for_the_token_budget_to_mind_and_not_for_checkpointing():
    """The one setting of the article's that is another here: on with it, and it changes no number.
    Micro-batches that fit cost nothing, recomputed activations half of the policy's work again."""
    assert not Config().train.gradient_checkpointing
    assert Config().train.tokens_per_microbatch == "auto"


@pytest.mark.parametrize(("key", "wanted"), ARTICLE.items(), ids=ARTICLE)
def test_the_defaults_are_the_articles_values(key, wanted):
    assert value(Config(), key) == wanted


@pytest.mark.parametrize("key", [*contract_keys()])
def test_every_key_of_the_contract_exists(key):
    assert key in known_keys()
    value(Config(), key)


def test_known_keys_are_every_section_and_key_once():
    keys = known_keys()
    assert len(keys) == len(set(keys))
    nested = asdict(Config())
    assert keys == [f"{section}.{key}" for section in nested for key in nested[section]]


def test_every_range_is_of_a_key_that_exists():
    assert set(_RANGES) <= set(known_keys())


def test_the_defaults_can_be_honoured():
    Config().check()


# ------------------------------------------------------------------------------- file and flags


def test_without_a_config_it_starts_from_the_quickstart():
    """Each key that the file names has the file's value, every other its default."""
    config = parse([])
    given = yaml.safe_load(QUICKSTART.read_text())
    assert config.model.name_or_path == "quickstart/model"
    for key in known_keys():
        section, name = key.split(".")
        assert value(config, key) == given.get(section, {}).get(name, value(Config(), key))


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
def test_a_saved_configuration_is_read_back_equal(argv, tmp_path):
    config = parse(argv)
    save(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_saved_list_of_sources_is_read_back_equal(written, tmp_path):
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
    assert "scripts/train.py --help" in message


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
        ("  - weight: 2", "only path must be there"),
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

OUTSIDE = {
    "lora.r": [0, -1],
    "lora.alpha": [0.0, -16.0, float("inf")],
    "lora.dropout": [-0.1, 1.0],
    "data.eval_fraction": [-0.1, 1.0],
    "data.max_prompt_length": [0, -1],
    "loss.beta": [0.0, -0.1, float("inf"), float("nan")],
    "loss.label_smoothing": [-0.1, 0.5, 1.0],
    "optim.learning_rate": [0.0, -5e-5, float("inf"), float("nan")],
    "optim.warmup_steps": [-1],
    "optim.weight_decay": [-0.1, float("inf"), float("nan")],
    "optim.max_grad_norm": [-1.0, float("nan")],
    "train.per_device_train_batch_size": [0, -4],
    "train.gradient_accumulation_steps": [0, -4],
    "train.num_train_epochs": [0, -1],
    "train.tokens_per_microbatch": [0, -1],
    "train.peak_tflops": [0.0, -1.0, float("inf")],
    "train.seed": [-1],
    "train.logging_steps": [0, -1],
    "train.eval_steps": [-1],
    "train.eval_prompts": [-1],
    "train.eval_max_new_tokens": [0],
    "train.save_steps": [-1],
    "train.save_total_limit": [0],
}
AT_THE_EDGE = {
    "lora.dropout": 0.0,
    "data.eval_fraction": 0.0,
    "loss.label_smoothing": 0.49,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 0.0,
    "train.seed": 0,
    "train.eval_steps": 0,
    "train.save_steps": 0,
    "lora.r": 1,
    "train.save_total_limit": 1,
    "train.max_steps": -1,
    "optim.learning_rate": 1e-12,
}


def test_every_range_is_tried_below():
    assert set(OUTSIDE) == set(_RANGES)


@pytest.mark.parametrize(
    ("key", "given"), [(key, given) for key, values in OUTSIDE.items() for given in values]
)
def test_a_value_outside_its_range_is_refused_with_key_got_and_wanted(key, given):
    wanted, _ = _RANGES[key]
    with pytest.raises(UserError) as caught:
        with_values({key: given}).check()
    message = f"{key}: got {given!r}, wanted {wanted}. Change it in the config or by --{key}."
    assert str(caught.value) == message


@pytest.mark.parametrize(("key", "given"), AT_THE_EDGE.items(), ids=AT_THE_EDGE)
def test_a_value_at_the_edge_of_its_range_is_accepted(key, given):
    """The negative control of the test above."""
    with_values({key: given}).check()


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


def test_a_loss_that_is_not_there_is_refused_with_the_ones_that_are():
    message = refusal(["--loss.type", "dpo"])
    assert message.startswith("loss.type: got 'dpo', wanted one of sigmoid, ipo, hinge")


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_an_option_that_the_loss_does_not_have_is_refused(loss):
    message = refusal(["--loss.type", loss, "--loss.label_smoothing", "0.1"])
    assert message.startswith("loss.label_smoothing: got 0.1, wanted 0.0 (its default)")
    assert f"the {loss} loss has no such option" in message


def test_the_options_of_a_loss_are_those_that_its_function_takes():
    assert LossConfig(beta=0.2, label_smoothing=0.1).options == {
        "beta": 0.2,
        "label_smoothing": 0.1,
    }
    assert LossConfig(type="ipo", beta=0.2).options == {"beta": 0.2}


COMBINATIONS = {
    "quantised weights cannot train": (
        {"model": ModelConfig(adapter="none", quantization="nf4")},
        "model.quantization: got 'nf4', wanted none",
    ),
    "an adapter reference needs an adapter": (
        {
            "model": ModelConfig(adapter="none", quantization="none"),
            "reference": ReferenceConfig(mode="adapter"),
        },
        "reference.mode: got 'adapter', wanted auto, frozen or zero",
    ),
    "a frozen copy beside an adapter is waste": (
        {"reference": ReferenceConfig(mode="frozen")},
        "reference.mode: got 'frozen', wanted auto or adapter",
    ),
    "held-out rows come from one place": (
        {"data": DataConfig(eval_path="e.jsonl", eval_fraction=0.1)},
        "data.eval_fraction: got 0.1, wanted 0",
    ),
    "a prompt leaves room for an answer": (
        {"data": DataConfig(max_prompt_length=1536)},
        "data.max_prompt_length: got 1536, wanted less than data.max_length (1536)",
    ),
    "no steps at all": (
        {"train": TrainConfig(max_steps=0)},
        "train.max_steps: got 0, wanted a positive number, or -1",
    ),
    "a negative number of steps": (
        {"train": TrainConfig(max_steps=-2)},
        "train.max_steps: got -2, wanted a positive number, or -1",
    ),
    "the best by a metric that nobody measures": (
        {"train": TrainConfig(metric_for_best_model="eval/loss")},
        "train.metric_for_best_model: got 'eval/loss', wanted null",
    ),
    "exact match of no prompts": (
        {"train": TrainConfig(eval_exact_match=True)},
        "train.eval_prompts: got 0, wanted at least 1",
    ),
    "a source of weight zero": (
        {"data": DataConfig(name_or_path=[DataSource(path="a", weight=0.0)])},
        "data.name_or_path: got 0.0, wanted a weight above 0 for a.",
    ),
}


@pytest.mark.parametrize(("sections", "said"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_what_cannot_be_honoured_together_is_refused(sections, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        Config(**sections).check()


@pytest.mark.parametrize(
    "sections",
    [
        {"model": ModelConfig(adapter="none", quantization="none")},
        {
            "model": ModelConfig(adapter="none", quantization="none"),
            "reference": ReferenceConfig(mode="frozen"),
        },
        {"reference": ReferenceConfig(mode="adapter")},
        {"reference": ReferenceConfig(mode="zero")},
        {
            "data": DataConfig(eval_fraction=0.1),
            "train": TrainConfig(metric_for_best_model="eval/loss"),
        },
        {"train": TrainConfig(max_steps=50)},  # shorter than the 100 steps of warm-up: allowed
        {
            "lora": LoraConfig(target_modules=["q_proj"], use_rslora=True, use_dora=True),
            "model": ModelConfig(dtype="float32"),
        },
    ],
)
def test_what_can_be_honoured_together_is_accepted(sections):
    """The negative control of the test above."""
    Config(**sections).check()


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


def test_a_script_says_one_line_and_exits_with_2():
    code = "from dpo.config import parse, run; run(parse)"
    flags = ["--loss.beta", "0"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: loss.beta: got 0.0, wanted a number above 0. "
        "Change it in the config or by --loss.beta."
    ]
    assert done.stdout == ""


# -------------------------------------------------------------------------------------- resolve


def test_quickstart_paths_are_those_of_the_package_and_others_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("quickstart/train.jsonl") == str(PACKAGE / "quickstart" / "train.jsonl")
    assert resolve("Intel/orca_dpo_pairs") == "Intel/orca_dpo_pairs"
    assert resolve("./quickstart/train.jsonl") == "./quickstart/train.jsonl"


def test_a_users_own_quickstart_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "train.jsonl").touch()
    assert resolve("quickstart/train.jsonl") == "quickstart/train.jsonl"


def test_the_best_model_is_chosen_by_a_metric_that_is_measured_and_has_a_direction():
    held_out = ["--config", str(QUICKSTART), "--train.metric_for_best_model"]
    assert "wanted null or one of eval/loss" in refusal([*held_out, "eval/los"])
    assert "wanted null or one of eval/loss" in refusal([*held_out, "eval/lengths/chosen"])
    unmeasured = ["--train.eval_exact_match", "false"]
    assert "train.eval_exact_match: got False" in refusal(unmeasured)
    unmeasured += ["--train.eval_prompts", "0", "--train.metric_for_best_model", "eval/kl"]
    assert "train.eval_prompts: got 0" in refusal(unmeasured)


def test_dora_wants_float32_and_adapters_start_where_the_reference_is():
    assert "lora.use_dora: got True" in refusal(
        ["--lora.use_dora", "true", "--model.dtype", "bfloat16"]
    )
    assert "lora.init: got 'pissa', wanted true or gaussian" in refusal(["--lora.init", "pissa"])
    assert "model.dtype: got 'float16'" in refusal(
        ["--model.adapter", "none", "--model.dtype", "float16"]
    )
    assert "data.eval_split: got 'test'" in refusal(
        ["--data.name_or_path", "x", "--data.eval_split", "test"]
    )
