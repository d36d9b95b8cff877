"""Times on GPUs, predicted by a small model; nothing here was measured by this package.

``python -m benchmarks.predicted --output docs`` writes the tables and the plot of docs/predicted.md.

A call is a sequence of stages. A stage takes as long as the slowest of what it does side by side (products on the
tensor cores, bytes through HBM, bytes through the L2 cache, exponentials), and a launch. The rates of the hardware are
those of its data sheets (``benchmarks.static.gpus``); what share of the tensor cores' peak a kind of kernel reaches is
a named constant of its own, from a source that is not the time to be predicted. The model is trusted as far as it gives
published times (``published``) within 25 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inputs import Size
from benchmarks.static.gpus import GPUS, Gpu
from protomem_kernels.training.files import written_whole

# Share of the data sheet's peak in bfloat16 that the products of a kernel reach.
# cuBLAS: 250 of 312 and 690 of 989 TFLOP/s, large matrices: NVIDIA's and others' tests.
CUBLAS = {80: 0.80, 90: 0.70, 100: 0.70}
# Triton's own matmul tutorial: 220 of 312; without warp specialisation, 500 of 989.
TRITON = {80: 0.70, 90: 0.50, 100: 0.40}
# FlashAttention-3 (arXiv 2407.08608), head size 256: 740 of 989.
WARP_SPECIALISED = {90: 0.75}
# Our stream kernels at D = 512, estimated from their tiles: a product of N = 32 waits for shared memory (Triton, 25 to
# 33 %), mma.sync reaches less than two thirds of wgmma's rate (C++, 27 to 30 %). The middle of each range.
STREAM = {"triton": {80: 0.40, 90: 0.29, 100: 0.25}, "cuda": {80: 0.42, 90: 0.285, 100: 0.16}}
# Bytes per second through L2: half of what sm_90's 96 slices of 64 bytes a clock would do, as microbenchmarks see it.
L2 = {80: 4.0e12, 90: 5.5e12, 100: 9.0e12}
L2_BYTES = {80: 40e6, 90: 50e6, 100: 126e6}  # data sheets
LAUNCH = 2e-6  # seconds from one kernel to the next in a CUDA graph
EAGER = 70e-6  # seconds of Python for the slices, product, kernel and product of a chunk: an estimate
# Products that cut-cross-entropy's gradient takes as long as, filtered: its own A100 times.
CCE_GRADIENT = (145 - 46) / 46
H200 = Gpu("H200", bytes=4.8e12, half=989.5e12, tf32=494.5e12, float32=67e12, half_per_clock=4096)
GH200 = Gpu("GH200", bytes=4.0e12, half=989.5e12, tf32=494.5e12, float32=67e12, half_per_clock=4096)


class Published(NamedTuple):
    """A time that somebody else has measured, and what the model says of it."""

    what: str
    source: str
    measured: float  # milliseconds
    predicted: float

    @property
    def off(self) -> float:
        """How far the prediction is off, as a share of the time."""
        return self.predicted / self.measured - 1


def stage(
    gpu: Gpu, *, flop: float = 0, share: float = 1, hbm: float = 0, l2: float = 0, l2_rate: float = 1, exps: float = 0
) -> float:
    """Return the seconds of one launch: the slowest of what it does."""
    slowest = max(flop / (gpu.half * share), hbm / gpu.bytes, l2 / l2_rate, exps / gpu.exponentials)
    return slowest + LAUNCH


def product(size: Size) -> float:
    """Return the operations of one product of batch and memory."""
    return 2.0 * size.B * size.M * size.D


def published() -> list[Published]:
    """Return the five published times; docs/predicted.md says what is assumed of each kernel."""
    cce, cce_large = Size(8192, 256_000, 2304), Size(16384, 248_320, 2048)
    quack, siglip = Size(8192, 128_256, 4096), Size(65_536, 65_536, 768)
    a100, h100 = GPUS[80], GPUS[90]
    logits = quack.B * quack.M
    pairs = siglip.B * siglip.M
    attention = 64 * 16384 * 2 * (576 + 512) * 132.0  # operations; enough to fill the device
    return [
        Published(
            "cut-cross-entropy, forward, A100, 8,192 x 256,000 x 2,304",
            "arXiv 2411.09009, table 1",
            46.0,
            1e3 * stage(a100, flop=product(cce), share=TRITON[80], exps=cce.B * cce.M),
        ),
        Published(
            "cut-cross-entropy, forward and backward, H100, 16,384 x 248,320 x 2,048",
            "github.com/huggingface/trl/pull/6858",
            92.55,
            1e3 * stage(h100, flop=(1 + CCE_GRADIENT) * product(cce_large), share=TRITON[90]),
        ),
        Published(
            "Liger's CuTe DSL and quack, forward, H200, 8,192 x 128,256 x 4,096",
            "github.com/linkedin/Liger-Kernel/pull/1348",
            13.6,
            1e3 * (stage(H200, flop=product(quack), share=CUBLAS[90]) + stage(H200, hbm=2 * 2 * logits)),
        ),
        Published(
            "siglip-kernel, forward and backward, GH200, 65,536 x 65,536 x 768",
            "pypi.org/project/siglip-kernel",
            48.8,
            1e3
            * (
                2 * stage(GH200, flop=product(siglip), share=CUBLAS[90])  # logits, and again in the backward pass
                + 2 * stage(GH200, hbm=(2 + 2) * pairs)  # read, weights written
                + 2 * stage(GH200, flop=product(siglip), share=CUBLAS[90], hbm=2 * pairs)
            ),
        ),
        Published(
            "FlashMLA, H800, as long as its 660 TFLOP/s take",
            "github.com/deepseek-ai/FlashMLA",
            1e3 * attention / 660e12,
            1e3 * stage(h100, flop=attention, share=WARP_SPECIALISED[90]),
        ),
    ]


def stream(engine: str, arch: int, size: Size, parts: int = 2) -> float:
    """Return the seconds of n and o in one pass beside a 16-bit memory, by one of our own kernels."""
    gpu, flop = GPUS[arch], (parts + 1) * product(size)
    rows = 64  # per block: every block of rows reads the memory once, through L2
    moved = size.M * size.D * 2
    share = STREAM[engine][arch]
    return stage(gpu, flop=flop, share=share, hbm=moved, exps=size.B * size.M) + max(
        0.0, moved * size.B / rows / L2[arch] - flop / (gpu.half * share)
    )


def chunked(arch: int, size: Size, parts: int = 2, eager: bool = False) -> float:
    """Return the same by the chunked engine, in a CUDA graph or launched one by one from Python."""
    gpu, rows = GPUS[arch], min(size.B, 4096)
    per_slot, scratch = rows * (4 * parts + 2) + size.D * 8, min(96 * 2**20, 2 * L2_BYTES[arch])
    slots = max(256, int(scratch // per_slot) // 128 * 128)
    chunks = -(-size.M // slots) * -(-size.B // rows)
    logits = rows * size.M / -(-size.M // slots)
    width, share = size.M / -(-size.M // slots), CUBLAS[arch]
    filled = slots * per_slot  # of scratch: what L2 does not hold goes through HBM
    rate = L2[arch] if filled <= L2_BYTES[arch] else gpu.bytes
    flop = 2.0 * rows * width * size.D
    read = width * size.D * 2
    one = (
        stage(gpu, hbm=read, l2=2 * read, l2_rate=rate)  # rows of empty slots become zero
        + stage(gpu, flop=parts * flop, share=share, l2=read + 4 * parts * logits, l2_rate=rate)
        + stage(gpu, l2=(4 * parts + 2) * logits, l2_rate=rate, exps=logits)
        + stage(gpu, flop=flop, share=share, l2=read + 2 * logits, l2_rate=rate)
    )
    return chunks * max(one, EAGER if eager else 0.0)


def cut_cross_entropy(arch: int, size: Size) -> float:
    """Return the seconds of cut-cross-entropy, loss and gradient, of which nothing can be filtered at first."""
    return stage(GPUS[arch], flop=3 * product(size), share=TRITON[arch], hbm=2 * size.M * size.D * 2) + LAUNCH


def liger(arch: int, size: Size) -> float:
    """Return the seconds of Liger's chunks of rows: products by cuBLAS, logits through HBM between them."""
    gpu, parts = GPUS[arch], -(-size.M // size.D)
    rows = 1 << (-(-size.B // parts) - 1).bit_length()  # of a chunk: as many logits as a batch has numbers, and rounded
    chunks = -(-size.B // rows)
    read, logits = size.M * size.D * 2, size.B * size.M
    share = CUBLAS[arch]
    return (
        stage(gpu, flop=product(size), share=share, hbm=chunks * read + 2 * logits)
        + stage(gpu, hbm=4 * logits)
        + stage(gpu, flop=product(size), share=share, hbm=chunks * read + 2 * logits)
        + 3 * chunks * LAUNCH
    )


def plain(arch: int, size: Size) -> float:
    """Return the seconds of eager PyTorch in tiles of 16,384 slots: logits in float32, several passes over them."""
    gpu, tiles, logits = GPUS[arch], -(-size.M // 16384), size.B * size.M
    share = CUBLAS[arch]
    return (
        stage(gpu, flop=product(size), share=share, hbm=4 * logits)
        + 4 * stage(gpu, hbm=8 * logits)  # scale, mask, exponential, sum
        + stage(gpu, flop=product(size), share=share, hbm=4 * logits)
        + 6 * tiles * 10e-6
    )


ENGINES: dict[str, Callable[[int, Size], float]] = {
    "triton": lambda arch, size: stream("triton", arch, size),
    "triton, medium": lambda arch, size: stream("triton", arch, size, parts=1),
    "cuda": lambda arch, size: stream("cuda", arch, size),
    "chunked, in a graph": chunked,
    "chunked, medium, in a graph": lambda arch, size: chunked(arch, size, parts=1),
    "chunked, eager": lambda arch, size: chunked(arch, size, eager=True),
    "cut-cross-entropy": cut_cross_entropy,
    "Liger": liger,
    "plain PyTorch in tiles": plain,
}
SIZES = [Size(B, M, D) for D in (128, 512) for M in (100_000, 1_000_000) for B in (512, 2048)]
LIMIT = 0.25  # within which a published time has to be met before anything is claimed


def share_of_peak(engine: str, arch: int, size: Size, products: int) -> float:
    """Return what share of the tensor cores' peak the engine's own products take."""
    return products * product(size) / GPUS[arch].half / ENGINES[engine](arch, size)


ASSUMED = """
Assumed, and not known: that cut-cross-entropy's gradient on the H100 takes as many products as on the A100 (its filter
leaves as much); that the 13.6 ms are of the forward pass, since three products in that time would be twice the peak;
that siglip-kernel forms its logits again in the backward pass (otherwise the model is a third too low, and misses). The
kernels' shares of the peak come from other kernels' published rates, FlashMLA's from FlashAttention-3. The A100 times
of cut-cross-entropy (46 ms forward, 145 ms with its gradient) and some of those shares were written down from memory:
their pages could not be opened where this was written. Five points do not make a law.
"""
PAGE = """# Predicted times

Written by `python -m benchmarks.predicted --output docs`. **Nothing here was measured by this package**: the model is
[benchmarks/predicted.py](../benchmarks/predicted.py), each rate in it a named constant with its source.

## What the model makes of published times

{published}

Missed by more than {limit:.0f} %: {missed}.{assumed}
## Our engines beside others, on an H100

n and the embeddings' gradient beside a bfloat16 memory, milliseconds, without the operations on a batch alone; "eager"
counts the launches from Python of the chunked engine, the others are as in a CUDA graph. The other packages' losses
have no margin and no empty slots.

{times}

![Predicted times on an H100](predicted.png)

Share of the tensor cores' peak that our own products take at B = 2,048, M = 1,000,000, D = 512, predicted:
{shares}.
The aims are a third of the peak in "highest", by this prediction {third}, and half of it in "medium", {half}.
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page() -> str:
    """Return docs/predicted.md."""
    found, large = published(), Size(2048, 1_000_000, 512)
    highest = {name: share_of_peak(name, 90, large, 3) for name in ("triton", "cuda", "chunked, in a graph")}
    medium = {name: share_of_peak(name, 90, large, 2) for name in ("triton, medium", "chunked, medium, in a graph")}
    points = [
        [one.what, one.source, f"{one.measured:.2f}", f"{one.predicted:.2f}", f"{100 * one.off:+.0f} %"]
        for one in found
    ]
    times = [
        [f"{size.B:,} x {size.M:,} x {size.D}", *(f"{1e3 * engine(90, size):.2f}" for engine in ENGINES.values())]
        for size in SIZES
    ]
    return PAGE.format(
        published=table(["published", "source", "measured, ms", "model, ms", "off"], points),
        limit=100 * LIMIT,
        missed="; ".join(one.what for one in found if abs(one.off) > LIMIT) or "none",
        assumed=ASSUMED,
        times=table(["B x M x D", *ENGINES], times),
        shares="; ".join(f"{name} {100 * value:.0f} %" for name, value in (highest | medium).items()),
        third="met" if max(highest.values()) >= 1 / 3 else "missed",
        half="met" if max(medium.values()) >= 1 / 2 else "missed",
    )


def draw(path: Path) -> None:
    """Draw the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, engine in ENGINES.items():
        axes.plot(range(len(SIZES)), [1e3 * engine(90, size) for size in SIZES], marker="o", label=name)
    axes.set_xticks(range(len(SIZES)), [f"B {s.B}\nM {s.M // 1000} k\nD {s.D}" for s in SIZES])
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds, predicted")
    axes.set_title("n and the embeddings' gradient on an H100, bfloat16 memory: predicted, not measured")
    axes.legend(fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def main(arguments: list[str] | None = None) -> Any:
    """Write the page and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of predicted.md and predicted.png")
    folder = parser.parse_args(arguments).output
    with written_whole(folder / "predicted.md") as temporary:
        temporary.write_text(page(), encoding="utf-8")
    draw(folder / "predicted.png")


if __name__ == "__main__":
    sys.exit(main())
