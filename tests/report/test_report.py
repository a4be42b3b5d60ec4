"""The report's HTML against the files that it was read from; a browser looks at it elsewhere."""

import html
import json
import os
import re
import shutil
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpo.errors import UserError
from dpo.report import comparison
from dpo.report.charts import MAX_POINTS, Chart, Series, curve
from dpo.report.curves import held_out_charts
from dpo.report.digest import samples_by_kind, token_pairs, verdict
from dpo.report.drawing import draw
from dpo.report.evaluation_tables import evaluation_tables
from dpo.report.length_bias import length_bias, length_rows
from dpo.report.logs import read_logs
from dpo.report.page import is_up_to_date, write_comparison, write_report
from tests.commands import as_process, called
from tests.report.fake_run import FILES, STEPS, fake_run, jsonl, training_line

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(1)'>\"&amp;{{ 7 * 7 }}<!--"


class Tags(HTMLParser):
    """Counts tags and attributes, and keeps the ids."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.ids = Counter(), Counter(), Counter()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self.ids.update(value for name, value in attrs if name == "id")


def charts(page):
    """Title and points of every chart on a page."""
    titles = dict(re.findall(r'<h3 id="([^"]+)-title">([^<]+)</h3>', page))
    data = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page)
    return {html.unescape(titles[key]): json.loads(points) for key, points in data}


def series(points):
    """Name of each series: what is said at each of its places."""
    return {
        each["name"]: dict(zip(each["at"], each["text"], strict=True)) for each in points["series"]
    }


def written(folder, **options):
    return write_report(fake_run(folder, **options)).read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its report, for tests that only read."""
    folder = fake_run(tmp_path_factory.mktemp("runs") / "run")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text("utf-8")


def test_the_table_holds_the_figures_of_the_summary(folder, page):
    summary = json.loads((folder / "summary.json").read_text())
    for key, name, shape in (
        ("eval/exact_match", "Right answers", ".1%"),
        ("eval/rewards/margins", "Reward margin", ".3f"),
        ("eval/loss", "Loss", ".4f"),
        ("eval/logps/rejected", "Log-prob of rejected, nats", ".2f"),
    ):
        before, after = (format(summary[when][key], shape) for when in ("before", "after"))
        row = re.search(rf'<tr><th scope="row">{name}<.*?</tr>', page)
        assert row, name
        assert f'<td class="figure">{before}</td><td class="figure">{after}</td>' in row[0]


def test_pointing_at_a_chart_reads_what_was_logged(page):
    found = charts(page)
    loss, rewards = series(found["Loss"]), series(found["Rewards"])
    assert len(loss["training"]) == STEPS
    assert loss["training"]["step 7"] == f"{training_line(7)['train/loss']:.4g}"
    assert loss["held out"]["step 0"] == "0.6931"
    assert rewards["rejected, training"]["step 9"] == "-0.24"  # -0.6 x 0.05 x 8
    assert series(found["Reward accuracy"])["held out"]["step 20"] == "75.0%"
    assert series(found["Learning rate"])["training"]["step 20"] == "2.5e-05"


def test_every_stop_of_a_curve_shows_each_series_where_it_is_nearest(page):
    """Steps 1 to 20 were logged, evaluations are at 0, 10 and 20: step 7 is nearest to 10."""
    points = charts(page)["Loss"]
    training, held_out = points["series"]
    named = [points["series"][s]["at"][i] for s, i, _ in points["stops"]]
    assert named == [f"step {step}" for step in range(STEPS + 1)]
    _, _, shown = points["stops"][7]
    assert [points["series"][s]["at"][i] for s, i in shown] == ["step 7", "step 10"]
    assert training["name"] == "training"
    assert held_out["name"] == "held out"


def test_places_are_where_matplotlib_draws_the_points():
    """In the SVG the line's path has the same vertices, in px of 420 x 250."""
    line = curve([0, 5, 10], [1.0, -2.0, 4.0], name="a", colour="train")
    drawing = draw(Chart(title="t", series=[line]), "key")
    path = re.search(r'<path d="([^"]*)"[^>]*var\(--train\)', drawing.svg)
    assert path
    drawn = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path[1])]
    (place,) = drawing.points["series"]
    placed = [(4.2 * x, 2.5 * y) for x, y in zip(place["x"], place["y"], strict=True)]
    for there, here in zip(drawn, placed, strict=True):
        assert there == pytest.approx(here, abs=0.05)


def test_hostile_text_stays_text(tmp_path):
    """The same elements and attributes as with harmless text, and the text is there to read."""
    harmless, hostile = (
        written(tmp_path / name / "run", text=text)
        for name, text in (("a", "harmless"), ("b", HOSTILE))
    )
    rows = slice(harmless.index("<body>"), harmless.index('id="configuration"'))  # before the YAML
    assert Tags(hostile).tags == Tags(harmless).tags
    assert Tags(hostile).attributes == Tags(harmless).attributes
    before_yaml = html.unescape(hostile.partition('id="configuration"')[0])
    assert before_yaml.count(HOSTILE) == harmless[rows].count("harmless") > 20
    unescaped = harmless.replace("harmless", HOSTILE)  # the check can fail
    assert Tags(unescaped).tags != Tags(harmless).tags


def test_a_run_name_is_escaped_in_the_points_of_a_comparison(tmp_path):
    folders = [fake_run(tmp_path / name) for name in ("<b>&", "<script>'")]
    page = write_comparison(folders, tmp_path / "c.html").read_text()
    assert "<b>&" not in page
    assert "<script>'" not in page
    names = [each["name"] for each in charts(page)["Loss, held out"]["series"]]
    assert names == ["<b>&", "<script>'"]


def test_text_of_any_script_and_half_a_character_survive(tmp_path):
    page = written(tmp_path, text="\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600 \ud83d")
    assert "\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600 \\ud83d" in page
    assert 'dir="auto"' in page


SUBSETS = (
    ["config.yaml"],
    ["metrics.jsonl"],
    ["samples.jsonl", "held_out.jsonl", "token_rewards.json"],
    ["data_report.json", "held_out.json", "header.txt", "summary.json"],
)


@pytest.mark.parametrize("missing", SUBSETS, ids=lambda names: names[0])
def test_a_report_is_written_whatever_files_are_missing(missing, tmp_path):
    fake_run(tmp_path)
    for file in missing:
        (tmp_path / file).unlink()
    page = write_report(tmp_path).read_text("utf-8")
    assert "<h1>" in page
    sections = {
        "metrics.jsonl": "curves",
        "samples.jsonl": "samples",
        "held_out.jsonl": "pairs",
        "token_rewards.json": "tokens",
        "data_report.json": "data",
        "held_out.json": "evaluation",
    }
    if "config.yaml" in missing:  # no beta, no rewards
        del sections["held_out.jsonl"]
    for file, section in sections.items():
        assert (f'<section id="{section}"' in page) == (file not in missing), section
        assert (f'href="#{section}"' in page) == (file not in missing), section


@pytest.mark.parametrize("only", ["config.yaml", "metrics.jsonl"])
def test_a_report_is_written_from_one_file_alone(only, tmp_path):
    fake_run(tmp_path)
    for file in set(FILES) - {only}:
        (tmp_path / file).unlink()
    assert "<h1>" in write_report(tmp_path).read_text("utf-8")


def test_a_run_of_one_step_without_held_out_pairs_says_what_it_cannot_say(tmp_path):
    fake_run(tmp_path)
    for file in set(FILES) - {"config.yaml"}:
        (tmp_path / file).unlink()
    (tmp_path / "metrics.jsonl").write_text(jsonl([training_line(1)]) + '{"step": 2, "trai')
    page = write_report(tmp_path).read_text()
    assert "only say how the training pairs were fitted: the loss went from 0.6931" in page
    assert list(series(charts(page)["Loss"])) == ["training"]
    assert "<li>1 step</li>" in page


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path):
    fake_run(tmp_path)
    broken = training_line(21) | {"train/grad_norm": float("nan"), "train/loss": float("inf")}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(broken) + "\n")
    found = charts(write_report(tmp_path).read_text())
    assert "step 21" not in series(found["Gradient norm"])["training"]
    assert "step 21" in series(found["Reward margin"])["training"]


def test_ten_thousand_steps_are_thinned_out_and_no_extreme_is_lost():
    """200 buckets of 50 values 0, 1, 2, ...: the first has mean 24.5; the spike is in the third."""
    values = [float(i) for i in range(10_000)]
    values[123] = 1e6
    thinned = curve(list(range(1, 10_001)), values, name="a", colour="train")
    assert len(thinned.x) == MAX_POINTS // 2
    assert thinned.y[0] == 24.5
    assert thinned.at[0] == "steps 1 to 50"
    assert thinned.text[0] == "24.5 (0 to 49)"
    assert thinned.band
    assert thinned.band[1][2] == max(thinned.band[1]) == 1e6
    assert min(thinned.band[0]) == 0
    assert curve([1, 2], [3.0, 4.0], name="a", colour="train").band is None


def test_a_long_run_is_reported_in_time_and_says_that_it_is_thinned_out(tmp_path):
    fake_run(tmp_path, steps=10_000, eval_steps=500)
    start = time.process_time()
    page = write_report(tmp_path).read_text()
    assert time.process_time() - start < 6  # 1.8 s of one core
    assert "Long series are thinned out: each point is the mean of a bucket" in page
    assert len(page) < 2_000_000


def test_the_same_run_gives_the_same_bytes_and_no_id_twice(folder, page, tmp_path):
    assert write_report(folder, tmp_path / "again.html").read_text() == page
    assert max(Tags(page).ids.values()) == 1
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", page))
    assert used <= set(Tags(page).ids)


def test_the_page_fetches_nothing(page):
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "url(http" not in page
    assert "@import" not in page


def with_accuracy(run, before, after):
    for line, value in zip((run.evaluations[0], run.evaluations[-1]), (before, after), strict=True):
        line["eval/exact_match"] = value
    return verdict(run)


def test_the_verdict_compares_shares_at_two_standard_errors(tmp_path):
    """12 prompts, 25 % to 75 %: the error is sqrt(2 x 3/16 / 12) = 0.177, and 0.5 > 0.354."""
    run = read_logs(fake_run(tmp_path))
    assert with_accuracy(run, 0.25, 0.75).startswith("The policy became better: 75.0%")
    assert with_accuracy(run, 0.75, 0.25).startswith("The policy became worse: 25.0%")
    assert "neither clearly better nor worse" in with_accuracy(run, 0.25, 0.5)  # 0.25 < 0.382


def test_the_verdict_says_when_the_run_was_better_earlier(tmp_path):
    """At step 10 half of 12 answers are right; 100 % there is 0.5 more, at an error of 0.144."""
    run = read_logs(fake_run(tmp_path))
    assert "had been" not in with_accuracy(run, 0.25, 0.5)
    run.evaluations[1]["eval/exact_match"] = 1.0
    assert "At step 10 it had been 100.0%." in with_accuracy(run, 0.25, 0.5)


def test_without_ground_truth_the_verdict_goes_by_reward_accuracy(tmp_path):
    """40 pairs: two standard errors of a coin are 0.158."""
    run = read_logs(fake_run(tmp_path, exact_match=False))
    assert verdict(run).startswith("The policy learned the preference: the rewards rank 75.0% of")
    run.evaluations[-1]["eval/rewards/accuracies"] = 0.65
    assert verdict(run).startswith("No clear sign")
    run.evaluations[-1]["eval/rewards/accuracies"] = 0.3
    assert verdict(run).startswith("It learned the opposite")


def test_rewards_that_follow_length_are_a_finding(tmp_path):
    """Chosen is longer in every other pair; there its reward margin is 1, elsewhere -0.5."""
    lengths = [4 if i % 2 else -4 for i in range(80)]
    margins = [1.0 if length > 0 else -0.5 for length in lengths]
    run = read_logs(fake_run(tmp_path / "a", margins=margins, lengths=lengths))
    assert length_rows(run) == [
        ("chosen is longer", "longer", 40, 1.0),
        ("chosen is shorter", "shorter", 40, 0.0),
    ]
    (finding,) = length_bias(run)
    assert "correlation 1.00" in finding.saw
    assert "100.0% on pairs whose chosen answer is longer, 0.0% where" in finding.saw

    fair = [1.0 if i % 4 < 2 else -0.5 for i in range(80)]
    assert not length_bias(read_logs(fake_run(tmp_path / "b", margins=fair, lengths=lengths)))
    few = read_logs(fake_run(tmp_path / "c", margins=margins[:10], lengths=lengths[:10]))
    assert not length_bias(few)


def test_tokens_keep_the_text_and_the_sum_of_the_rewards(tmp_path):
    """The piece without text has 0.125, the next one 0.125; the last is not scored."""
    run = read_logs(fake_run(tmp_path, text="Rome"))
    (pair,), end = token_pairs(run)
    pieces = pair["chosen"]["pieces"]
    assert "".join(text for text, *_ in pieces) == "The capitalRome<|im_end|>"
    assert [reward for _, reward, _ in pieces] == [0.0, 0.25, -0.5, 0.25, None]
    assert pair["chosen"]["sum"] == 0.0
    assert end == pytest.approx(0.5)
    assert [strength for *_, strength in pieces] == pytest.approx([0, 0.5, -1, 0.5, 0])


def test_samples_are_grouped_by_right_and_wrong(tmp_path):
    """Of prompts 0 to 11, thirds are right before and evens after."""
    groups = samples_by_kind(read_logs(fake_run(tmp_path / "a")))
    assert [(group["name"], group["count"]) for group in groups] == [
        ("Right before, wrong now", 2),  # 3, 9
        ("Wrong before and now", 4),  # 1, 5, 7, 11
        ("Wrong before, right now", 4),  # 2, 4, 8, 10
        ("Right before and now", 2),  # 0, 6
    ]
    before, after = groups[0]["rows"][0]
    assert (before["index"], after["answer"]) == (3, "answer 3 at step 20 ")
    (group,) = samples_by_kind(read_logs(fake_run(tmp_path / "b", exact_match=False)))
    assert (group["name"], group["count"]) == ("", 12)
    assert ">wrong</span>" not in write_report(tmp_path / "b").read_text()


def test_margins_before_training_are_not_drawn_but_said(page):
    found = charts(page)
    (margins,) = found["Reward margins, pair by pair"]["series"]
    assert sum(int(text.split()[0]) for text in margins["text"]) == 40
    assert "the margin of every pair was 0, by definition" in page
    assert len(found["Chosen against rejected"]["series"]) == 2
    assert len(found["Reward against length"]["stops"]) == 80


def test_margins_before_training_are_drawn_where_there_was_no_reference(tmp_path):
    """Its log-probs are 0: before training every reward is beta x the policy's own log-prob."""
    fake_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    for line in lines:
        line["ref_chosen_logps"] = line["ref_rejected_logps"] = [0.0] * 40
    lines[0]["policy_chosen_logps"] = [-1.0 * i for i in range(40)]
    (tmp_path / "held_out.jsonl").write_text(jsonl(lines))
    margins = held_out_charts(read_logs(tmp_path))[0]
    assert [each.name for each in margins.series] == ["after", "before"]
    assert "by definition" not in margins.note

    (tmp_path / "held_out.jsonl").write_text(jsonl(lines[1:]))  # a single evaluation
    assert [len(chart.series) for chart in held_out_charts(read_logs(tmp_path))] == [1, 1, 2]


def test_only_configuration_and_evaluation_may_name_a_folder_of_this_machine(folder, page):
    """They say what was asked for; else, of the rows' file two names stay, of the run its own."""
    assert "a/b.jsonl: text" in page
    assert "/home/me" not in page
    visible = page[: page.index('<section id="configuration"')]
    assert str(folder) not in visible


def test_the_report_shows_the_tables_that_evaluate_prints(tmp_path):
    """Cell by cell, from the same figures."""
    folder = fake_run(tmp_path / "run")
    tables = list(evaluation_tables(read_logs(folder).measured))
    page = write_report(folder).read_text()
    shown = page.split('id="evaluation"')[1].split("</section>")[0]
    cells = [cell for table in tables for row in table.rows for cell in row if cell]
    assert len(cells) > 20
    for cell in cells:
        assert f">{cell.strip()}<" in shown
    assert "87.5%" in str(tables[0])


def test_results_of_different_weights_are_not_shown_as_those_of_one_model(tmp_path):
    folder = fake_run(tmp_path / "run")
    assert "measured, with the weights in final/." in write_report(folder).read_text()
    held_out = json.loads((folder / "held_out.json").read_text())
    harness = held_out | {"weights": "best", "rows": [], "tables": {"base": "a", "policy": "b"}}
    (folder / "lm_eval.json").write_text(json.dumps(harness))
    assert "measured, with the weights in final/ and best/." in write_report(folder).read_text()
    (folder / "lm_eval.json").write_text(json.dumps(harness | {"sha256": {}}))
    said = "with different weights: held_out with those in final/, lm_eval with those in best/."
    assert said in write_report(folder).read_text()


def two_runs(folder, **second):
    folders = [fake_run(folder / "a"), fake_run(folder / "b", **second)]
    return comparison.name_apart([read_logs(f) for f in folders], folders)


def test_a_comparison_shows_the_keys_that_differ_and_stars_the_best(tmp_path):
    runs = two_runs(tmp_path, steps=10, eval_steps=5)
    assert comparison.differing_keys(runs) == []  # but for output_dir
    columns = {column.name: column for column in comparison.results(runs)}
    assert columns["Right answers"].texts == ["75.0%", "50.0%"]
    assert columns["Right answers"].best == [True, False]
    assert columns["Reward margin"].best == [True, False]
    assert columns["Reward accuracy"].best == [False, False]  # the same
    assert columns["KL to the reference, nats per answer"].best == [
        False,
        False,
    ]  # a cost, not a result
    page = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html").read_text()
    assert page.count("&#9733;") == sum(sum(column.best) for column in columns.values())


def test_losses_of_different_betas_are_not_compared(tmp_path):
    runs = two_runs(tmp_path, beta=0.25, steps=10, eval_steps=5)
    assert comparison.differing_keys(runs) == [("loss.beta", ["0.5", "0.25"])]
    columns = {column.name: column for column in comparison.results(runs)}
    assert columns["Loss"].best == columns["Reward margin"].best == [False, False]
    assert columns["Right answers"].best == [True, False]


def test_the_frontier_has_every_evaluation_and_the_truth_where_all_know_it(tmp_path):
    """KL 0.0625 a step, right answers 25 % and 2.5 % a step; lines are sorted by beta."""
    (chart,) = comparison.frontier(two_runs(tmp_path / "x", beta=0.25))
    assert [each.name for each in chart.series] == ["beta 0.25", "beta 0.5"]
    assert chart.series[0].x == [0.0, 0.625, 1.25]
    assert chart.series[0].y == [0.25, 0.5, 0.75]
    assert chart.series[0].at[1] == "b, step 10"
    assert "right" in chart.series[0].text[1]
    assert draw(chart, "f").points["series"][0]["x"] == sorted(
        draw(chart, "f").points["series"][0]["x"]
    )
    (chart,) = comparison.frontier(two_runs(tmp_path / "y", exact_match=False))
    assert "No ground truth here" in chart.note
    assert chart.title == "Reward accuracy against KL"
    assert chart.series[0].x == [0.625, 1.25]  # before training all rewards tie


def test_runs_of_one_folder_name_are_told_apart(tmp_path):
    folders = [fake_run(tmp_path / name / "run") for name in ("x", "y")]
    runs = comparison.name_apart([read_logs(folder) for folder in folders], folders)
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_a_legend_names_each_group_once():
    points = {"x": [1.0], "y": [2.0], "at": ["a"], "text": ["b"], "colour": "run-0"}
    chart = Chart(title="t", series=[Series(name="beta 1", **points)] * 3)
    assert [each.name for each in chart.legend] == ["beta 1"]


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"wanted a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"wanted a run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"wanted two or more"):
        write_comparison([fake_run(tmp_path / "a")], tmp_path / "c.html")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl, line 2 is broken"),
        ("metrics.jsonl", "5\n", "line 1 is broken: got a int, wanted a dict"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl cannot be read: 'utf-8' codec"),
        ("held_out.jsonl", "{}\n{\n", "held_out.jsonl, line 2 is broken"),
        ("held_out.json", '{"run": ', "held_out.json is broken: Expecting value"),
        ("held_out.json", "[]", "held_out.json is broken: got a list, wanted a dict"),
        ("config.yaml", "model: [", "config.yaml is broken: while parsing"),
        ("config.yaml", "loss:\nbeta: 1\n", "config.yaml is broken: wanted sections"),
    ],
)
def test_a_broken_file_is_a_user_error_that_names_it(file, content, said, tmp_path):
    fake_run(tmp_path)
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        write_report(tmp_path)
    assert said in str(error.value)
    assert str(tmp_path / file) in str(error.value)


@pytest.mark.parametrize("output", ["/tmp", "/proc/report.html", "/proc/no/report.html"])
def test_a_page_that_cannot_be_written_is_a_user_error(output, folder):
    with pytest.raises(UserError, match=f"{output}.* cannot be written"):
        write_report(folder, Path(output))


def test_the_script_writes_one_run_or_a_comparison(tmp_path):
    for name in ("a", "b"):
        fake_run(tmp_path / name)
    code, out, err = as_process("report.py", tmp_path / "a")
    assert (code, err) == (0, "")
    assert out == f"The report is in {tmp_path / 'a' / 'report.html'}\n"
    code, out, err = called("report.py", tmp_path / "a", tmp_path / "b")
    assert (code, err) == (0, "")
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()


def test_the_script_leaves_a_report_that_is_up_to_date_and_says_so(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run")
    file = run / "report.html"
    assert called("report.py", run)[1] == f"The report is in {file}\n"
    page = file.read_bytes()
    os.utime(run / "metrics.jsonl")  # newer, and the same
    with monkeypatch.context() as patched:
        patched.setattr("dpo.report.page.draw", None)  # a second page would fail
        code, out, err = called("report.py", run)
    assert (code, err) == (0, "")
    assert out == f"The report in {file} is up to date: nothing changed since it was written\n"
    file.write_bytes(page[:-100])  # cut off in writing
    assert called("report.py", run)[1] == f"The report is in {file}\n"
    assert file.read_bytes() == page


@pytest.mark.parametrize("name", [name for name in FILES if name != "summary.json"])
def test_a_report_is_out_of_date_when_a_file_of_the_run_has_changed(name, folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / folder.name)
    assert is_up_to_date(run, run / "report.html")
    (run / name).unlink()
    assert not is_up_to_date(run, run / "report.html")


def test_a_report_is_out_of_date_when_other_code_would_draw_it(folder, tmp_path, monkeypatch):
    assert is_up_to_date(folder, folder / "report.html")
    assert not is_up_to_date(folder, tmp_path / "absent.html")
    monkeypatch.setattr("dpo.report.page.version", lambda name: "another")
    assert not is_up_to_date(folder, folder / "report.html")


def test_the_script_refuses_a_folder_without_a_run_in_one_message(tmp_path):
    code, _, err = called("report.py", tmp_path)
    assert code == 2
    assert "no metrics.jsonl" in err
    assert "Traceback" not in err


def test_a_run_that_held_nothing_out_has_a_report(tmp_path):
    """As the article's: its summary is {"before": {}, "after": {}}."""
    folder = fake_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [json.dumps(line) + "\n" for line in lines if "train/loss" in line]
    (folder / "metrics.jsonl").write_text("".join(trained))
    (folder / "summary.json").write_text(json.dumps({"before": {}, "after": {}}))
    (folder / "token_rewards.json").write_text("[]")
    for name in ("held_out.jsonl", "samples.jsonl", "held_out.json"):
        (folder / name).unlink()
    page = write_report(folder).read_text()
    assert 'id="curves"' in page
    assert 'id="result"' not in page
