"""How much memory a step needs beyond its inputs, its output and its gradients, measured in a process of its own.

On the CPU: the peak of the resident set during the step (``VmHWM`` after a reset through ``/proc/self/clear_refs``)
less what was resident before. A small step of the same kind runs first, so that code, threads and libraries are there
already. On a GPU: the allocator's own peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.inputs import Size, problem
from benchmarks.peers import PEERS, our_peer

ROOT = Path(__file__).parents[1]


def peak_extra_bytes(
    peer: str, size: Size, what: str, device: str = "cpu", threads: int = 0, dtype: str = "float32"
) -> int:
    """Return the bytes, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", peer, *map(str, size), what, device, str(threads), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {peer} at {size} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _reset_peak() -> int:
    """Start a new peak, and return the bytes in use now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed must not be there to be used again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak so far stays in force; inputs are made in place, so it is near what is resident
        return _status("VmHWM")
    return _status("VmRSS")


def peak_growth(function: Callable[[], object]) -> int:
    """Return by how many bytes the resident set grows at most while ``function`` runs in this process, on the CPU."""
    before = _reset_peak()
    function()
    return max(0, _status("VmHWM") - before)


def main() -> None:
    """Measure one step in this process."""
    parser = argparse.ArgumentParser()
    kinds = {"peer": str, "B": int, "M": int, "D": int, "what": str, "device": str, "threads": int, "dtype": str}
    for name, kind in kinds.items():
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    peer = PEERS.get(args.peer) or our_peer("")
    size = Size(args.B, args.M, args.D)

    where = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    peer.step(problem(size._replace(M=max(size.B, 2048)), **where), args.what)()
    step = peer.step(problem(size, **where), args.what)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = _reset_peak()
        results = step()
        peak = _status("VmHWM")
    print(max(0, peak - before - sum(result.nbytes for result in results)))


if __name__ == "__main__":
    main()
