"""A plan against what then happens: memory, FLOPs, files; and what it says does not fit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dpo.cli import parse
from dpo.config import Config
from dpo.data.order import Order
from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.model.load import load_policy
from dpo.model.reference import build_reference
from dpo.model.scorer import Scorer
from dpo.plan.fake import FakePolicy
from dpo.plan.fit import (
    SAVINGS,
    Fit,
    Saving,
    copy_bytes,
    memory_parts,
    optimizer_bytes,
    plan_fit,
)
from dpo.plan.flops import Work, costs
from dpo.plan.gpus import GPUS, Gpu, product_tflops
from dpo.plan.plan import (
    Sample,
    choose_gpu,
    disk_parts,
    duration,
    first_rows,
    given_lengths,
    mean_work,
    order_of,
    time_on_this_cpu,
)
from dpo.plan.tables import plan_tables
from dpo.train.optim import build_optimizer
from tests.flops import counted_flops
from tests.models import QUICKSTART_MODEL, tiny, with_lora
from tests.train.runs import config as quickstart
from tests.train.runs import rows_file, run

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 300}
LENGTHS = "600,300,400"  # 1298 tokens computed


@pytest.fixture
def folder(tmp_path):
    """A model that is nothing but its config.json."""
    tiny(**SIZES | {"num_hidden_layers": 2}).config.save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


def configuration(folder, *flags):
    return parse(["--model.name_or_path", str(folder), *map(str, flags)])


def said(config, gpu, sample=None, mfu=0.4):
    tables = plan_tables(config, gpu, sample or given_lengths(LENGTHS), mfu=mfu)
    return "\n".join(map(str, tables))


def cells(text, name):
    """The cells of the row that begins so, without its name."""
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


# --------------------------------------------------------------------- against what happens


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [[], ["--train.gradient_checkpointing", "true"], ["--model.adapter", "none"]],
    ids=["lora", "checkpointing", "full"],
)
def test_memory_grows_as_planned_within_15_percent(more, tmp_path):
    """A process of its own, two steps of 992 tokens on 130 MiB of weights: 230 to 1010 MiB.

    Its resident memory is what the plan is about only if malloc gives back what is freed: every
    block of 64 KiB or more is mapped by itself, and a threshold that is set does not grow.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    tiny(vocab_size=16000, **sizes, **heads).save_pretrained(tmp_path / "model")
    tiny().save_pretrained(tmp_path / "small")
    flags = ["--optim.name", "adamw", "--train.tokens_per_microbatch", "1000", *more]
    flags = ["--model.name_or_path", str(tmp_path / "model"), *flags]
    lengths = "120,60,70"
    command = [sys.executable, "-m", "tests.plan.measured_run", tmp_path / "small", lengths]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1])

    config, sample = parse(flags), given_lengths(lengths)
    fake = FakePolicy(config)
    parts = memory_parts(fake, config)
    tokens = 1000 // sample.tokens[0] * sample.tokens[0]
    activations = plan_fit(fake, config, 0.0, sample.pairs).bytes_per_token * tokens
    assert sum(parts.values()) + activations == pytest.approx(measured, rel=0.15)
    # The check can fail: neither activations nor weights could be forgotten.
    assert min(activations, parts["base weights, float32"]) > 0.12 * measured


def test_flops_of_a_real_step_are_those_planned_within_3_percent(tmp_path):
    """Eight pairs of two kinds, in one micro-batch, with the reference."""
    tiny(**SIZES).save_pretrained(tmp_path)
    config = configuration(tmp_path, "--lora.dropout", 0)
    kinds = [TokenizedPair([0] * 90, [1] * 20, [2] * 40), TokenizedPair([0] * 9, [1] * 60, [2] * 9)]
    sample = Sample(kinds * 4, None, "made up")
    fake = FakePolicy(config)
    fit = plan_fit(fake, config, 1e12, sample.pairs)
    planned = costs(fake.policy.model).flops(mean_work(fake, sample, fit)).total * 8

    policy = load_policy(config, "cpu")
    scorer = Scorer(policy.model)
    reference = build_reference("adapter", policy, scorer, "shared")
    stream = build_stream(sample.pairs)
    counted = counted_flops(lambda: (scorer(stream) - reference(stream)).sum().backward())
    assert planned == pytest.approx(counted, rel=0.03)
    deeper = costs(with_lora(tiny(**SIZES | {"num_hidden_layers": 5}), r=16))
    wrong = deeper.flops(mean_work(fake, sample, fit)).total * 8
    assert wrong != pytest.approx(counted, rel=0.1)  # one layer more is noticed


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_state_is_what_the_optimizer_makes(name, dtype):
    """On matrices above and below 4096 numbers, where eight bits begin."""
    config = parse(["--optim.name", name])
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 32)).to(dtype)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    copies = getattr(optimizer, "_copies", [])
    optimizers = [one for *_, one in copies] or [optimizer]
    state = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for one in optimizers
        for entry in one.state.values()
        for key, tensor in entry.items()
        if isinstance(tensor, torch.Tensor) and not key.startswith(("qmap", "step"))
    }
    planned = optimizer_bytes(list(model.parameters()), name)
    assert planned == pytest.approx(sum(state.values()), rel=0.01)
    assert copy_bytes([*model.parameters()]) == sum(4 * copy.numel() for _, copy, _ in copies)
    assert bool(copies) == (dtype == torch.bfloat16)


def test_files_take_what_was_planned(tmp_path):
    """Two checkpoints and the adapter of a real run, to 5 %; best/ is the same again."""
    config = quickstart(tmp_path, "--train.save_steps", 1, "--train.max_steps", 2)
    fake = FakePolicy(config)
    sample = first_rows(config)
    planned = disk_parts(config, fake, sample, order_of(config, sample))
    made = run(config)

    def size(*patterns):
        return sum(file.stat().st_size for pattern in patterns for file in made.glob(pattern))

    weights, state = "adapter_model.safetensors", "optimizer/tensors.safetensors"
    assert planned["final/"] == pytest.approx(size(f"final/{weights}"), rel=0.05)
    both = size(f"checkpoint-*/{weights}", f"checkpoint-*/{state}")
    assert planned["2 checkpoints"] == pytest.approx(both, rel=0.05)
    assert "reference cache" not in planned  # it is off in this run
    assert "best/" not in planned


# ------------------------------------------------------------------------------- the tables


def test_config_json_alone_is_enough(folder):
    """With lengths given, not even a tokenizer is read; every part is there."""
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    text = said(configuration(folder), GPUS["A100-80"])
    for part in ("tokens of a pair", "base weights, float32", "adapter", "FLOPs", "disk"):
        assert part in text
    assert cells(text, "computed, shared tokens once") == ["1298.0", "1298"]
    assert "an assumption, not measured" in text
    assert "allowance, not measured" in text


def test_the_sum_is_that_of_the_parts(folder):
    text = said(configuration(folder), Gpu(24.0, 71.0))
    table = text[text.index("memory ") : text.index("A token takes")].splitlines()[1:]
    numbers = [float(line.split()[-1]) for line in table if line]
    *parts, total, gpu = numbers
    assert total == pytest.approx(sum(parts), abs=0.03)
    assert gpu == 24.0


def test_time_is_flops_over_the_assumed_rate(folder):
    """Half the assumed share takes twice as long; a cached reference takes less."""
    config = configuration(folder, "--train.max_steps", 20000)
    gpu = Gpu(24.0, 0.1)
    slow, fast = (cells(said(config, gpu, mfu=mfu), "time of the run") for mfu in (0.1, 0.2))
    assert slow[1] == fast[1] == "h"
    assert float(slow[0]) == pytest.approx(2 * float(fast[0]), rel=0.02)
    assert float(slow[2]) < 0.8 * float(slow[0])


def test_without_a_reference_none_is_counted(folder):
    text = said(configuration(folder, "--reference.mode", "zero"), GPUS["L4"])
    assert cells(text, "reference   ") == ["-", "-"]
    assert "reference cache" not in text[text.index("disk") :]
    assert cells(said(configuration(folder), GPUS["L4"]), "reference   ")[0] != "-"


def test_full_fine_tuning_has_a_frozen_copy_and_no_adapter(folder):
    text = said(configuration(folder, "--model.adapter", "none"), GPUS["L4"])
    assert cells(text, "frozen reference") == cells(text, "base weights, float32")
    assert "\nadapter " not in text
    assert "merged model" not in text


# ------------------------------------------------------------------------------- what fits

MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def with_one_pair(tmp_path, shape, pair, *flags):
    """Bytes of a QLoRA run of that shape: what is always there, and a micro-batch of one pair."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    flags = ("--model.quantization", "nf4", "--model.dtype", "bfloat16", *flags)
    config = configuration(tmp_path, "--lora.r", 16, *flags)
    fake = FakePolicy(config)
    SAVINGS[-1].apply(fake.scorer)
    return sum(memory_parts(fake, config).values()) + fake.step_bytes([pair])


@pytest.mark.slow
def test_a_7b_model_trains_on_a_pair_of_1536_tokens_in_less_than_6_5_gb(tmp_path):
    """Weights 4.45 GB, the adapter's own 0.9, the rest activations; CUDA's context comes on top."""
    pair = TokenizedPair([3] * 1024, [5] * 257, [6] * 257)
    assert pair.num_stream_tokens == 1536
    assert 5.3e9 < with_one_pair(tmp_path, MISTRAL_7B, pair) < 6.5e9


@pytest.mark.slow
def test_a_70b_model_trains_on_one_80_gb_card(tmp_path):
    """On the longest pair that the article's limits allow; 2 GiB are left for CUDA's context."""
    pair = TokenizedPair([3] * 1024, [5] * 512, [6] * 512)
    assert 40e9 < with_one_pair(tmp_path, LLAMA_70B, pair) < 78 * 2**30


def test_a_4_bit_base_is_planned_plain_where_it_fits(tmp_path):
    """The planner and the run header say which, and why."""
    shape = tiny(**SIZES | {"num_hidden_layers": 2}).config
    shape.save_pretrained(tmp_path)
    large, small = GPUS["H200"], Gpu(2.02, 71.0)
    config = configuration(tmp_path, "--model.quantization", "nf4")
    assert "base: dequantised once: dequantised it takes" in said(config, large)
    assert "base weights, float32" in said(config, large)
    assert "largest weight, dequantised" not in said(config, large)
    assert "base: kept in 4 bits: dequantised it takes" in said(config, small)
    assert "base weights, nf4" in said(config, small)
    config.model.dequantize_base = False
    assert "base: kept in 4 bits, as configured" in said(config, large)


def test_what_does_not_fit_is_said_with_what_would(folder):
    config = configuration(folder, "--train.tokens_per_microbatch", 10**6)
    text = said(config, Gpu(2.03, 71.0))
    assert "DOES NOT FIT" in text
    assert "Set train.tokens_per_microbatch to auto" in text
    assert f"With {SAVINGS[-1]} a pair of up to" in text
    weights = said(config, Gpu(2.0, 71.0))
    assert "are missing before the first token" in weights
    assert "DOES NOT FIT" not in said(configuration(folder), GPUS["H200"])


# --------------------------------------------------------------------- lengths, GPUs, steps


def test_lengths_of_the_first_rows_are_those_of_training(tmp_path):
    """The packaged model's folder without its weights, and forty rows, of which a half is held out.

    Rows of the quickstart are all usable: 20 pairs an epoch.
    """
    without_weights = tmp_path / "model"
    shutil.copytree(QUICKSTART_MODEL, without_weights)
    (without_weights / "model.safetensors").unlink()
    flags = ["--data.name_or_path", rows_file(tmp_path, 40), "--data.eval_fraction", 0.5]
    config = configuration(without_weights, *flags)
    sample = first_rows(config)
    assert (len(sample.pairs), sample.num_pairs) == (40, 20)
    assert "the first 40 rows" in said(config, GPUS["T4"], sample)
    config.train.max_steps, config.train.num_train_epochs = -1, 3
    config.train.per_device_train_batch_size = 8
    assert order_of(config, sample).num_steps == 3 * 3  # ceil(20 / 8) = 3 an epoch


def test_a_set_that_cannot_be_read_points_to_lengths(tmp_path):
    config = configuration("quickstart/model", "--data.name_or_path", tmp_path / "no.jsonl")
    with pytest.raises(UserError, match=r"no\.jsonl does not exist.*--lengths 250,200,200"):
        first_rows(config)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "", "chosen": "a", "rejected": "b"}) + "\n")
    config.data.name_or_path, config.data.format = str(rows), "orca_dpo_pairs"
    with pytest.raises(UserError, match="--lengths"):
        first_rows(config)


def test_epochs_of_an_unknown_number_of_pairs_are_refused(folder):
    config = configuration(folder, "--train.max_steps", -1)
    with pytest.raises(UserError, match=r"--train\.max_steps, or leave --lengths out"):
        said(config, GPUS["L4"])


@pytest.mark.parametrize(
    "text", ["", "250", "1,2", "1,2,3,4", "1,2,x", "1,0,3", "-1,2,3", "1.5,2,3"]
)
def test_lengths_are_three_whole_numbers(text):
    with pytest.raises(UserError, match="three whole numbers above 0"):
        given_lengths(text)
    assert given_lengths("1, 2,3").tokens == [1 + 2 + 3 - 2]


def test_a_number_replaces_the_data_sheets():
    assert choose_gpu("H100", None, None, Config()) == GPUS["H100"]
    assert choose_gpu("H100", 60.0, None, Config()) == Gpu(60.0, GPUS["H100"].tflops)
    assert choose_gpu(None, 24.0, 71.0, Config()) == Gpu(24.0, 71.0)
    assert choose_gpu("T4", None, 60.0, Config()) == Gpu(16.0, 60.0, has_bfloat16=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("A100", None, None), "--gpu: got 'A100'.*Nearest: A100-40, A100-80"),
        (("RTX4090", None, None), "Nearest: RTX 4090"),
        ((None, -1.0, 71.0), "--memory_gib: got -1.0, wanted a number above 0"),
        ((None, 24.0, 0.0), "--tflops: got 0.0"),
    ],
)
def test_an_unknown_gpu_is_refused_with_the_nearest(given, said):
    with pytest.raises(UserError, match=said):
        choose_gpu(*given, Config())


# ----------------------------------------------------------------------------------- this CPU


def test_without_a_name_the_device_of_this_machine_is_planned(folder, monkeypatch):
    monkeypatch.setattr("dpo.plan.gpus.product_tflops", lambda width, dtype: 0.154)
    monkeypatch.setattr("dpo.plan.gpus.free_bytes", lambda device: 30 * 2**30)
    config = configuration(folder)
    this_cpu = Gpu(30.0, 0.154, type="cpu")
    assert choose_gpu(None, None, None, config) == choose_gpu("cpu", None, None, config) == this_cpu
    assert choose_gpu(None, 8.0, None, config) == Gpu(8.0, 0.154, type="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert choose_gpu(None, None, None, config) == GPUS["L4"]
    config.train.device = "cpu"
    assert choose_gpu(None, None, None, config) == this_cpu


@pytest.mark.parametrize(
    ("dtype", "measured"), [("float16", torch.float16), ("auto", torch.bfloat16)]
)
def test_a_cpu_is_measured_on_the_width_and_type_of_the_model(
    tmp_path, monkeypatch, dtype, measured
):
    shape = tiny(**SIZES).config
    shape.dtype = "bfloat16"
    shape.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("dpo.plan.fit.product_tflops", lambda *given: 1.0)  # for what auto means
    monkeypatch.setattr("dpo.plan.gpus.product_tflops", lambda *given: asked.append(given) or 1.0)
    choose_gpu("cpu", None, None, configuration(tmp_path, "--model.dtype", dtype))
    assert asked == [(64, measured)]


def test_the_rate_is_that_of_the_products_that_were_made(monkeypatch):
    """A clock that each product moves by 0.05 s: four of 2 x 2048 x 64 x 64 FLOPs in 0.2 s; what
    starts the threads does not count."""
    clock = [0.0]

    def product(tokens, weight):
        clock[0] += 0.05 if len(tokens) == 2048 else 99.0

    monkeypatch.setattr("dpo.plan.gpus.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    rate = product_tflops.__wrapped__(64, torch.float32)
    assert rate == pytest.approx(4 * 2 * 2048 * 64 * 64 / 0.2 / 1e12, rel=1e-6)


def test_a_7b_model_on_a_cpu_is_planned_in_days(tmp_path):
    """200 steps of 16 pairs of 33.5 TFLOP (docs/performance.md) at 154 GFLOP/s: 8 days."""
    shape = {"model_type": "llama", **MISTRAL_7B}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    flags = ["--config", "neuralhermes", "--model.name_or_path", str(tmp_path)]
    cpu = Gpu(30.0, 0.154, type="cpu")
    text = said(parse(flags), cpu, given_lengths("244,195,334"), mfu=1.0)
    assert cells(text, "time of the run")[:2] == ["8", "days"]
    assert cells(text, "free on this CPU") == ["30.00"]
    assert "Token budget of a micro-batch: 2048 (auto: 0.9 of what is left, at most 2048)" in text
    assert "allowance" not in text  # what is free is free for a process that runs already
    parts = text[text.index("base weights") : text.index("sum  ")].splitlines()
    assert float(cells(text, "sum  ")[0]) == pytest.approx(
        sum(float(line.split()[-1]) for line in parts), abs=0.05
    )


def test_the_time_of_a_run_is_its_flops_over_the_rate(folder, monkeypatch):
    """Five steps of 16 pairs on two ranks, of two kinds of pairs in equal parts, at 1 kFLOP/s."""
    monkeypatch.setattr("dpo.plan.gpus.product_tflops", lambda width, dtype: 1e-9)
    config = configuration(folder, "--train.max_steps", 5)
    kinds = [TokenizedPair([0] * 90, [1] * 20, [2] * 40), TokenizedPair([0] * 9, [1] * 60, [2] * 9)]
    pairs = [replace(pair, prompt_ids=[n, *pair.prompt_ids]) for n, pair in enumerate(kinds * 8)]
    fake, sample = FakePolicy(config), Sample(pairs, 16, "made up")
    for mode in ("auto", "zero"):
        config.reference.mode = mode
        pair = costs(fake.policy.model).flops(
            mean_work(fake, sample, Fit(10**9, 1.0, 0.0, Saving())), live_reference=mode == "auto"
        )
        order = Order(num_pairs=16, pairs_per_step=16, num_steps=5, seed=0)
        days = duration(pair.total * 16 * 5 / 2 / 1e3)
        assert days.endswith(" days")
        text = time_on_this_cpu(config, sample.pairs, order, num_ranks=2)
        assert text.startswith(
            f"time: at least {days} for 5 steps at the 1e-06 GFLOP/s of this CPU"
        )


def test_times_have_the_unit_that_suits_them():
    times = (3.21, 60.0, 840.0, 7200.0, 36000.0, 172799.0, 864000.0)
    words = ["3.2 s", "60 s", "14 min", "2.0 h", "10.0 h", "48.0 h", "10 days"]
    assert [duration(seconds) for seconds in times] == words


def test_a_card_that_emulates_bfloat16_is_planned_with_a_note(folder):
    config = configuration(folder, "--model.dtype", "bfloat16")
    assert "The time is float16's: this card emulates bfloat16" in said(config, GPUS["T4"])
    assert "emulates" not in said(config, GPUS["A100-80"])
    config.model.dtype = "float16"
    assert "emulates" not in said(config, GPUS["T4"])
    assert [name for name in GPUS if not GPUS[name].has_bfloat16] == ["T4", "V100-16", "V100-32"]


def test_padded_rows_are_planned_with_their_padding(folder):
    """Two pairs of 12 and 3 prompt tokens, answers of 3: rows of 14 for all, in one micro-batch.

    4 rows x 14 tokens / 2 pairs = 28 each, and 28 x 14 / 2 scores.
    """
    config = configuration(folder, "--model.attention", "padded")
    pairs = [TokenizedPair([0] * prompt, [1] * 3, [2] * 3) for prompt in (12, 3)]
    sample, fake = Sample(pairs, None, ""), FakePolicy(config)
    assert mean_work(fake, sample, Fit(1000, 1.0, 0.0, Saving())) == Work(28, 196, 6)
