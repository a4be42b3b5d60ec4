"""The benchmarks in small, without TRL: they run, and the things that they compare are the same."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.data.loader import load_data
from dpo.data.stream import build_stream
from dpo.model.named import load_tokenizer
from tests.models import QUICKSTART_MODEL

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


@pytest.mark.slow
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

    task = SimpleNamespace(lengths=[[5, 10, 10]] * 16, pairs_per_step=16)
    sides = {compare_trl.OURS: side(), compare_trl.DEFAULTS: side(grad_norm=2.0001)}
    assert "gradient norm within 5" in compare_trl.check_agreement(sides, task)


@pytest.mark.parametrize(
    "changes", [{"logps/rejected": -90.01}, {"grad_norm": 2.1}, {"adapter": "b"}]
)
def test_sides_that_compute_different_things_end_the_comparison(changes):
    """0.01 nats over answers of 10 tokens are 1e-3 nats a token."""
    import compare_trl

    task = SimpleNamespace(lengths=[[5, 10, 10]] * 16, pairs_per_step=16)
    sides = {compare_trl.OURS: side(), compare_trl.DEFAULTS: side(**changes)}
    with pytest.raises(SystemExit, match=r"differs by|other weights"):
        compare_trl.check_agreement(sides, task)


WRITES_STEPS = """
import json, os, sys, time
print("device: 1 x CPU, 3 threads")
for step in range(3):
    with open(sys.argv[1], "a") as file:
        line = {"step": step, "train/logps/chosen": -80.0, "train/logps/rejected": -90.0}
        file.write(json.dumps(line) + chr(10) + json.dumps({"step": 1, "eval/loss": 0.0}) + chr(10))
    time.sleep(0.5)
sys.exit(os.environ.get("OMP_NUM_THREADS", 0))
"""


def test_a_command_is_timed_from_its_first_logged_step_to_its_last(tmp_path, monkeypatch):
    import compare_trl

    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # which nobody gives a user's command
    file = tmp_path / "metrics.jsonl"
    command = compare_trl.Command([sys.executable, "-c", WRITES_STEPS, str(file)], file)
    run = compare_trl.watch(command, tmp_path)
    assert 0.8 < run["wall"] < run["all"] - 0.4
    assert run["peak"] > 2**20
    assert compare_trl.threads_of(run) == "3"
    assert [line["step"] for line in compare_trl.steps_in(file)] == [0, 1, 2]
    compare_trl.StepLog(file).result([{"step": 1, "logps/chosen": -80.0}])
    assert len(compare_trl.steps_in(file)) == 3  # what is written at the end is no step
    theirs = {"logged": [{"threads": 2}, {"train/logps/chosen": -80, "train/logps/rejected": -90}]}
    assert compare_trl.threads_of(theirs | {"said": ""}) == "2"
    task = SimpleNamespace(lengths=[[5, 10, 10]] * 16, pairs_per_step=16)
    assert compare_trl.check_first_logps(task, {compare_trl.OURS: run, "TRL": theirs}) == 0
    theirs["logged"][1]["train/logps/chosen"] = -80.01
    with pytest.raises(SystemExit, match=r"differs by 0\.001 nats a token"):
        compare_trl.check_first_logps(task, {compare_trl.OURS: run, "TRL": theirs})


def test_a_command_that_fails_ends_the_comparison_with_what_it_said(tmp_path):
    import compare_trl

    command = compare_trl.Command([sys.executable, "-c", "1 / 0"], tmp_path / "none")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        compare_trl.watch(command, tmp_path)


def test_real_rows_become_messages_and_those_that_do_not_fit_are_left_out(tmp_path):
    import common
    import compare_trl

    row = {"system": "s", "question": "q", "chosen": "a b", "rejected": "c"}
    rows = [row, row | {"chosen": "long " * 2000}, row | {"rejected": "a b"}, row | {"system": ""}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task").mkdir()
    task = compare_trl.real_task(tmp_path / "task", Path(QUICKSTART_MODEL), file, 120, 2)
    kept = [json.loads(line) for line in (task.folder / "rows.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]) for row in kept] == [2, 1]
    assert (task.num_rows, task.num_steps, len(task.lengths)) == (2, 1, 2)
    config = common.our_config(task)
    pairs = load_data(config, load_tokenizer(config.model)).train
    lengths = [[*map(len, (p.prompt_ids, p.chosen_ids, p.rejected_ids))] for p in pairs]
    # The template writes a line break after a turn, which is not scored here.
    differences = torch.tensor(task.lengths) - torch.tensor([lengths[i] for i in task.order])
    assert differences.tolist() == [[0, 1, 1]] * 2


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
    """Its sections but the variants, which compile, and two sides of the recipe: each row that is
    measured is one that was predicted, and none failed."""
    steps = "rounding|where time|^ours$|deterministic"
    command = ["bash", str(FOLDER / "gpu" / "run.sh"), "--small", "500", steps]
    where = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    process = subprocess.run(command, env=os.environ | where, capture_output=True, text=True)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert process.returncode == 0, log[-3000:]
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count(": rc 0 after") == 4
    assert "end: 0 steps failed" in summary
    report = (tmp_path / "out" / "gpu.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    rows = {row[0]: row[1:] for row in cells if len(row) == 4}
    measured = {what: values for what, values in rows.items() if values[2]}
    assert all(all(values) for values in measured.values()), measured
    missing = {what for what in rows if what not in measured}
    assert {what.split(":")[0].removeprefix("recipe, ") for what in missing} == {
        "64 tokens, PEFT's layers",  # the variants, and below the sides that were not asked for
        "64 tokens, NF4, dequantised in every pass",
        "64 tokens, compiled regions",
        *("ours, 4 bits kept", "ours, compiled", "ours, PyTorch's AdamW"),
        *("TRL, tuned by hand", "TRL, defaults", "TRL, checkpointing off", "ours against TRL"),
    }
    assert measured["a micro-batch again, deterministic: equal tensors"][2] == "100%"
    same = measured["policy against its reference, one micro-batch: nats a token, mean (worst)"]
    assert same[2] == same[0] == "0.0e+00 (0.0e+00)"
    step = "first step's loss, grad_norm, logps/chosen"
    assert (
        measured[f"recipe, ours: {step}"][2] == measured[f"recipe, ours, deterministic: {step}"][2]
    )


def test_without_a_gpu_nothing_is_measured_and_it_is_said(tmp_path):
    where = {"OUT": str(tmp_path), "WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    command = ["bash", str(FOLDER / "gpu" / "run.sh")]
    process = subprocess.run(command, env=os.environ | where, capture_output=True, text=True)
    assert process.returncode == 2
    assert "not measured: " in process.stdout
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_section_that_fails_is_named_and_the_others_stand(tmp_path, monkeypatch, capsys):
    """The negative control: rows before the failure are written, and its traceback is printed."""
    from gpu import sections
    from gpu.device import SMALL, Row

    def fails(setup):
        yield Row("one", "1")
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(
        sections, "SECTIONS", {"fails": fails, "stands": lambda setup: [Row("two", "2")]}
    )
    rows = tmp_path / "rows.jsonl"
    assert sections.run_sections(["fails", "stands"], SMALL, rows) == 1
    said = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["what"], row["value"]) for row in said] == [
        ("one", "1"),
        ("fails", "FAILED: RuntimeError: no kernel"),
        ("two", "2"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_kernels_are_told_apart_by_their_names():
    """As CUDA 12 and 13 name them."""
    from gpu.sections import REST, kind_of

    assert kind_of("nvjet_tst_256x128_64x4_2x1_v_bz_coopa_tnn") == "GEMM"
    assert kind_of("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n") == "GEMM"
    assert (
        kind_of("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel") == "attention"
    )
    assert kind_of("void at::native::vectorized_elementwise_kernel<4>") == REST


def test_streams_of_every_budget_are_nearly_full():
    """At 2,048 tokens no pair fits the last gap: a search for one that does would not end."""
    from gpu.device import GPU, make_streams

    for budget in GPU.budgets:
        for stream in make_streams(dataclasses.replace(GPU, device=torch.device("cpu")), budget, 2):
            assert 0.9 * budget < len(stream.input_ids) <= budget


def test_a_prediction_is_what_the_products_and_the_bytes_take():
    """A product of 64 x 64 is bound by its bytes, one of 4,096 by its FLOPs; a view is free."""
    from gpu.sheet import CARDS, Cost, Roofline

    card = CARDS[0]
    balance = card.tflops * 1e12 / card.bandwidth
    for n, flops, moved in ((64, 0, 3 * 64**2 * 2), (4096, 2 * 4096**3, 0)):
        with FakeTensorMode(), Roofline(balance) as roofline:
            left, right = (torch.empty(n, n, dtype=torch.bfloat16) for _ in range(2))
            roofline.cost = Cost()
            torch.mm(left, right.T.view(n, n))
        assert (roofline.cost.flops, roofline.cost.bytes) == (flops, moved)
        assert roofline.cost.kernels == 1
    cost = Cost(flops=card.tflops * 1e12, bytes=card.bandwidth, scores=card.tflops * 1e12)
    assert cost.seconds(card) == pytest.approx(1 + 1 + 1 / card.attention)
    assert Cost(kernels=1000).seconds(card) == pytest.approx(1000 * card.host)


def test_what_a_prediction_counts_is_what_the_method_asks_for():
    """Products of a whole micro-batch, traced one by one, against the formula of the planner."""
    from gpu.device import SMALL, make_streams
    from gpu.sheet import Roofline, Traced, as_on_a_gpu

    traced, pairs = Traced(SMALL), make_streams(SMALL, 128)[0].pairs
    flops = []
    for fake in traced._fakes:
        with fake.mode, as_on_a_gpu(), Roofline(balance=0) as roofline:
            fake._score_both(build_stream(pairs)).sum().backward()
        flops.append(roofline.cost.flops)
    one, two = (traced.cost(pairs, layers) for layers in (1, 2))
    products = [c.useful - c.scores - c.scores_backward for c in (one, two)]
    assert flops[1] - flops[0] == pytest.approx(products[1] - products[0], rel=1e-9)  # of a layer
    assert flops[0] == pytest.approx(products[0], rel=0.03)  # the first needs no gradient of its x
    # x twice, q, o; k, v; gate, up; r numbers a product. Shared keys come on top.
    numbers = 4 * 64 + 2 * 32 + 2 * 224 + 7 * 16
    assert 2 * numbers < traced.kept(pairs) * 1024 < 1.05 * 2 * numbers


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
    assert lean <= 105 < peft


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
