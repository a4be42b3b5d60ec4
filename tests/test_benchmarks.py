"""The benchmarks in small, without TRL: they run, and the things that they compare are the same."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def task(tmp_path):
    import common

    task = common.Task(tmp_path, common.draw_lengths(common.PAIRS_PER_STEP, scale=0.03))
    task.write(layers=1)
    return task


def in_this_process(side: partial, *, counts_flops: bool = False):
    """What `side` would measure in a process of its own."""
    import common

    assert side.func is common.measure
    run, *args = side.args
    parent = SimpleNamespace(send=lambda message: None, recv=lambda: None)
    return run(common.Race(parent, counts_flops), *args, **side.keywords)


def test_a_few_drawn_pairs_have_the_means_of_the_whole_table():
    import common

    every, drawn = (torch.tensor(common.draw_lengths(n)).float() for n in (284, 32))
    assert len(every.unique(dim=0)) > 250  # the table, not a few rows again and again
    assert every.sum(1).mean().item() == pytest.approx(drawn.sum(1).mean().item(), rel=0.02)
    assert (drawn[:, :1] + drawn[:, 1:]).max() <= common.MAX_LENGTH


def test_every_variant_of_the_ablation_computes_the_same_step(task):
    import ablation

    variants = ablation.list_variants(task, budget=64)
    results = {name: in_this_process(side) for name, side in variants.items()}
    expected = results[ablation.ALL_ON]["logged"]
    assert [line["step"] for line in expected] == [1, 2]
    for name, result in results.items():
        for its, ours in zip(result["logged"], expected, strict=True):
            for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
                assert its[key] == pytest.approx(ours[key], rel=1e-4), (name, key)


def test_a_fresh_process_reports_its_memory_its_flops_and_the_tokens_of_a_step(task, monkeypatch):
    import common

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(task.folder))
    result = common.measure(
        common.run_ours, task, train__tokens_per_microbatch=64, counts_flops=True
    )
    assert result["tokens"] == sum(sum(lengths) - 2 for lengths in task.lengths)
    # Per token: 2 x weights, three times (policy, its backward, reference), and LoRA's; the head's
    # (3 products of 384 x 4096 a scored token) and attention come on top.
    weights = 2 * 384 * 384 + 2 * 384 * 128 + 3 * 384 * 1344
    assert 6 * weights < result["flops"] / result["tokens"] < 6 * weights * 1.5 + 6 * 384 * 4096
    assert 0 < result["growth"] < 2**30


def side(**changes):
    logged = {"logps/chosen": -80.0, "logps/rejected": -90.0, "grad_norm": 2.0} | changes
    return {"adapter": changes.get("adapter", "a"), "logged": [{}, logged]}


def test_sides_that_agree_are_said_to():
    import compare_trl

    task = SimpleNamespace(lengths=[[5, 10, 10]] * 16)
    sides = {compare_trl.OURS: side(), compare_trl.DEFAULTS: side(grad_norm=2.0001)}
    assert "gradient norm within 5" in compare_trl.check_agreement(sides, task)


@pytest.mark.parametrize(
    "changes", [{"logps/rejected": -90.01}, {"grad_norm": 2.1}, {"adapter": "b"}]
)
def test_sides_that_compute_different_things_end_the_comparison(changes):
    """0.01 nats over answers of 10 tokens are 1e-3 nats a token."""
    import compare_trl

    task = SimpleNamespace(lengths=[[5, 10, 10]] * 16)
    sides = {compare_trl.OURS: side(), compare_trl.DEFAULTS: side(**changes)}
    with pytest.raises(SystemExit, match=r"differs by|other weights"):
        compare_trl.check_agreement(sides, task)


def test_without_trl_it_is_said_how_to_install_it(monkeypatch, capsys):
    import compare_trl

    monkeypatch.setattr(compare_trl, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["compare_trl.py"])
    with pytest.raises(SystemExit, match="2"):
        compare_trl.main()
    assert "pip install -e '.[peers]'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_takes_two_products_and_none_in_its_backward(dtype):
    import head

    assert head.count_products(head.OURS, dtype) == "2 + 0"
    assert head.count_products(head.OURS, dtype, trains=True) == "1 + 3"


def test_the_head_is_measured_in_small(tmp_path, monkeypatch, capsys):
    import head

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = "--rounds 1 --threads 1 --tokens 64 --few-tokens 32 --vocab 500 --hidden 16"
    output = tmp_path / "head.md"
    monkeypatch.setattr(sys, "argv", ["head.py", *small.split(), "--output", str(output)])
    monkeypatch.setattr(head.common, "measure", lambda run, *args: measured(head, run, *args))
    head.main()
    assert output.read_text() in capsys.readouterr().out
    assert "| tiles and J, float32 | 2 + 0 | 1 + 3 |" in output.read_text()


def measured(head, run, *args):
    result = in_this_process(partial(head.common.measure, run, *args))
    return {**result, "growth": 0}


# ----------------------------------------------------------------------------------- gpu, layers


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_on_a_cpu(tmp_path):
    """Every section prints its rows and none failed; in a process that checks no shapes, as it is
    run: one of its rows is compiled."""
    output = tmp_path / "gpu.md"
    command = [sys.executable, "-W", "ignore", "gpu.py", "--self_test", "--output", str(output)]
    process = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = output.read_text()
    assert "FAILED" not in report
    assert "not measured" not in report
    assert "a CPU (self-test: no measurement)" in report
    for row in (
        "attention in bfloat16, dk",
        "shared against padded rows",
        "policy against its reference, one micro-batch: nats a token, mean (worst) | 0.0e+00",
        "kept by lean layers",
        "micro-batches of 128 tokens",
        "a step of 128 tokens: GEMM",
        "recipe, ours, reference cached",
        "NF4, dequantised in every pass",
        "compiled regions",
    ):
        assert row in report


def test_without_a_gpu_its_file_says_that_nothing_was_measured(tmp_path):
    import gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--output", str(tmp_path / "gpu.md")]) == []
    assert (tmp_path / "gpu.md").read_text() == "not measured\n"


def test_a_section_that_fails_is_named_and_the_others_stand():
    """The negative control of the self-test; a process that dies ends in SystemExit."""
    import gpu

    rows = [("one", "1")]
    for error in (RuntimeError("no kernel\nmore"), SystemExit("run_ours failed")):
        with gpu.collected(rows, "attention"):
            raise error
    assert rows == [
        ("one", "1"),
        ("attention: FAILED", "RuntimeError: no kernel"),
        ("attention: FAILED", "SystemExit: run_ours failed"),
    ]


def test_kernels_are_told_apart_by_their_names():
    """As CUDA 12 and 13 name them."""
    import gpu

    def kind(name):
        return next((k for k, words in gpu.KINDS.items() if any(w in name for w in words)), None)

    assert kind("nvjet_tst_256x128_64x4_2x1_v_bz_coopa_tnn") == "GEMM"
    assert kind("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n") == "GEMM"
    assert kind("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel") == "attention"
    assert kind("void at::native::vectorized_elementwise_kernel<4>") is None


def test_layers_are_measured_in_small(monkeypatch, capsys):
    """Its last line is what other checks read."""
    import layers

    small = ["layers.py", "--rounds", "1", "--threads", "1", "--pairs", "16", "--scale", "0.02"]
    monkeypatch.setattr(sys, "argv", [*small, "--layers", "1"])
    monkeypatch.setattr(layers, "race", lambda args: "the race")
    layers.main()
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    said = r"saved activations per token per layer: ([\d.]+) KiB \(PEFT \+ autocast: ([\d.]+) KiB\)"
    lean, peft = map(float, re.fullmatch(said, last).groups())
    assert lean <= 125 < peft


def test_lean_layers_take_the_same_step_as_pefts(task):
    import common

    base = {"train__tokens_per_microbatch": 64, "reference__cache": "off"}
    own, lean = (
        in_this_process(
            partial(common.measure, common.run_ours, task, **base, model__lean_layers=is_lean)
        )["logged"]
        for is_lean in (False, True)
    )
    for ours, theirs in zip(lean, own, strict=True):
        for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
