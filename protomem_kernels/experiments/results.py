"""The rows of a table as they come: a CSV file that grows by a line per trial, and is never half-written.

A row is a trial's: its method, its seed, a digest of its settings, its figures. One whose settings are no longer those
of the table counts for nothing and is made again, so that what stands in a file was all measured under its own name.
The file with it is kept under another name, from which a table of such settings takes its rows again.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from protomem_kernels.experiments.ages import COSINE
from protomem_kernels.experiments.table import Method, MethodTable
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.files import written_whole

KEYS = ("method", "seed", "settings", "commit")


class Row(NamedTuple):
    """One trial that was run.

    Attributes:
        method, seed: which.
        settings: the digest of what decides its figures.
        commit: of the sources that ran it; "" where they are no checkout.
        figures: by name.
    """

    method: str
    seed: int
    settings: str
    commit: str
    figures: Mapping[str, float]


class Results:
    """The rows of one table in a file.

    Raises:
        RunError: the file cannot be read or written, or is none of these.
    """

    def __init__(self, path: Path, table: MethodTable) -> None:
        self.path, self.table = path, table
        found = read_rows(path) if path.exists() else []
        wanted = {(method.name, seed): method.trial.digest() for method, seed in table.trials}
        self.rows = [row for row in found if wanted.get((row.method, row.seed)) == row.settings]
        self.dropped = len(found) - len(self.rows)

    def missing(self) -> list[tuple[Method, int]]:
        """Return the trials that are still to be run, in the table's order."""
        done = {(row.method, row.seed) for row in self.rows}
        return [(method, seed) for method, seed in self.table.trials if (method.name, seed) not in done]

    def borrow(self, method: Method, seed: int) -> bool:
        """Take the row of such a trial from another table of the folder, and say whether there is one."""
        row = self._elsewhere.get((method.trial.digest(), seed))
        if row is None:
            return False
        self.add(row._replace(method=method.name))
        return True

    @cached_property
    def _elsewhere(self) -> dict[tuple[str, int], Row]:
        """The rows of the folder's other files of results, by settings and seed; with ages, if the table has them."""
        others = (path for path in sorted(self.path.parent.glob("*.csv")) if path != self.path and holds_results(path))
        rows = (row for path in others for row in read_rows(path))
        if self.table.contents.ages:
            rows = (row for row in rows if any(name.startswith(COSINE) for name in row.figures))
        return {(row.settings, row.seed): row for row in rows}

    def add(self, row: Row) -> None:
        """Write one more row, with all others, in the table's order.

        A file with rows that are no longer of the table is kept beside it first, under a name of its own.
        """
        if self.dropped:
            numbers = (self.path.with_name(f"{self.path.stem}.before-{number}.csv") for number in itertools.count(1))
            self.path.rename(next(path for path in numbers if not path.exists()))
            self.dropped = 0
        place = {name: number for number, name in enumerate(self.table.methods)}
        self.rows = sorted([*self.rows, row], key=lambda row: (row.seed, place[row.method]))
        write_rows(self.path, self.rows)


def holds_results(path: Path) -> bool:
    """Say whether a file begins as one of results does; whatever else lies in the folder is nobody's business."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().rstrip("\n").split(",")[: len(KEYS)] == [*KEYS]
    except (OSError, UnicodeDecodeError):
        return False


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file.

    Raises:
        RunError: it is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            if lines.fieldnames is None or tuple(lines.fieldnames[: len(KEYS)]) != KEYS:
                raise RunError(f"{path} must begin with the columns {', '.join(KEYS)}, got {lines.fieldnames}")
            return [
                Row(
                    line["method"],
                    int(line["seed"]),
                    line["settings"],
                    line["commit"],
                    {name: float(line[name]) for name in lines.fieldnames[len(KEYS) :] if line[name] != ""},
                )
                for line in lines
            ]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} holds no results ({error}); move it away to begin anew") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows whole; a figure has as many digits as say something."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, *names])
        for row in rows:
            figures = [said(row.figures.get(name)) for name in names]
            writer.writerow([row.method, row.seed, row.settings, row.commit, *figures])


def said(value: float | None) -> str:
    """Return a figure as it stands in a file.

    >>> said(0.123456789), said(12.0), said(None)
    ('0.123457', '12', '')
    """
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
