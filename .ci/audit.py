"""Reads what pip-audit found, and says it: advisories, and what could not be looked up.

pip-audit ends with 0 where it could look up nothing, as on a machine without a network.
"""

import json
import sys
from typing import Any


def verdict(report: dict[str, Any]) -> tuple[list[str], bool]:
    """What to say, and whether every package was looked up and has no advisory."""
    packages = report["dependencies"]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    looked_up = [p for p in packages if "skip_reason" not in p]
    lines = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or '-'}"
        for p in looked_up
        for v in p["vulns"]
    ]
    found = len(lines)
    lines.append(f"{len(looked_up)} of {len(packages)} packages looked up, {found} advisories")
    if skipped:
        lines.append(f"NOT looked up (is there a network?): {', '.join(skipped)}")
    return lines, not skipped and not found


if __name__ == "__main__":
    try:
        said, is_clean = verdict(json.load(sys.stdin))
    except ValueError:
        said, is_clean = ["NOT audited: pip-audit gave no report; see above"], False
    print("\n".join(said))
    sys.exit(not is_clean)
