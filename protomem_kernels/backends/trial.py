"""Which engine is fastest, asked of the GPU itself: ``PROTOMEM_AUTOTUNE=1`` times all that could serve, at first use.

For an operator on the whole memory, in place of the order that ``rates`` predicts. The order found is kept in a file,
one per version of this package, of torch and device, in ``_files.cache_folder``, for each bucket of shapes: the
operator, dtype, D, the precision in force, and B and M to the next power of two. Timing waits for the device, so
nothing is timed while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._files import cache_folder, written_whole
from protomem_kernels._installed import version_of
from protomem_kernels._warnings import warn_caller
from protomem_kernels.backends import precision

TIMES = 5  # runs of each engine after the first, which compiles
_found: dict[Path, dict[str, list[str]]] = {}  # what this process knows of each file


def cache_file(device: torch.device) -> Path:
    """Return the file that holds what was found on this device with these versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = ["engines", version_of("protomem-kernels") or "", f"torch {torch.__version__}", name]
    return cache_folder() / (re.sub(r"[^\w.]+", "_", "-".join(parts)) + ".json")


def bucket_of(operator: str, dtype: torch.dtype, tensors: Sequence[Tensor]) -> str:
    """Return the bucket of shapes that a call belongs to."""
    matrices = [tensor.shape for tensor in tensors if tensor.ndim == 2 and tensor.dtype.is_floating_point]
    rows = sorted({1 << (shape[0] - 1).bit_length() if shape[0] > 0 else 0 for shape in matrices})
    kind = str(dtype).removeprefix("torch.")
    return f"{operator}, {kind}, {matrices[-1][1]}, {' x '.join(map(str, rows))}, {precision.in_force()}"


def order(
    operator: str, dtype: torch.dtype, tensors: Sequence[Tensor], engines: Mapping[str, Callable[[], Any]]
) -> list[str]:
    """Return the names of the engines, the fastest first: as remembered, or as timed now.

    Args:
        operator: that is called.
        dtype: that decides how it computes.
        tensors: of the call, on one device.
        engines: by name, in the order that is predicted, what runs the call. None may change what the next one reads.
    """
    device = tensors[0].device
    file, bucket = cache_file(device), bucket_of(operator, dtype, tensors)
    if file not in _found:
        _found[file] = _read(file)
    if set(_found[file].get(bucket, ())) != set(engines):
        seconds = {name: _seconds(run, device) for name, run in engines.items()}
        _found[file] = _read(file) | {bucket: sorted(seconds, key=lambda name: seconds[name])}
        _write(file, _found[file])
    return _found[file][bucket]


def forget() -> None:
    """Forget what this process knows; what is on disk stays."""
    _found.clear()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call; infinite where it raises, which is said by the self-check."""
    taken = []
    for _ in range(TIMES + 1):
        _wait(device)
        start = time.perf_counter()
        try:
            run()
            _wait(device)
        except Exception:
            return float("inf")
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[TIMES // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(file: Path) -> dict[str, list[str]]:
    """Return what the file holds: nothing if it is not there or broken."""
    try:
        return {str(bucket): [str(name) for name in names] for bucket, names in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, entries: dict[str, list[str]]) -> None:
    """Replace the file in one step."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as part:
            part.write_text(json.dumps(entries, indent=1))
    except OSError as problem:
        warn_caller(f"the order of engines was not kept in {file}: {problem}")
