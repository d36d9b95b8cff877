"""One training loop with another library's class and with ours in its place: time per step and peak memory.

    python -m benchmarks.swapped [--arcface-torch FOLDER] [--batch B] [--classes C] [--dim D] [--steps N] [--threads T]

A linear encoder and the head are stepped by SGD. Times come from one process, the original's steps and ours in turn:
medians of wall time and of CPU time. Memory is what the resident set grows by at its peak over some steps, the weights'
gradient included, each class in a process of its own. insightface is no package: FOLDER holds losses.py and
partial_fc_v2.py of recognition/arcface_torch (``Tensor.cuda`` is left out, so that they run on a CPU, on gloo).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.memory import peak_growth
from protomem_kernels.compat import insightface, pytorch_metric_learning

ROOT = Path(__file__).parents[1]
FEATURES = 128
PAIRS = ("ArcFaceLoss", "CosFaceLoss", "PartialFC_V2", "PartialFC_V2, sample_rate 0.1")


def head_of(pair: str, ours: bool, classes: int, dim: int, arcface_torch: str | None) -> nn.Module:
    """Return the original's head or ours."""
    if pair in ("ArcFaceLoss", "CosFaceLoss"):
        module: Any = pytorch_metric_learning if ours else importlib.import_module("pytorch_metric_learning.losses")
        head: nn.Module = getattr(module, pair)(classes, dim)
        return head
    rate = 0.1 if "0.1" in pair else 1.0
    if ours:
        return insightface.PartialFC_V2(insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0), dim, classes, rate)
    assert arcface_torch is not None
    if arcface_torch not in sys.path:
        sys.path.insert(0, arcface_torch)
        torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment,misc]
    if not dist.is_initialized():
        folder = tempfile.mkdtemp()
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=0, world_size=1)
    margin_loss = importlib.import_module("losses").CombinedMarginLoss(64, 1.0, 0.5, 0.0)
    theirs: nn.Module = importlib.import_module("partial_fc_v2").PartialFC_V2(margin_loss, dim, classes, rate, False)
    return theirs


def loop_of(head: nn.Module, batch: int, classes: int, dim: int) -> Callable[[], None]:
    """Return one step of the loop, the same whatever the head."""
    torch.manual_seed(0)
    encoder = nn.Linear(FEATURES, dim)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.01)
    images, labels = torch.randn(batch, FEATURES), torch.randint(classes, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        loss = head(encoder(images), labels.clone())
        loss.backward()
        optimizer.step()

    return step


def times(pair: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return medians of (wall, CPU) seconds per step, the original's and ours."""
    size = (args.batch, args.classes, args.dim)
    steps = [loop_of(head_of(pair, ours, args.classes, args.dim, args.arcface_torch), *size) for ours in (False, True)]
    found: list[list[tuple[float, float]]] = [[], []]
    for turn in range(args.steps + 1):
        for which, step in enumerate(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if turn:  # the first warms up
                found[which].append((time.perf_counter() - wall, time.process_time() - cpu))
    return [(statistics.median(w for w, _ in seen), statistics.median(c for _, c in seen)) for seen in found]


def memory(pair: str, ours: bool, args: argparse.Namespace) -> int:
    """Return how many bytes three steps take at their peak beyond what was there, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.swapped", "--memory-of", pair, *(["--ours"] if ours else [])]
    for name in ("batch", "classes", "dim", "threads", "arcface_torch"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {pair} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arcface-torch", help="folder of insightface's two files")
    for name, default in (("batch", 256), ("classes", 50_000), ("dim", 512), ("steps", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        small = loop_of(head_of(args.memory_of, args.ours, 4096, args.dim, args.arcface_torch), 64, 4096, args.dim)
        small()  # code, threads and libraries are there then
        head = head_of(args.memory_of, args.ours, args.classes, args.dim, args.arcface_torch)
        step = loop_of(head, args.batch, args.classes, args.dim)
        print(peak_growth(lambda: [step() for _ in range(3)]))
        return
    size = f"B = {args.batch}, C = {args.classes:,}, D = {args.dim}"
    print(f"{size}, threads: {args.threads}, medians of {args.steps} steps\n")
    print("| class | original: ms per step (CPU ms) | ours | original: MiB | ours |\n|---|---|---|---|---|")
    for pair in PAIRS if args.arcface_torch else PAIRS[:2]:
        (theirs, their_cpu), (mine, cpu) = times(pair, args)
        their_peak, peak = (memory(pair, ours, args) / 2**20 for ours in (False, True))
        cells = f"{1e3 * theirs:.0f} ({1e3 * their_cpu:.0f}) | {1e3 * mine:.0f} ({1e3 * cpu:.0f})"
        print(f"| `{pair}` | {cells} | {their_peak:.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
