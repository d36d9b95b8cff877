"""What the self-check found, on disk (``_files.cache_folder``): one JSON file for all that a verdict depends on.

A check that has begun is noted before it runs: a kernel that takes the process along has a verdict too. What cannot be
written lasts as long as the process; what cannot be read is checked again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protomem_kernels._files import cache_folder, written_whole
from protomem_kernels._installed import version_of

PACKAGE = Path(__file__).parents[1]
ENDED = "the process that checked it ended in the middle of the check"


class Verdict(NamedTuple):
    """What the check of a backend's kernel said: ``reason`` is None where it may serve, else what was wrong."""

    backend: str
    operator: str
    dtype: str
    device: str
    reason: str | None


def _verdict(name: str, device: torch.device, reason: str | None) -> Verdict:
    backend, operator, dtype = name.split()
    return Verdict(backend, operator, dtype, str(device), reason)


def recall(backend: str, operator: str, dtype: torch.dtype, device: torch.device) -> Verdict | None:
    """Return the verdict on disk, or None. A check that began in a process that is no more counts as one."""
    content, name = _read(device), _name(backend, operator, dtype)
    if name in content["verdicts"]:
        return _verdict(name, device, content["verdicts"][name])
    if name in content["begun"] and not _runs(content["begun"][name]):
        return keep(backend, operator, dtype, device, ENDED)
    return None


def keep(backend: str, operator: str, dtype: torch.dtype, device: torch.device, reason: str | None) -> Verdict:
    """Write a verdict and return it."""
    name = _name(backend, operator, dtype)
    _update(device, lambda content: content["verdicts"].update({name: reason}))
    return _verdict(name, device, reason)


@contextlib.contextmanager
def noted_as_begun(backend: str, operator: str, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Have it on disk, within the block, that this process is at the check."""
    name = _name(backend, operator, dtype)
    _update(device, lambda content: content["begun"].update({name: os.getpid()}))
    try:
        yield
    finally:
        _update(device, lambda content: content["begun"].pop(name, None))


def remembered(device: torch.device) -> list[Verdict]:
    """Return all verdicts on disk for this device with what is installed now."""
    return [_verdict(name, device, reason) for name, reason in sorted(_read(device)["verdicts"].items())]


@functools.cache
def conditions(device: torch.device) -> Mapping[str, str]:
    """Return everything that a verdict depends on."""
    driver = Path("/proc/driver/nvidia/version")
    on_cuda = device.type == "cuda"
    return {
        "sources": _hash_of_sources(),
        "torch": torch.__version__,
        "triton": version_of("triton") or "",
        "driver": driver.read_text(encoding="utf-8").strip() if driver.exists() else "",
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_cuda else device.type,
    }


def _hash_of_sources() -> str:
    found = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("_C*")]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _name(backend: str, operator: str, dtype: torch.dtype) -> str:
    return f"{backend} {operator} {str(dtype).removeprefix('torch.')}"


def _file(device: torch.device) -> Path:
    name = hashlib.sha256(json.dumps(conditions(device), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "self_check" / f"{name}.json"


def _read(device: torch.device) -> dict[str, Any]:
    try:
        content = json.loads(_file(device).read_text(encoding="utf-8"))
        return {"verdicts": dict(content["verdicts"]), "begun": dict(content["begun"])}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # not there, no home, not ours, not whole
        return {"verdicts": {}, "begun": {}}


def _update(device: torch.device, change: Any) -> None:
    with contextlib.suppress(OSError, RuntimeError), _alone_at(_file(device)) as file:
        content = _read(device)
        change(content)
        with written_whole(file) as new:
            new.write_text(json.dumps({"for": conditions(device), **content}, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _alone_at(file: Path) -> Iterator[Path]:
    """Let one process (and thread) at a time change the file: a lost note that a check ended reads as a crash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        with contextlib.suppress(ImportError, OSError):  # no such system, or a file system without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield file


def _runs(process: int) -> bool:
    """Say whether a process of this machine still runs; this one counts as such."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
