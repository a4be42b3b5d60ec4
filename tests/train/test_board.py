"""TensorBoard: what its files hold after a run, read back by TensorBoard's own reader."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dpo.catalogue import CATALOGUE
from dpo.train.board import RESULTS, _cell
from tests.train.runs import config, metrics, run


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A run of two steps, evaluated before and after, and its events."""
    flags = ["--data.eval_fraction", 0.4, "--train.eval_prompts", 3, "--train.max_steps", 2]
    flags += ["--train.eval_max_new_tokens", 6, "--train.report_to", "tensorboard"]
    flags += ["--train.eval_exact_match", "true", "--train.peak_tflops", 1]
    folder = run(config(tmp_path_factory.mktemp("board"), *flags))
    (events,) = folder.rglob("events.out.tfevents*")  # one file: no second run of settings
    reader = EventAccumulator(str(events.parent), size_guidance={"tensors": 0, "histograms": 0})
    reader.Reload()
    return folder, reader


def test_a_run_logs_every_metric_of_the_catalogue_and_no_other(board):
    folder, _ = board
    logged = {name for line in metrics(folder) for name in line} - {"step"}
    assert logged == {f"{way}/{name}" for name, each in CATALOGUE.items() for way in each.logged}


def test_every_metric_of_the_log_is_a_scalar_with_the_same_values(board):
    folder, reader = board
    for line in metrics(folder):
        for name, value in line.items():
            if name != "step":
                found = {event.step: event.value for event in reader.Scalars(name)}
                assert found[line["step"]] == pytest.approx(value, rel=1e-6), name


def scalar_steps(folder, name):
    """The steps at which a scalar stands, over all event files of a run."""
    (parent,) = {str(file.parent) for file in folder.rglob("events.out.tfevents*")}
    reader = EventAccumulator(parent)
    reader.Reload()
    return [event.step for event in reader.Scalars(name)]


def charts(reader):
    """Title of each custom chart: its scalars."""
    (event,) = reader.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {
        chart.title: list(chart.multiline.tag) for group in layout.category for chart in group.chart
    }


def test_chosen_and_rejected_and_training_and_held_out_share_a_chart(board):
    _, reader = board
    assert charts(reader)["Loss"] == ["train/loss", "eval/loss"]
    assert charts(reader)["Rewards"] == [
        f"{split}/rewards/{side}" for side in ("chosen", "rejected") for split in ("train", "eval")
    ]


def test_the_charts_name_no_scalar_that_a_run_does_not_log(board):
    folder, reader = board
    logged = {name for line in metrics(folder) for name in line}
    assert {name for names in charts(reader).values() for name in names} | set(RESULTS) <= logged


def test_settings_are_flat_and_their_results_are_the_runs_own_scalars(board):
    _, reader = board
    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["loss.beta"].number_value == pytest.approx(0.1)
    assert settings["model.name_or_path"].string_value == "quickstart/model"
    assert not any(isinstance(value, dict) for value in settings.values())
    content = reader.summary_metadata["_hparams_/experiment"].plugin_data.content
    results = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {result.name.tag for result in results} == set(RESULTS)


def test_the_margins_of_held_out_pairs_are_a_histogram_at_each_evaluation(board):
    """Before training every margin is 0; afterwards they spread."""
    folder, reader = board
    first, last = reader.Histograms("held_out/rewards/margins")
    held_out = json.loads((folder / "held_out.jsonl").read_text().splitlines()[0])
    assert (first.step, last.step) == (0, 2)
    for event in (first, last):
        assert event.histogram_value.num == len(held_out["row"]) > 1
    assert (first.histogram_value.min, first.histogram_value.max) == (0, 0)
    assert last.histogram_value.min < last.histogram_value.max


def test_samples_are_a_table_in_which_control_tokens_are_no_html(board):
    _, reader = board
    first = reader.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert first.startswith("| prompt | answer | chosen |")
    assert "&lt;&#124;im_start&#124;>user<br>" in first
    assert len(first.splitlines()) == 2 + 3


def test_a_cell_of_a_table_stays_one_cell():
    assert _cell("a|b\n<c> & d") == "a&#124;b<br>&lt;c> &amp; d"
