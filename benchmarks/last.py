"""What each benchmark gave the last time on such a machine, so that a run says what has changed since.

The folder of the results keeps it: figures of other machines, and of benchmarks that this run leaves out, stay.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from protomem_kernels.training.files import written_whole

FILE = "last.json"
SUCH = ("cpu", "gpu", "capability", "threads", "dtype")  # what has to be alike for two figures to be compared


def with_last(folder: Path, results: Results) -> Results:
    """Add to each row that the last run had too its figure then, ``last``, and by what share it grew since, ``change``.

    This run's figures are kept for the next.

    Args:
        folder: of the results.
        results: of this run.
    """
    kept = _read(folder / FILE)
    here = ", ".join(str(results.machine.get(key) or "none") for key in SUCH)
    before = kept.get(here, {})
    rows = [row | _since(row, before.get(row["name"])) for row in results.rows]
    kept[here] = before | {row["name"]: figure_of(row) for row in results.rows}
    with written_whole(folder / FILE) as temporary:
        temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return replace(results, rows=rows)


def figure_of(row: dict[str, Any]) -> float:
    """Return what a row is about: its ratio, or the value of one of ``--quick``; seconds where it has neither."""
    return float(next(row[key] for key in ("ratio", "value", "seconds") if key in row))


def _since(row: dict[str, Any], last: float | None) -> dict[str, float]:
    if not last:  # of nothing, which a peak of memory may be, no change is a share
        return {} if last is None else {"last": last}
    return {"last": last, "change": figure_of(row) / last - 1}


def _read(file: Path) -> dict[str, dict[str, float]]:
    """Return what is kept: nothing if it is not there, or no such file."""
    try:
        return {
            str(machine): {str(name): float(figure) for name, figure in figures.items()}
            for machine, figures in json.loads(file.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
