import math
import re

import pytest

from dpo.config import (
    _RANGES,
    PACKAGE,
    Config,
    DataConfig,
    DataSource,
    LoraConfig,
    LossConfig,
    LossPart,
    ModelConfig,
    ReferenceConfig,
    TrainConfig,
)
from dpo.errors import UserError
from dpo.objective import HELD_BY_REFERENCE

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


def refusal(values):
    with pytest.raises(UserError) as caught:
        with_values(values).check()
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
    value(Config(), key)


def test_every_range_is_of_a_key_that_exists():
    for key in _RANGES:
        value(Config(), key)


def test_the_defaults_can_be_honoured():
    Config().check()


# ----------------------------------------------------------------------------------- bad values

OUTSIDE = {
    "lora.r": [0, -1],
    "lora.alpha": [0.0, -16.0, float("inf")],
    "lora.dropout": [-0.1, 1.0],
    "data.eval_fraction": [-0.1, 1.0],
    "data.max_dropped": [-0.1, 1.1],
    "data.max_prompt_length": [0, -1],
    "loss.beta": [0.0, -0.1, float("inf"), float("nan")],
    "loss.label_smoothing": [-0.1, 0.5, 1.0],
    "loss.ld_alpha": [-0.1, 1.1, float("nan")],
    "reference.update_steps": [0, -1],
    "reference.update_alpha": [0.0, -0.1, 1.1],
    "optim.learning_rate": [0.0, -5e-5, float("inf"), float("nan")],
    "optim.warmup_steps": [-1],
    "optim.warmup_ratio": [-0.1, 1.0],
    "optim.weight_decay": [-0.1, float("inf"), float("nan")],
    "optim.max_grad_norm": [-1.0, float("nan")],
    "train.per_device_train_batch_size": [0, -4],
    "train.gradient_accumulation_steps": [0, -4],
    "train.num_train_epochs": [0, -1],
    "train.tokens_per_microbatch": [0, -1],
    "train.peak_tflops": [0.0, -1.0, float("inf")],
    "train.seed": [-1, 2**32],
    "train.logging_steps": [0, -1],
    "train.eval_steps": [-1],
    "train.eval_prompts": [-1],
    "train.eval_max_new_tokens": [0],
    "train.save_steps": [-1],
    "train.save_total_limit": [0],
    "train.timeout_minutes": [0, -1.0],
    "train.patience": [0, -1],
}
AT_THE_EDGE = {
    "lora.dropout": 0.0,
    "data.eval_fraction": 0.0,
    "data.max_dropped": 1.0,
    "loss.label_smoothing": 0.49,
    "optim.warmup_steps": 0,
    "optim.warmup_ratio": 0.0,
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
    message = f"{key}: got {given!r}, wanted {wanted}. Change it in the config or by --{key}."
    assert refusal({key: given}) == message


@pytest.mark.parametrize(("key", "given"), AT_THE_EDGE.items(), ids=AT_THE_EDGE)
def test_a_value_at_the_edge_of_its_range_is_accepted(key, given):
    """The negative control of the test above."""
    with_values({key: given}).check()


def test_a_loss_that_is_not_there_is_refused_with_the_ones_that_are():
    message = refusal({"loss.type": "dpo"})
    assert message.startswith("loss.type: got 'dpo', wanted one of sigmoid, ipo, hinge")


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_an_option_that_the_loss_does_not_have_is_refused(loss):
    message = refusal({"loss.type": loss, "loss.label_smoothing": 0.1})
    assert message.startswith("loss.label_smoothing: got 0.1, wanted 0.0 (its default)")
    assert f"the {loss} loss has no such option" in message


def test_the_arguments_of_a_loss_are_those_that_its_function_takes():
    def parts(**settings):
        return [(name, weight, given) for name, weight, given in LossConfig(**settings).parts]

    smoothed = {"beta": 0.2, "label_smoothing": 0.1}
    assert parts(beta=0.2, label_smoothing=0.1) == [("sigmoid", 1.0, smoothed)]
    assert parts(type="ipo", beta=0.2) == [("ipo", 1.0, {"beta": 0.2})]
    focal = {"beta": 0.2, "gamma": 2.0}
    assert parts(type="focal", beta=0.2, options={"gamma": 2.0}) == [("focal", 1.0, focal)]
    both = [LossPart(type="sigmoid", weight=0.8), LossPart(type="sft", options={"beta": 3.0})]
    assert parts(type=both, beta=0.2, label_smoothing=0.1) == [
        ("sigmoid", 0.8, smoothed),
        ("sft", 1.0, {"beta": 3.0}),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "discopop", "options": {"temperatur": 1.0}}, "got temperatur, wanted one of"),
        ({"type": "nca_pair", "options": {"gamma": 1.0}}, "got gamma, wanted none"),
        ({"type": "focal", "options": {"gamma": -1.0}}, "got gamma -1.0, wanted 0 or more"),
        ({"type": "focal", "options": {"gamma": "x"}}, "got gamma 'x', wanted 0 or more"),
        ({"type": "focal", "options": {"gamma": True}}, "got gamma True, wanted 0 or more"),
        ({"type": "focal", "options": {"gamma": math.inf}}, "got gamma inf, wanted 0 or more"),
        ({"type": "sigmoid", "options": {"divergence": "kl"}}, "wanted reverse_kl, forward_kl"),
        ({"type": "sigmoid", "options": {"label_smoothing": 0.5}}, "below 0.5"),
        ({"type": "robust"}, "got 0.0, wanted above 0 and below 0.5: robust"),
        ({"type": "exo_pair"}, "got 0.0, wanted above 0 and below 0.5: exo_pair"),
        ({"type": []}, "wanted a loss, or a list of some"),
        ({"type": [{"type": "sigmoid", "weight": 0.0}]}, "wanted a weight above 0 for sigmoid"),
        ({"type": [{"type": "dpo"}]}, "got 'dpo', wanted one of sigmoid"),
        ({"type": [{"type": "sigmoid"}], "options": {"a": 1}}, "wanted no options beside a list"),
        ({"type": [{"type": "ipo"}], "label_smoothing": 0.1}, "the ipo loss has no such option"),
    ],
)
def test_a_loss_that_cannot_be_honoured_is_refused(settings, said):
    if isinstance(settings["type"], list):
        settings = settings | {"type": [LossPart(**part) for part in settings["type"]]}
    with pytest.raises(UserError) as refused:
        Config(loss=LossConfig(**settings)).check()
    assert said in str(refused.value)
    assert str(refused.value).startswith("loss.")


@pytest.mark.parametrize("name", sorted(HELD_BY_REFERENCE))
def test_a_loss_that_its_reference_holds_is_refused_without_one(name):
    reference = ReferenceConfig(mode="zero")
    with pytest.raises(UserError, match=f"reference.mode: got zero, .* since {name} is held"):
        Config(loss=LossConfig(type=name), reference=reference).check()
    Config(loss=LossConfig(type=name)).check()
    bent = LossConfig(type="sigmoid", options={"divergence": "js"})
    with pytest.raises(UserError, match="since sigmoid is held by its reference"):
        Config(loss=bent, reference=reference).check()


def test_a_run_whose_losses_read_no_reference_has_none():
    simpo, dpo = LossPart(type="simpo"), LossPart(type="sigmoid")
    assert Config(loss=LossConfig(type="simpo")).reference_mode == "zero"
    assert Config(loss=LossConfig(type=[simpo, dpo])).reference_mode == "auto"
    given = ReferenceConfig(mode="adapter")
    assert Config(loss=LossConfig(type="simpo"), reference=given).reference_mode == "adapter"


def test_to_read_a_configuration_imports_no_loss_of_ones_own():
    Config(loss=LossConfig(type="no_such_module:loss", options={"x": 1})).check()


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
    "patience without a metric": (
        {"train": TrainConfig(patience=2, eval_steps=5)},
        "train.metric_for_best_model: got None, wanted one of eval/loss,",
    ),
    "patience without evaluations to count": (
        {
            "data": DataConfig(eval_fraction=0.1),
            "train": TrainConfig(patience=2, metric_for_best_model="eval/loss"),
        },
        "train.eval_steps: got 0, wanted at least 1, since train.patience",
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
        {
            "data": DataConfig(eval_fraction=0.1),
            "train": TrainConfig(patience=1, eval_steps=1, metric_for_best_model="eval/loss"),
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


# ---------------------------------------------------------------------------------------- paths

NAMED = [
    lambda name: ModelConfig(name_or_path=name).path,
    lambda name: DataSource(path=name).location,
    lambda name: DataConfig(eval_path=name).eval_source.location,
]


@pytest.mark.parametrize("found", NAMED, ids=["model", "source", "held-out rows"])
def test_quickstart_paths_are_those_of_the_package_and_others_are_kept(
    found, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert found("quickstart/train.jsonl") == str(PACKAGE / "quickstart" / "train.jsonl")
    assert found("Intel/orca_dpo_pairs") == "Intel/orca_dpo_pairs"
    assert found("./quickstart/train.jsonl") == "./quickstart/train.jsonl"


def test_a_users_own_quickstart_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "train.jsonl").touch()
    assert DataSource(path="quickstart/train.jsonl").location == "quickstart/train.jsonl"


def test_held_out_rows_of_their_own_are_a_source_with_their_split_and_the_datas_format():
    data = DataConfig(eval_path="e.jsonl", eval_split="test", format="ultrafeedback")
    assert data.eval_source == DataSource(path="e.jsonl", split="test", format="ultrafeedback")
    assert DataConfig().eval_source is None


def test_the_best_model_is_chosen_by_a_metric_that_is_measured_and_has_a_direction():
    def refused(metric):
        return refusal({"data.eval_fraction": 0.1, "train.metric_for_best_model": metric})

    assert "wanted null or one of eval/loss" in refused("eval/los")
    assert "wanted null or one of eval/loss" in refused("eval/lengths/chosen")
    assert "train.eval_exact_match: got False" in refused("eval/exact_match")
    assert "train.eval_prompts: got 0" in refused("eval/kl")


def test_dora_wants_float32_and_adapters_start_where_the_reference_is():
    assert "lora.use_dora: got True" in refusal({"lora.use_dora": True})
    assert "lora.init: got 'pissa', wanted true or gaussian" in refusal({"lora.init": "pissa"})
    full = {"model.adapter": "none", "model.quantization": "none"}
    assert "model.dtype: got 'float16'" in refusal({**full, "model.dtype": "float16"})
    assert "data.eval_split: got 'test'" in refusal({"data.eval_split": "test"})
