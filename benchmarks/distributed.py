"""A step on several processes of this machine beside one process with all its threads.

``python -m benchmarks.distributed [--ranks 2 --capacity 100000 --batch 512 --dim 512 --rounds 5]``

One process gets as many threads as there are ranks, each rank one. They take turns; of each the best of its rounds
counts, and the slowest rank. A machine that does other things besides tells best by the time of all cores. Bytes are
what one rank handed to collectives in a step, beside the formula of docs/distributed.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 3
OPERATIONS, BANDWIDTH = 400e12, 50e9  # per second: assumed of a GPU for the plot, measured of none
TOGETHER = 8192  # samples of all ranks in the plot of a fixed batch


def _work(rank: int, ranks: int, threads: int, options: argparse.Namespace, folder: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    import torch.distributed as dist

    import protomem_kernels as pmk

    torch.set_num_threads(threads)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    torch.manual_seed(rank)
    loss_fn = pmk.PrototypeMemoryLoss(options.dim, options.capacity, process_group=group, margin=pmk.ArcFace(0.5))
    batch = options.batch // ranks
    fill = 4096 // ranks
    for start in range(0, options.capacity, 4096):  # a memory that is as good as full
        labels = torch.arange(fill) + start + fill * rank
        loss_fn.memory.update(torch.randn(fill, options.dim), torch.where(labels < options.capacity, labels, -1))
    e = torch.randn(batch, options.dim, requires_grad=True)
    sent = 0

    def step() -> None:
        loss_fn(e, torch.randint(options.capacity, (batch,))).backward()

    step()
    if ranks > 1:
        loss_fn.ranks.bytes.clear()
        step()
        sent = sum(loss_fn.ranks.bytes.values())
    pipe.send((len(loss_fn.memory), sent))
    while pipe.recv():
        if group is not None:
            dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            step()
        pipe.send(((time.perf_counter() - start) / STEPS, (time.process_time() - used) / STEPS))
    if group is not None:
        dist.destroy_process_group()


def measure(options: argparse.Namespace) -> tuple[list[float], list[float], int, int]:
    """Return, of one process and of the ranks, seconds of a step and of all cores; slots in use; a rank's bytes."""
    context = multiprocessing.get_context("spawn")
    teams = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks, threads in ((1, options.ranks), (options.ranks, 1)):
            team = []
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(rank, ranks, threads, options, folder, theirs))
                process.start()
                team.append((ours, process))
            teams.append(team)
        ready = [[pipe.recv() for pipe, _ in team] for team in teams]
        best, busy = [float("inf")] * 2, [float("inf")] * 2
        for _ in range(options.rounds):
            for place, team in enumerate(teams):
                for pipe, _ in team:
                    pipe.send(True)
                took, used = zip(*(pipe.recv() for pipe, _ in team), strict=True)
                best[place], busy[place] = min(best[place], max(took)), min(busy[place], sum(used))
        for team in teams:
            for pipe, process in team:
                pipe.send(False)
                process.join()
    return best, busy, sum(held for held, _ in ready[1]), ready[1][0][1]


def predicted(batch: float, dim: int, ranks: int) -> float:
    """The formula of docs/distributed.md: bytes per rank and step of ``batch`` samples per rank, in float32."""
    return batch * (8 * dim + 8) * (ranks - 1) + 12 * batch * ranks + 20 * (ranks - 1)


def plot(path: Path, options: argparse.Namespace) -> None:
    """Draw the formula: bytes, with those counted on 2 to 4 processes, and the time that it predicts for GPUs."""
    from matplotlib.figure import Figure

    each, ranks = options.batch // options.ranks, [2, 3, 4]
    counted = []
    for count in ranks:
        asked = argparse.Namespace(ranks=count, batch=each * count, dim=options.dim, capacity=20_000, rounds=0)
        counted.append(measure(asked)[3])
    figure = Figure(figsize=(16, 4.4), layout="constrained")
    sizes, times, fixed = figure.subplots(1, 3)
    every = list(range(2, 9))
    sizes.plot(every, [predicted(each, options.dim, w) / 1e6 for w in every], color="#1f6fb4", label="formula")
    sizes.plot(ranks, [size / 1e6 for size in counted], "o", color="#b4381f", label="counted, gloo processes")
    sizes.set(xlabel="ranks W", ylabel="MB per rank and step", title=f"{each} samples per rank, D = {options.dim}")
    many = [2**power for power in range(11)]
    for axes, batches, what in (
        (times, [each] * len(many), f"{each} samples per rank"),
        (fixed, [TOGETHER / w for w in many], f"{TOGETHER} samples in all"),
    ):
        sent = [predicted(b, options.dim, w) for b, w in zip(batches, many, strict=True)]
        exchanged = [0.0, *(one / BANDWIDTH * 1e3 for one in sent[1:])]  # one rank alone sends nothing
        axes.loglog(many[1:], exchanged[1:], color="#b4381f", label="collectives alone")
        for slots, shade in ((1e6, "#9cc3e6"), (1e7, "#1f6fb4"), (1e8, "#0d3a63")):
            products = [4 * b * options.dim * slots / OPERATIONS * 1e3 for b in batches]
            took = [one + other for one, other in zip(products, exchanged, strict=True)]
            axes.loglog(many, took, color=shade, label=f"a step, M = {slots / 1e6:.0f} million")
            as_long = slots * BANDWIDTH / (2 * OPERATIONS)  # W at which the products take as long as the collectives
            if as_long <= many[-1]:
                axes.axvline(as_long, color=shade, linestyle=":")
        axes.set(xlabel="ranks W", ylabel="ms per step", title=f"PREDICTED: {what}")
    for axes in (sizes, times, fixed):
        axes.legend(framealpha=1, edgecolor="none", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"Predicted from {OPERATIONS / 1e12:.0f} TFLOP/s and {BANDWIDTH / 1e9:.0f} GB/s with nothing overlapped, "
        "measured on no GPU. Dotted: products take as long as collectives",
        fontsize=9,
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})
    for count, size in zip(ranks, counted, strict=True):
        print(f"W = {count}: {size} bytes, by the formula {predicted(each, options.dim, count)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    for name, value in (("ranks", 2), ("capacity", 100_000), ("batch", 512), ("dim", 512), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--plot", type=Path, help="draw the formula into this file instead of measuring times")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot, options)
        return
    (one, many), (one_busy, many_busy), held, sent = measure(options)
    model = predicted(options.batch // options.ranks, options.dim, options.ranks)
    print(f"B = {options.batch} in all, M = {options.capacity} ({held} in use), D = {options.dim}")
    print(f"one process, {options.ranks} threads: {one * 1e3:.1f} ms a step, {one_busy * 1e3:.1f} ms of all cores")
    print(
        f"{options.ranks} processes, 1 thread each: {many * 1e3:.1f} ms a step, {many_busy * 1e3:.1f} ms of all cores"
    )
    print(f"ratio: {many / one:.3f}, of all cores' time {many_busy / one_busy:.3f}")
    print(f"bytes per rank and step: {sent}, by the formula {model} ({sent / model - 1:+.2%})")


if __name__ == "__main__":
    main()
