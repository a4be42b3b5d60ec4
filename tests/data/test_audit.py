"""The counts are whole, and are read back."""

import pytest

from dpo.data.audit import MAX_ROWS_NAMED, Audit, Tally


def test_an_audit_reads_its_own_report():
    audit = Audit(rows_read=3, pairs_kept=2, formats={"a.jsonl": "text"})
    audit.drop("empty answer", 2)
    audit.shorten("prompt", 1)
    audit.note("border token merged", 3)
    assert audit.report() == {
        "rows_read": 3,
        "pairs_kept": 2,
        "formats": {"a.jsonl": "text"},
        "dropped": {"empty answer": {"count": 1, "rows": [2]}},
        "cut": {"prompt": {"count": 1, "rows": [1]}},
        "noted": {"border token merged": {"count": 1, "rows": [3]}},
    }
    assert Audit.from_report(audit.report()) == audit
    assert audit.summary() == (
        "2 of 3 rows kept; format text; dropped: 1 empty answer; cut: 1 prompt; "
        "noted: 1 border token merged"
    )


def test_an_audit_that_lost_a_row_does_not_report():
    with pytest.raises(AssertionError):
        Audit(rows_read=2, pairs_kept=1).report()


def test_an_audit_counts_all_rows_and_names_the_first_thousand():
    tally = Tally()
    for row in range(1, MAX_ROWS_NAMED + 6):
        tally.add(row)
    assert (tally.count, tally.rows[-1], len(tally.rows)) == (1005, 1000, 1000)
    whole = Audit()
    whole.absorb(Audit(rows_read=1005, dropped={"overlong": tally}), "a")
    whole.absorb(Audit(rows_read=1005, dropped={"overlong": tally}), "b")
    merged = whole.dropped["overlong"]
    assert (merged.count, merged.rows[0], len(merged.rows)) == (2010, "a:1", 1000)
    assert (tally.count, tally.rows[0]) == (1005, 1)  # what was absorbed is as it was
