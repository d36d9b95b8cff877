"""The plots of a benchmark run: every peer in units of G, against the size of the memory, against the identities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from protomem_kernels.training.files import written_whole
from protomem_kernels.training.pictures import INK

LOSS = "margin_softmax_loss"
WHATS = ("forward", "embeddings' gradient", "prototypes' gradient")
SHADES = ("#9cc3e6", "#1f6fb4", "#0d3a63")
PEER_COLOURS = ("#b4381f", "#c98a00", "#6a8f3c", "#7b5aa6", "#8a8a8a", "#b06c9e")
OUR_COLOURS = ("#1f6fb4", "#5fa8dc", "#0d3a63")
Row = dict[str, Any]


def draw_plots(folder: Path, results: Results) -> list[Path]:
    """Draw what the rows allow for; return the files written."""
    loss = [row for row in results.rows if row.get("operator") == LOSS and row["what"] in WHATS]
    plots: list[tuple[str, list[Row], Callable[[Any, list[Row]], None]]] = [
        ("ratio_to_g.png", _at_first_size(loss), _draw_ratios),
        ("against_memory_size.png", _along_the_memory(loss), _draw_against_memory_size),
        (
            "against_identities.png",
            [row for row in results.rows if row.get("identities")],
            _draw_against_identities,
        ),
    ]
    return [_draw(folder / name, results, rows, draw) for name, rows, draw in plots if rows]


def _draw(path: Path, results: Results, rows: list[Row], draw: Callable[[Any, list[Row]], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    draw(figure, rows)
    where = results.machine
    machine = f"{where['gpu'] or where['cpu']}, {where['threads']} threads"
    subtitle = f"{machine}, {where['dtype']}, torch {where['torch']}, {where['date'][:10]}"
    figure.supxlabel(subtitle, color="#8a8a8a", fontsize=9)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    return path


def _at_first_size(rows: list[Row]) -> list[Row]:
    """Return the rows of the size that was measured first."""
    return [row for row in rows if _size(row) == _size(rows[0])]


def _along_the_memory(rows: list[Row]) -> list[Row]:
    """Return the rows with the embeddings' gradient at the first row's B and D, by ascending M."""
    kept = [row for row in rows if row["what"] == WHATS[1] and (row["B"], row["D"]) == (rows[0]["B"], rows[0]["D"])]
    return sorted(kept, key=lambda row: int(row["M"]))


def _size(row: Row) -> tuple[int, int, int]:
    return row["B"], row["M"], row["D"]


def _describe(row: Row, *sizes: str) -> str:
    return ", ".join(f"{name} = {row[name]:,}" for name in sizes)


def _colours(names: list[str]) -> dict[str, str]:
    """Return one colour per name; ours are blue."""
    ours = [name for name in names if name.startswith("protomem")]
    others = [name for name in names if name not in ours]
    return dict(zip(ours, OUR_COLOURS, strict=False)) | dict(zip(others, PEER_COLOURS, strict=False))


def _draw_ratios(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    peers = list(dict.fromkeys(row["peer"] for row in rows))[::-1]
    whats = [what for what in WHATS if any(row["what"] == what for row in rows)]
    height = 0.8 / len(whats)
    for place, what in enumerate(whats):
        found = {row["peer"]: row["ratio"] for row in rows if row["what"] == what}
        positions = [peers.index(peer) + 0.4 - (place + 0.5) * height for peer in found]
        label = what if what == WHATS[0] else f"+ {what}"
        bars = axes.barh(positions, list(found.values()), height, color=SHADES[WHATS.index(what)], label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color=INK)
    axes.set_yticks(range(len(peers)), peers)
    axes.axvline(1, color=INK, linewidth=1, linestyle=":")
    axes.set_xlabel("time / G (G: the bare matrix product)")
    axes.set_title(f"{LOSS}, {_describe(rows[0], 'B', 'M', 'D')}", color=INK)
    axes.legend(frameon=False, loc="best")


def _draw_against_memory_size(figure: Any, rows: list[Row]) -> None:
    time_axes, memory_axes = figure.subplots(1, 2)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    for peer, colour in _colours(peers).items():
        mine = [row for row in rows if row["peer"] == peer]
        slots = [row["M"] for row in mine]
        time_axes.plot(slots, [row["seconds"] for row in mine], "o-", color=colour, label=peer)
        extra = [max(row.get("peak_extra_bytes", 0) / 2**20, 0.1) for row in mine]
        memory_axes.plot(slots, extra, "o-", color=colour, label=peer)
    for axes, label in ((time_axes, "seconds"), (memory_axes, "peak memory beyond inputs and gradients, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="prototypes in the memory, M", ylabel=label)
    time_axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"Loss and embeddings' gradient, {_describe(rows[0], 'B', 'D')}", color=INK)


def _draw_against_identities(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    names = {f"{row['what']}, {row['peer']}": (row["what"], row["peer"]) for row in rows}
    ours = [name for name, (what, _) in names.items() if what == "prototype memory"]
    colours = dict(zip(ours, OUR_COLOURS, strict=False))
    for name, key in names.items():
        mine = sorted(
            (row for row in rows if (row["what"], row["peer"]) == key), key=lambda row: int(row["identities"])
        )
        count, seconds = [row["identities"] for row in mine], [row["seconds"] for row in mine]
        axes.plot(count, seconds, "o-", color=colours.get(name, PEER_COLOURS[0]), label=name)
    axes.set(xscale="log", yscale="log", xlabel="identities in the data", ylabel="seconds per step (without encoder)")
    axes.set_title(f"A training step, {_describe(rows[0], 'B', 'D')}, memory of {rows[0]['M']:,} prototypes", color=INK)
    axes.legend(frameon=False)
