"""What pip-audit says is passed on, also that it could look up nothing."""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / ".ci/audit.py")
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)
FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3", "2.1"]}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def said(*packages):
    lines, is_clean = audit.verdict({"dependencies": list(packages)})
    return "; ".join(lines), is_clean


def test_a_clean_list_passes():
    assert said(FINE, FINE) == ("2 of 2 packages looked up, 0 advisories", True)


def test_an_advisory_fails_with_the_version_that_mends_it():
    words, is_clean = said(FINE, BAD)
    assert words == "b 2: PYSEC-1, mended in 3, 2.1; 2 of 2 packages looked up, 1 advisories"
    assert not is_clean


def test_what_could_not_be_looked_up_fails_and_is_named():
    words, is_clean = said(FINE, SKIPPED)
    assert words.endswith("NOT looked up (is there a network?): c")
    assert not is_clean
