"""What is printed at the end of a run."""

from dpo.train.tracking import closing_table, side_by_side


def test_the_closing_table_shows_what_both_evaluations_measured():
    before = {"step": 0, "eval/exact_match": 0.41, "eval/kl": 0.0}
    after = {"step": 9, "eval/exact_match": 0.975, "eval/kl": 3.25, "eval/loss": 0.1}
    table = closing_table(before, after).splitlines()
    assert table[1].split() == ["Right", "answers", "41.0%", "97.5%"]
    assert table[2].endswith("0.00        3.25")
    assert len(table) == 3


def test_samples_stand_side_by_side():
    old = [{"index": 3, "prompt": "2 + 2?", "answer": "5", "chosen": "4"}]
    new = [{"index": 3, "prompt": "2 + 2?", "answer": "4", "chosen": "4"}]
    assert side_by_side(old, new).splitlines() == [
        "2 + 2?",
        "  before: 5",
        "  after:  4",
        "  chosen: 4",
    ]
