"""Makes a release: ``make release`` builds what is published into dist/, checks it and prints one table.

The sdist comes from the checkout; the pure-Python wheel and the wheel with the compiled CPU part are built from that
sdist, each of the three twice, in different folders. Any finding fails. docs/release.md says what each check is for.
"""

from __future__ import annotations

import shutil
import sys

from release import checks, made
from release.running import ROOT, FindingError, say

DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"


def main() -> int:
    """Build, check, print; return the exit code."""
    shutil.rmtree(WORK, ignore_errors=True)
    made.be_reproducible()
    first, second = (made.everything(WORK / name) for name in ("first", "second"))
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    for file in first:
        shutil.copy2(file, DIST / file.name)
    rows = []
    for name, check in checks.ALL.items():
        try:
            rows.append((name, True, check(DIST)))
        except FindingError as finding:
            rows.append((name, False, str(finding)))
    rows.append(("two builds", *made.compared(first, second)))
    say("")
    for name, good, told in rows:
        lines = told.splitlines() or [""]
        say(f"{'ok  ' if good else 'FAIL'}  {name:<20}  {lines[0]}")
        for line in lines[1:]:
            say(f"{'':<28}{line}")
    return 0 if all(good for _, good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
