"""Launch parameters by trial, on request: ``PROTOMEM_AUTOTUNE=1`` times variants of the table's entry at first use.

What was fastest is kept in a file, one per version of this package, version of Triton and device, in
``_files.cache_folder``: each shape bucket (kernel, dtype, padded D) is timed once on a machine. A file that cannot be
read is ignored with a warning and written anew; it is replaced in one step, so processes that tune at the same time do
no harm. Timing waits for the device: leave it off while a graph is captured.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from protomem_kernels._files import cache_folder, written_whole
from protomem_kernels._switches import is_on
from protomem_kernels._warnings import warn_caller
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.launch import Launch

_found: dict[Path, dict[str, Launch]] = {}  # what this process knows of each file


def best(kind: str, device: torch.device, dtype: torch.dtype, dim: int, run: Callable[[Launch], Any]) -> Launch:
    """Return the launch parameters for a call: the table's, or under PROTOMEM_AUTOTUNE=1 the fastest variant of them.

    Args:
        kind: of kernel, see ``launch.choose``.
        device: where it runs.
        dtype: of the products.
        dim: D.
        run: launches the kernel once with the parameters that it is given; its effects are overwritten later.
    """
    table = launch.choose(kind, launch.architecture(device), dtype, dim)
    if not is_on("PROTOMEM_AUTOTUNE"):
        return table
    file = cache_file(device)
    if file not in _found:
        _found[file] = _read(file)
    bucket = f"{kind}, {launch.triton_type(dtype)}, {launch.padded(dim)}"
    if bucket not in _found[file]:
        seconds = {how: _seconds(run, how, device) for how in variants(table)}
        _found[file][bucket] = min(seconds, key=lambda how: seconds[how])
        _found[file] = _read(file, quiet=True) | _found[file]  # what others have found meanwhile
        _write(file, _found[file])
    return _found[file][bucket]


def cache_file(device: torch.device) -> Path:
    """Return the file that holds what was found on this device with these versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    parts = ["launch", version("protomem-kernels"), f"triton {version('triton')}", name]
    return cache_folder() / (re.sub(r"[^\w.]+", "_", "-".join(parts)) + ".json")


def variants(table: Launch) -> Iterator[Launch]:
    """Yield the table's entry first, then its neighbours: tiles half and twice as large, warps and stages."""
    yield table
    for change in ("slots", "rows"):
        size = getattr(table, change)
        yield from (table._replace(**{change: other}) for other in (size // 2, size * 2) if other >= 16)
    yield table._replace(warps=12 - table.warps if table.warps in (4, 8) else table.warps)
    yield from (table._replace(stages=stages) for stages in range(1, 5) if stages != table.stages)


def _seconds(run: Callable[[Launch], Any], how: Launch, device: torch.device, times: int = 5) -> float:
    """Return the median time of a launch; infinite where the device has not the resources."""
    try:
        run(how)  # compiles
    except Exception as problem:
        if type(problem).__name__ in ("OutOfResources", "PTXASError", "CompilationError"):
            return float("inf")
        raise
    taken = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        run(how)
        _wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(file: Path, quiet: bool = False) -> dict[str, Launch]:
    """Return what the file holds: nothing if it is not there, or if it is broken, which is said unless ``quiet``."""
    try:
        entries = json.loads(file.read_text())
        return {bucket: _launch(fields) for bucket, fields in entries.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        if not quiet:
            warn_caller(f"{file} is ignored, launch parameters are timed again: {problem}")
        return {}


def _launch(fields: dict[str, Any]) -> Launch:
    how = Launch(**fields)
    if not all(type(value) is int and 0 < value <= 4096 for value in how):
        raise ValueError(f"{how} holds no launch parameters")
    return how


def _write(file: Path, entries: dict[str, Launch]) -> None:
    """Replace the file in one step."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as part:
            part.write_text(json.dumps({bucket: how._asdict() for bucket, how in entries.items()}, indent=1))
    except OSError as problem:
        warn_caller(f"launch parameters were not kept in {file}: {problem}")
