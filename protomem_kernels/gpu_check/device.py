"""The GPU, or the CPU that stands in for it (``PROTOMEM_GPU_STAND_IN=cpu``), and how long something takes there."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from protomem_kernels.backends.choice import BACKENDS

Result = TypeVar("Result")
STAND_IN = "PROTOMEM_GPU_STAND_IN"
# The environment must not turn the check of a GPU into a check of something else.
MISLEADING = ("TRITON_INTERPRET", STAND_IN, "PROTOMEM_SELF_CHECK", "CUDA_LAUNCH_BLOCKING")
WARM_UP, FEWEST, MOST, SECONDS = 3, 5, 50, 0.2  # runs before, runs measured, and about how long they take together


def found() -> str | None:
    """Return the device to check, "cuda" or a stand-in's "cpu", or None."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if os.environ.get(STAND_IN) == "cpu" else None


def stands_in() -> bool:
    """Say whether a CPU stands in: everything is small then."""
    return not torch.cuda.is_available()


def environment() -> Mapping[str, str]:
    """Return the environment for a process of the check."""
    if stands_in():  # small problems, which threads that wait for one another make slow
        return {**os.environ, "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name not in MISLEADING}


def backends() -> list[str]:
    """Return the backends to check on the device, the ones made for it first."""
    names = ["cpu", "reference"] if stands_in() else ["triton", "chunked", "cuda", "reference"]
    others = [name for name in BACKENDS if name not in (*names, "cpu", "triton", "chunked", "cuda")]
    return [name for name in (*others, *names) if name in BACKENDS and BACKENDS[name].unavailable() is None]


def synchronize() -> None:
    """Wait until the device is done; raise what went wrong there."""
    if not stands_in():
        torch.cuda.synchronize()


def lost() -> bool:
    """Say whether an error has taken the device from this process: every later call would fail with it."""
    try:
        synchronize()
        if not stands_in():
            torch.zeros(1, device="cuda").add_(1).cpu()
    except RuntimeError:
        return True
    return False


def captured(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Capture ``step`` in a CUDA graph, after three runs that warm up.

    Returns:
        What replays it, and what the captured run returned: tensors that each replay writes anew.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def median_ms(run: Callable[[], Any]) -> dict[str, Any]:
    """Return the median and the least time of a run in milliseconds, after some that warm up, and how many there were.

    On a GPU the time between CUDA events: of a run that keeps the device waiting, the host's time.
    """
    for _ in range(1 if stands_in() else WARM_UP):
        run()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    count = 3 if stands_in() else max(FEWEST, min(MOST, int(SECONDS / (time.perf_counter() - start))))
    times = _on_the_clock(run, count) if stands_in() else _between_events(run, count)
    return {"ms": statistics.median(times), "least_ms": min(times), "runs": count}


def _on_the_clock(run: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _between_events(run: Callable[[], Any], count: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]
