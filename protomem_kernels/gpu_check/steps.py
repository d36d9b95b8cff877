"""Part 4: whole steps of ``PrototypeMemoryLoss``: each kernel's time, the host's share, eager and as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import protomem_kernels as pmk
from protomem_kernels.backends.choice import explain
from protomem_kernels.gpu_check.device import captured, found, lost, median_ms, stands_in, synchronize
from protomem_kernels.gpu_check.processes import GO_ON_IN_A_NEW_ONE, Task
from protomem_kernels.gpu_check.records import Record

MODES = ("none", "fresh")  # where the gradient goes (``prototype_gradient``)
STEPS, KERNELS, SETTLED = 10, 25, 50  # steps looked at, kernels told of, steps before


def tasks(checkout: Path) -> list[Task]:
    """Return a task per way of the gradient and dtype of the memory."""
    pairs = [(mode, dtype) for dtype in ("bfloat16", "float32") for mode in MODES]
    pairs = pairs[:1] if stands_in() else pairs
    return [Task("steps", " ".join(pair), silence=90, resumes=True) for pair in pairs]


def run(record: Record, name: str, first: int, checkout: Path) -> int:
    """Look at one kind of step: the host's share, its kernels, the same step as a CUDA graph."""
    step = _step(*name.split())
    for _ in range(1 if stands_in() else SETTLED):  # the batch's prototypes settle: steps are alike from there on
        step()
    synchronize()
    for case, look in enumerate([_host, _kernels, _graph][first:], first):
        what = f"{name}: {look.__name__.strip('_')}"
        record.begin(what, case)
        try:
            look(record, what, step)
        except Exception as problem:
            record.write(what, False, f"{type(problem).__name__}: {str(problem)[:1000]}")
            if lost():
                return GO_ON_IN_A_NEW_ONE
    return 0


def _step(mode: str, kind: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a training step of the head alone: loss and gradient of the embeddings, against a full memory."""
    batch, slots, dim = (16, 64, 32) if stands_in() else (512, 100_000, 512)
    device, dtype = found() or "cpu", getattr(torch, kind)
    head = pmk.PrototypeMemoryLoss(dim, slots, prototype_gradient=mode, dtype=dtype, device=device)
    with torch.no_grad():
        head.memory.prototypes.copy_(torch.nn.functional.normalize(torch.randn(slots, dim, device=device)))
        head.memory.identities.copy_(torch.arange(slots, device=device))
    embeddings = torch.randn(batch, dim, device=device, dtype=dtype)
    labels = torch.randint(2 * slots, (batch,), device=device)

    def step() -> tuple[Tensor, Tensor]:
        leaf = embeddings.detach().requires_grad_()
        loss = head(leaf, labels)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return step


def _host(record: Record, what: str, step: Callable[[], Any]) -> None:
    """The host's share: how long it takes to ask for a step, beside how long a step takes."""
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    asked = time.perf_counter() - start
    synchronize()
    taken = time.perf_counter() - start
    host, whole = (1000 * seconds / STEPS for seconds in (asked, taken))
    served = next(c.backend for c in explain("negative_logsumexp", step()[1]) if c.chosen)
    said = f"{whole:.3g} ms a step, the host asks for it in {host:.3g} ms; {served} serves the loss"
    record.write(what, None, said, host_ms=host, ms=whole, share=host / whole, backend=served, **_timed(step))


def _timed(step: Callable[[], Any]) -> dict[str, Any]:
    return {f"events_{key}": value for key, value in median_ms(step).items()}


def _kernels(record: Record, what: str, step: Callable[[], Any]) -> None:
    activities = [ProfilerActivity.CPU, *([] if stands_in() else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as seen:
        for _ in range(STEPS):
            step()
        synchronize()
    device = "cpu" if stands_in() else "cuda"
    rows = []
    aten = 0.0
    for event in seen.key_averages():
        aten += event.count / STEPS if event.key.startswith("aten::") else 0
        if event.device_type.name.lower() == device:
            spent = event.self_cpu_time_total if stands_in() else event.self_device_time_total
            rows.append((spent / STEPS, event.count / STEPS, event.key))
    rows.sort(reverse=True)
    whole, launches = sum(row[0] for row in rows), sum(row[1] for row in rows)
    record.write(
        what,
        None,
        f"{whole:.4g} us in {launches:g} kernels a step, {aten:g} aten calls (nested ones included)",
        us=whole,
        kernels=launches,
        aten_calls=aten,
        each=[{"us": us, "count": count, "kernel": name[:200]} for us, count, name in rows[:KERNELS]],
    )


def _graph(record: Record, what: str, step: Callable[[], Any]) -> None:
    if stands_in():
        return record.write(what, None, "left out: a CPU has no CUDA graphs")
    eager = step()[0].clone()
    replay, (loss, _) = captured(step)
    replay()
    torch.cuda.synchronize()
    gap = abs(float(loss) - float(eager)) / max(1.0, abs(float(eager)))
    figures = median_ms(replay)
    record.write(what, gap <= 1e-2, f"{figures['ms']:.4g} ms, loss {gap:.2g} from the eager one", gap=gap, **figures)
