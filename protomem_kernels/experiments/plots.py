"""The pictures of a table: dots or lines of its main figure, and how prototypes age."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protomem_kernels.experiments.ages import COSINE
from protomem_kernels.experiments.report import COSTS, RATES, Figure, figure
from protomem_kernels.experiments.results import Row
from protomem_kernels.experiments.table import MethodTable
from protomem_kernels.training.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

INK, GREY = "#222222", "#8a8a8a"
COLOURS = ("#1f6fb4", "#b4381f", "#4a9a4a", "#c98a00", "#7a4fa0", "#222222", "#3aa6a6", "#a0527a", "#8a8a8a", "#a8c64a")


def draw_table(path: Path, table: MethodTable, rows: Sequence[Row]) -> None:
    """Write a dot for every method, or lines where methods are numbers, each with its standard deviation."""
    found = {name: cell for name in table.methods if (cell := figure(rows, name, table.contents.figure))}
    numbered = any(table.methods[name].place.x is not None for name in found)
    picture, axes = _picture(table.title, 4.4 if numbered else 1.4 + 0.34 * len(found))
    if numbered:
        _lines(axes, table, found)
    else:
        _dots(axes, table, found)
    _save(picture, path)


def draw_ages(path: Path, table: MethodTable, rows: Sequence[Row]) -> None:
    """Write the cosine of stored and re-computed prototypes against the age, a line for every method."""
    picture, axes = _picture("Stored prototypes against re-computed ones", 4.4)
    names = {name for row in rows for name in row.figures if name.startswith(COSINE)}
    ages = sorted(int(name.removeprefix(COSINE)) for name in names)
    for method, colour in zip(table.methods, _colours(len(table.methods)), strict=True):
        cells = {age: cell for age in ages if (cell := figure(rows, method, f"{COSINE}{age}"))}
        if cells:
            places = [max(age, 0.5) for age in cells]  # age 0, this step's, at the left end
            means, spread = zip(*((cell.mean, cell.deviation) for cell in cells.values()), strict=True)
            axes.errorbar(places, means, yerr=spread, fmt="o-", color=colour, capsize=2, markersize=4, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("age: steps since the identity was last in a batch (leftmost: this one)")
    axes.set_ylabel("cosine of the stored prototype with the re-computed one")
    picture.set_figwidth(9.5)
    picture.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(picture, path)


def _picture(title: str, height: float) -> tuple[Picture, Axes]:
    import matplotlib.figure

    picture = matplotlib.figure.Figure(figsize=(7.5, height), layout="constrained")
    axes = picture.subplots()
    axes.set_title(title, color=INK, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def _save(picture: Picture, path: Path) -> None:
    with written_whole(path) as temporary:
        picture.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _scale(table: MethodTable) -> tuple[float, str]:
    """Return what the plotted figure is multiplied with, and its label."""
    rate = table.contents.figure in RATES
    return (
        (100, f"{RATES[table.contents.figure]}, %")
        if rate
        else (1, COSTS.get(table.contents.figure, table.contents.figure))
    )


def _dots(axes: Axes, table: MethodTable, found: Mapping[str, Figure]) -> None:
    places = range(len(found))[::-1]
    scale, label = _scale(table)
    means = [scale * cell.mean for cell in found.values()]
    spread = [scale * cell.deviation for cell in found.values()]
    axes.errorbar(means, places, xerr=spread, fmt="o", color=COLOURS[0], ecolor=GREY, capsize=3)
    axes.set_yticks(places, list(found))
    axes.set_xlabel(label)


def _lines(axes: Axes, table: MethodTable, found: Mapping[str, Figure]) -> None:
    """Draw those with a place on the axis as lines, and the others as levels."""
    lines: dict[str, list[tuple[float, Figure]]] = defaultdict(list)
    levels = {}
    for name, cell in found.items():
        place, line = table.methods[name].place.x, table.methods[name].place.line
        if place is None:
            levels[name] = cell
        else:
            lines[line].append((place, cell))
    scale, label = _scale(table)
    colours = iter(_colours(len(lines) + len(levels)))
    for line, cells in lines.items():
        cells.sort(key=lambda placed: placed[0])
        places = [place for place, _ in cells]
        means = [scale * cell.mean for _, cell in cells]
        spread = [scale * cell.deviation for _, cell in cells]
        axes.errorbar(places, means, yerr=spread, fmt="o-", color=next(colours), capsize=3, label=line)
    for name, cell in levels.items():
        axes.axhline(scale * cell.mean, linestyle="--", color=next(colours), label=name)
    if table.contents.x_log:
        axes.set_xscale("log")
    if table.contents.figure in COSTS:
        axes.set_yscale("log")
    axes.set_xlabel(table.contents.x_label)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)
