"""What a table says: means and standard deviations over the seeds, as Markdown beside the plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from protomem_kernels.experiments.results import Row
from protomem_kernels.experiments.table import MethodTable
from protomem_kernels.experiments.trial import Trial

RATES = {  # in per cent
    "accuracy": "accuracy",
    "tar_at_far_1e-2": "TAR @ FAR 1e-2",
    "tar_at_far_1e-3": "TAR @ FAR 1e-3",
    "tar_at_far_1e-4": "TAR @ FAR 1e-4",
    "rank1": "rank-1",
    "damaged_tar_at_far_1e-3": "TAR @ FAR 1e-3, damaged images",
}
COSTS = {"ms_per_step": "CPU ms a step", "head_mib": "head, MiB", "peak_mib": "peak, MiB"}


class Figure(NamedTuple):
    """A mean over seeds."""

    mean: float
    deviation: float  # standard, of the sample; 0 of one seed
    seeds: int


def figure(rows: Sequence[Row], method: str, name: str) -> Figure | None:
    """Return the figure ``name`` of a method over all seeds that have it; None: none has."""
    values = [row.figures[name] for row in rows if row.method == method and name in row.figures]
    if not values:
        return None
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def markdown(table: MethodTable, rows: Sequence[Row], command: str, plots: Sequence[str]) -> str:
    """Return the page of a table.

    Args:
        table: what was asked.
        rows: what was found.
        command: that makes the table again.
        plots: names of pictures beside the page.
    """
    shared = next(iter(table.methods.values())).trial
    names = [name for name in RATES if any(name in row.figures for row in rows)]
    head = ["method", *(RATES[name] for name in names), *COSTS.values(), "seeds"]
    body = []
    for method in table.methods:
        cells = [figure(rows, method, name) for name in (*names, *COSTS)]
        if not any(cells):
            continue
        rates = [_rate(cell) for cell in cells[: len(names)]]
        costs = [f"{cell.mean:.3g}" if cell else "" for cell in cells[len(names) :]]
        body.append([method, *rates, *costs, str(max(cell.seeds for cell in cells if cell))])
    commits = sorted({row.commit for row in rows if row.commit})
    lines = [
        f"# {table.title}",
        "",
        *([f"**Claim.** {table.contents.claim}", ""] if table.contents.claim else []),
        *([table.contents.question, ""] if table.contents.question else []),
        *(f"![{table.title}]({plot})" for plot in plots),
        *([""] if plots else []),
        *_rows_of([head, *body]),
        "",
        *_measured_on(shared, rows),
        "CPU time of encoder, head and optimisers, one thread; the head's memory is that of its prototypes and of what "
        "the optimiser keeps for them; the peak is what the whole process held beyond its start.",
        "",
        f"Again: `{command}`" + (f" (measured at {', '.join(commits)})" if commits else ""),
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {key} | {_setting(value)} |" for key, value in shared.settings().items() if not _differs(table, key)),
        *(f"| {key} | by method: {_by_method(table, key)} |" for key in shared.settings() if _differs(table, key)),
    ]
    return "\n".join(lines) + "\n"


def _rate(cell: Figure | None) -> str:
    if cell is None:
        return ""
    return f"{100 * cell.mean:.2f}" + (f" ± {100 * cell.deviation:.2f}" if cell.seeds > 1 else "")


def _rows_of(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    ruler = "| --- |" + " ---: |" * (len(cells[0]) - 1)
    return [head, ruler, *body]


def _measured_on(trial: Trial, rows: Sequence[Row]) -> list[str]:
    pairs = max((row.figures.get("impostor_pairs", 0) for row in rows), default=0)
    if not pairs:
        return []
    count = trial.test_identities if trial.measured_on == "test" else trial.validation_identities
    return [
        f"In per cent, on {count} identities of {trial.data} that nothing was trained on "
        f"({pairs:,.0f} impostor pairs). Mean and standard deviation over the seeds."
    ]


def _differs(table: MethodTable, key: str) -> bool:
    return len({repr(method.trial.settings().get(key)) for method in table.methods.values()}) > 1


def _by_method(table: MethodTable, key: str) -> str:
    return ", ".join(dict.fromkeys(_setting(method.trial.settings().get(key)) for method in table.methods.values()))


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
