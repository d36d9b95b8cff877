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
    """Add to each row its figure of the last run, as ``last``, where there was one; keep this run's for the next.

    Args:
        folder: of the results.
        results: of this run.
    """
    kept = _read(folder / FILE)
    here = ", ".join(str(results.machine.get(key) or "none") for key in SUCH)
    before = kept.get(here, {})
    rows = [{**row, "last": before[row["name"]]} if row["name"] in before else row for row in results.rows]
    kept[here] = before | {row["name"]: figure_of(row) for row in results.rows}
    with written_whole(folder / FILE) as temporary:
        temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return replace(results, rows=rows)


def figure_of(row: dict[str, Any]) -> float:
    """Return what a row is about: its ratio, or the value of one of ``--quick``; seconds where it has neither."""
    return float(next(row[key] for key in ("ratio", "value", "seconds") if key in row))


def change(row: dict[str, Any]) -> str:
    """Return the last figure and what became of it, or nothing.

    >>> change({"ratio": 1.1, "last": 1.0}), change({"ratio": 1.1})
    ('1.00 (+10 %)', '')
    """
    if "last" not in row:
        return ""
    became = f" ({100 * (figure_of(row) / row['last'] - 1):+.0f} %)" if row["last"] else ""
    return f"{row['last']:.2f}{became}"


def _read(file: Path) -> dict[str, dict[str, float]]:
    """Return what is kept: nothing if it is not there, or no such file."""
    try:
        return {
            str(machine): {str(name): float(figure) for name, figure in figures.items()}
            for machine, figures in json.loads(file.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
