"""`model.dtype` auto takes what the machine multiplies fast, and a run keeps what it took."""

import pytest
import torch

from dpo.cli import load, parse
from dpo.errors import UserError
from dpo.plan.fit import choose_dtype
from dpo.train import ahead
from tests.train.runs import config, killed, model_folder, run, started, training

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = ["--model.dtype", "auto"]
WEIGHTS = 4 * 693_376  # bytes of the packaged model in float32


@pytest.fixture
def stored(tmp_path):
    """The packaged model, stored in bfloat16."""
    return model_folder(tmp_path, dtype=torch.bfloat16)


@pytest.fixture
def machine(monkeypatch):
    """Sets how many times float32 is as fast as half precision, and what memory is free."""

    def set_to(times, free=10**12):
        rates = {torch.float32: times, torch.bfloat16: 1.0, torch.float16: 1.0}
        monkeypatch.setattr("dpo.plan.fit.product_tflops", lambda width, dtype: rates[dtype])
        monkeypatch.setattr("dpo.plan.fit.free_bytes", lambda device: free)

    return set_to


@pytest.mark.parametrize(
    ("times", "device", "quantization", "free", "wanted"),
    [
        (7.0, CPU, "none", 2 * WEIGHTS, "float32"),
        (7.0, CPU, "none", 2 * WEIGHTS - 1, "bfloat16"),
        (7.0, CPU, "nf4", 1, "float32"),
        (1.4, CPU, "none", 10**12, "bfloat16"),
        (0.5, CPU, "none", 10**12, "bfloat16"),
        (7.0, GPU, "none", 10**12, "bfloat16"),
    ],
)
def test_auto_is_float32_on_a_cpu_that_is_much_faster_at_it(
    stored, machine, times, device, quantization, free, wanted
):
    machine(times, free)
    flags = ["--model.name_or_path", stored, "--model.quantization", quantization]
    model = parse([*map(str, flags), *AUTO]).model
    dtype, reason = choose_dtype(model, device)
    assert dtype == wanted
    is_said = device == CPU and times > 1.5
    assert reason.startswith(f"model.dtype auto: {wanted}: this CPU multiplies") == is_said
    model.dtype = "float16"
    assert choose_dtype(model, device) == ("float16", "")  # what is given stays


def test_a_checkpoint_in_float32_stays_so(tmp_path, machine):
    machine(0.1)
    model = parse(["--model.name_or_path", str(model_folder(tmp_path)), *AUTO]).model
    assert choose_dtype(model, CPU) == ("float32", "")


def test_a_run_says_what_auto_is_and_goes_on_with_it(tmp_path, stored, machine):
    """On a machine, then, that multiplies bfloat16 faster."""
    flags = ["--model.name_or_path", stored, *AUTO, "--train.save_steps", 1]
    machine(7.0)
    straight = run(config(tmp_path, *flags, "--train.output_dir", tmp_path / "straight"))
    folder = killed(config(tmp_path, *flags), at=3)
    assert load(folder / "config.yaml").model.dtype == "float32"
    said = "model.dtype auto: float32: this CPU multiplies float32 7 times as fast as bfloat16"
    assert said in (folder / "header.txt").read_text()
    machine(0.5)
    assert training(run(config(tmp_path, *flags))) == training(straight)
    fresh = config(tmp_path, *flags, "--train.resume", "never")
    assert load(run(fresh) / "config.yaml").model.dtype == "bfloat16"


def test_the_reference_is_cached_in_the_type_that_training_takes(tmp_path, stored, machine, capsys):
    machine(7.0)
    flags = ["--model.name_or_path", stored, *AUTO, "--reference.cache", tmp_path / "cache"]
    assert ahead.cache_reference(config(tmp_path, *flags)).startswith("24 pairs computed")
    run(config(tmp_path, *flags))
    assert "0 pairs computed" in capsys.readouterr().out


def test_what_a_type_rules_out_is_refused_once_auto_is_settled(tmp_path, stored, machine):
    flags = ["--model.name_or_path", stored, *AUTO, "--lora.use_dora", "true"]
    machine(0.5)
    with pytest.raises(UserError, match=r"wanted false, since model\.dtype is bfloat16"):
        started(config(tmp_path, *flags))
    assert not (tmp_path / "run").exists()
    machine(7.0)
    assert started(config(tmp_path, *flags)).config.model.dtype == "float32"
