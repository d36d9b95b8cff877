"""The table and the plot of ``protomem bench --static``: the same counts give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.static import gpus
from benchmarks.static.counting import Count
from benchmarks.static.gpus import GPUS, LIMITS
from protomem_kernels.backends.triton.specimens import CENTRE
from protomem_kernels.training.files import written_whole

OURS = "protomem_kernels.backends."
TABLE, PLOT = "static.md", "static.png"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def owner(count: Count) -> str:
    """Return whose kernel it is."""
    if count.module.startswith(OURS):
        return "ours"
    return count.module.rsplit(".", 1)[1].replace("_", "-")


def occupancy(count: Count) -> float:
    return gpus.occupancy(
        count.arch,
        registers=count.registers,
        shared=count.shared,
        warps=count.warps,
        tensor_columns=count.tensor_columns,
    )


def predicted(count: Count, moved: int) -> tuple[float, str]:
    """Return the seconds of ``CENTRE`` on the architecture's GPU, *predicted* from data-sheet rates, and the bound.

    Operations are counted as the tensor cores do them: three in TF32 where those stand for one in float32.
    """
    gpu = GPUS[count.arch]
    rate = gpu.half if count.dtype in ("bfloat16", "float16") else gpu.tf32 if count.tensor_cores else gpu.float32
    B, M = CENTRE
    exponentials = B * M if count.exponentials else 0
    operations = count.operations_per_tile * count.tiles
    return gpus.seconds(gpu, operations=operations, rate=rate, exponentials=exponentials, moved=moved)


def _time(count: Count, moved: int) -> str:
    if not count.tiles or count.arch not in GPUS:
        return ""
    time, bound = predicted(count, moved)
    return f"{1e6 * time:,.1f} us ({bound})"


def _spills(count: Count) -> str:
    """Return the number, and what ptxas warns of besides."""
    spills = f"**{count.spills}** ({count.stack} B)" if count.spills else "0"
    warnings = [line for line in count.warnings if "bytes spill" not in line]
    return f"{spills}, **ptxas warns** ({'; '.join(warnings)})" if warnings else spills


COLUMNS: dict[str, Callable[[Count], str]] = {
    "kernel": lambda count: f"{owner(count)}: {count.name}",
    "dtype": lambda count: SHORT[count.dtype],
    "warps": lambda count: str(count.warps),
    "registers": lambda count: str(count.registers),
    "spills": lambda count: _spills(count),
    "shared, KiB": lambda count: f"{count.shared / 1024:.1f}",
    "occupancy": lambda count: f"{100 * occupancy(count):.0f} %",
    "tensor cores": lambda count: ", ".join(f"{times} {code}" for code, times in count.tensor_cores.items()) or "none",
    "offsets": lambda count: "64 bits" if count.wide_offsets else "**32 bits**",
    "KiB / tile": lambda count: f"{count.bytes_per_tile / 1024:,.0f}" if count.bytes_per_tile else "",
    "MFLOP / tile": lambda count: f"{count.operations_per_tile / 1e6:,.1f}" if count.operations_per_tile else "",
    "bytes / least": lambda count: (
        f"{count.bytes_per_tile * count.tiles / count.least_bytes:.2f}" if count.least_bytes else ""
    ),
    "predicted, L2 helps": lambda count: _time(count, count.least_bytes),
    "predicted, no L2": lambda count: _time(count, count.bytes_per_tile * count.tiles),
}


def write(
    folder: Path, counts: Sequence[Count], notes: Sequence[str], versions: str, more: Sequence[str] = ()
) -> list[Path]:
    """Write the table, with ``more`` sections at its end, and the plot; return their paths."""
    with written_whole(folder / TABLE) as temporary:
        temporary.write_text("\n".join([_text(counts, notes, versions), *more]), encoding="utf-8")
    with written_whole(folder / PLOT) as temporary:
        _draw(temporary, counts, versions)
    return [folder / TABLE, folder / PLOT]


def _text(counts: Sequence[Count], notes: Sequence[str], versions: str) -> str:
    B, M = CENTRE
    dims = sorted({count.dim for count in counts})
    parts = [
        "# What the compiler makes of every Triton kernel",
        f"Written by `protomem bench --static` with {versions}. No GPU was used: every kernel is\n"
        "compiled and its machine code read. **Nothing here was measured**; times are *predicted* from data sheets.",
        "![Predicted times and registers](static.png)",
        _explanation(B, M),
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
    ]
    for arch in sorted({count.arch for count in counts}):
        here = [count for count in counts if count.arch == arch and count.dim == dims[-1]]
        parts += [f"## {_title(arch)}, D = {dims[-1]}", _table(here, COLUMNS)]
    several = [count for count in counts if count.matrix_bound]
    parts += [f"## The matrix-bound kernels at D = {', '.join(map(str, dims))}", _over_sizes(several, dims)]
    parts += ["## The limits behind the occupancy", _limits(), "## The rates behind the times", _rates()]
    return "\n\n".join(parts) + "\n"


def _title(arch: int) -> str:
    return f"sm_{arch} ({GPUS[arch].name})" if arch in GPUS else f"sm_{arch}"


def _explanation(B: int, M: int) -> str:
    return (
        "- **registers** per thread; **spills**: instructions that load from or store to local memory (its bytes per\n"
        "  thread); **shared** memory per block; **occupancy**: resident warps over what a multiprocessor holds.\n"
        "- **tensor cores**: instructions in the code. HMMA: mma, HGMMA: wgmma, UTCHMMA: tcgen05.\n"
        "- **offsets**: whether rows are found in 64 bits; in 32 bits a memory of over 2^31 elements breaks.\n"
        "- **KiB / tile**, **MFLOP / tile**: what one tile moves and multiplies. **bytes / least**: what all tiles of\n"
        f"  B = {B}, M = {M:,} move, over its inputs and outputs counted once.\n"
        "- **predicted**: the slowest of products, exponentials and memory traffic for that problem, each at its data\n"
        "  sheet's rate. *L2 helps*: every byte comes from memory once, which blocks that walk the same slots side by\n"
        "  side aim at. *No L2*: every tile comes from memory. No schedule beats the first; a good one comes near it."
    )


def _table(counts: Sequence[Count], columns: dict[str, Callable[[Count], str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(count) for cell in columns.values()) + " |" for count in counts]
    return "\n".join(lines)


def _over_sizes(counts: Sequence[Count], dims: list[int]) -> str:
    """Return registers, spills and shared memory of every kernel at every size."""
    by_key: dict[tuple[int, str, str], dict[int, Count]] = {}
    for count in counts:
        by_key.setdefault((count.arch, COLUMNS["kernel"](count), count.dtype), {})[count.dim] = count
    header = ["sm", "kernel", "dtype", *(f"D = {dim}" for dim in dims)]
    lines = [
        "Registers / spills / shared KiB / occupancy.\n",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for (arch, kernel, dtype), sizes in by_key.items():
        cells = [_brief(sizes[dim]) if dim in sizes else "" for dim in dims]
        lines.append("| " + " | ".join([str(arch), kernel, SHORT[dtype], *cells]) + " |")
    return "\n".join(lines)


def _brief(count: Count) -> str:
    spills = str(count.spills) if not count.spills else f"**{count.spills}**"
    return f"{count.registers} / {spills} / {count.shared / 1024:.0f} / {100 * occupancy(count):.0f} %"


def _limits() -> str:
    lines = [
        'From "Technical Specifications per Compute Capability" in the CUDA C++ Programming Guide.\n',
        "| | shared per block | shared | warps | blocks | registers | tensor memory columns |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| sm_{arch} | {of.shared_per_block >> 10} KiB | {of.shared >> 10} KiB | {of.warps} | {of.blocks} "
        f"| {of.registers:,} | {of.tensor_columns or ''} |"
        for arch, of in LIMITS.items()
    ]
    return "\n".join(lines)


def _rates() -> str:
    lines = [
        "From NVIDIA's data sheets (A100 80GB SXM, H100 SXM, HGX B200), without sparsity; exponentials: 16 per clock\n"
        "and multiprocessor.\n",
        "| | memory, TB/s | bf16, TFLOP/s | TF32, TFLOP/s | fp32, TFLOP/s | exponentials, 1e12/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {gpu.name} | {gpu.bytes / 1e12:.2f} | {gpu.half / 1e12:,.0f} | {gpu.tf32 / 1e12:,.0f} "
        f"| {gpu.float32 / 1e12:.1f} | {gpu.exponentials / 1e12:.2f} |"
        for gpu in GPUS.values()
    ]
    return "\n".join(lines)


OWN, OTHER, SPILLED = "#1f6fb4", "#8a8a8a", "#b4381f"


def _draw(path: Path, counts: Sequence[Count], versions: str) -> None:
    """Draw, for the largest D in bfloat16, every matrix-bound kernel's predicted time and registers."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    dim = max(count.dim for count in counts)
    shown = [c for c in counts if c.dim == dim and c.dtype == "bfloat16" and c.tiles and c.matrix_bound]
    kernels = list(dict.fromkeys((owner(count), count.name) for count in shown))[::-1]
    archs = [arch for arch in GPUS if any(count.arch == arch for count in shown)]
    figure = Figure(figsize=(4.2 * max(1, len(archs)) + 2, 0.5 * len(kernels) + 2.6), layout="constrained")
    panels: Any = figure.subplots(1, max(1, len(archs)), sharey=True, squeeze=False)[0]
    for axes, arch in zip(panels, archs, strict=False):
        for count in (count for count in shown if count.arch == arch):
            place = kernels.index((owner(count), count.name))
            colour = SPILLED if count.spills else OWN if owner(count) == "ours" else OTHER
            best = 1e6 * predicted(count, count.least_bytes)[0]
            worst = 1e6 * predicted(count, count.bytes_per_tile * count.tiles)[0]
            axes.barh(place, worst, 0.7, color=colour, alpha=0.3)
            axes.barh(place, best, 0.7, color=colour)
            axes.text(worst, place, f"  {count.registers} registers", va="center", fontsize=8, color="#222222")
        axes.set_title(_title(arch), color="#222222")
        axes.set_xlabel("predicted microseconds")
        axes.margins(x=0.35)
        axes.grid(alpha=0.25, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(kernels)), [f"{whose}: {name}" for whose, name in kernels])
    B, M = CENTRE
    figure.suptitle(f"Predicted, not measured: B = {B}, M = {M:,}, D = {dim}, bfloat16", color="#222222")
    patches = [(OWN, "ours"), (OTHER, "peers"), (SPILLED, "spills registers"), ("#d9d9d9", "more if L2 does not help")]
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in patches],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
