"""dpo plan as a user runs it."""

import runpy
import sys
from pathlib import Path

import pytest

from dpo.commands import main
from tests.commands import as_process
from tests.models import tiny

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "scripts" / "configs" / "neuralhermes.yaml"


@pytest.fixture
def folder(tmp_path):
    tiny(num_hidden_layers=1).config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_recipe_is_planned_from_config_json_alone(folder):
    flags = ["--config", RECIPE, "--model.name_or_path", folder]
    code, out, err = as_process("plan.py", "--gpu", "a100-80", "--lengths", "50,20,30", *flags)
    assert (code, err) == (0, "")
    heads = ("tokens of a pair, as given", "memory", "FLOPs", "disk")
    tables = [table.splitlines()[0] for table in out.strip().split("\n\n")]
    assert [head.split("  ")[0] for head in tables] == list(heads)
    assert "base weights, bfloat16" in out
    assert "base: dequantised once" in out
    assert "optimizer state, paged_adamw_32bit" in out


@pytest.mark.parametrize("flags", [["--gpu", "cpu"], ["--gpu", "CPU", "--mfu", "1"], []])
def test_this_machine_is_planned_by_name_or_if_none_is_named(flags, folder, monkeypatch, capsys):
    """Its rate as measured, all of it; this machine is one without a GPU."""
    monkeypatch.setattr("dpo.plan.gpus.product_tflops", lambda width, dtype: 0.154)
    monkeypatch.setattr("dpo.plan.gpus.free_bytes", lambda device: 30 * 2**30)
    main(["plan", *flags, "--model.name_or_path", str(folder), "--lengths", "50,20,30"])
    out, _ = capsys.readouterr()
    assert "free on this CPU" in out
    assert "at 100% (--mfu) of 154 GFLOP/s, this CPU's rate as measured now" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "A1000"], "--gpu: got 'A1000', wanted one of T4"),
        (["--gpu", "L4", "--mfu", "0"], "--mfu: got 0.0, wanted a share of the peak"),
        (["--gpu", "L4", "--mfu", "40"], "--mfu: got 40.0, wanted a share of the peak"),
        (["--gpu", "L4", "--lengths", "9,9"], "--lengths: got '9,9', wanted three whole numbers"),
        (["--gpu", "L4", "--lora.rank", "8"], "unknown key lora.rank. Nearest: lora.r"),
        (["--gpu", "L4", "--lengths", "9,9,9", "--model.name_or_path", "no"], "got 'no', which is"),
        (["--gpu", "L4", "--config", RECIPE], "teknium/OpenHermes-2.5-Mistral-7B"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2(flags, said, monkeypatch, capsys):
    """The last: a recipe whose model cannot be had without the network."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "plan.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
