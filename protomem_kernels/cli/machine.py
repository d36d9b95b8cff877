"""The machine that something was measured on, and what ran on it."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from protomem_kernels import __version__
from protomem_kernels.backends.choice import BACKENDS

FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Describe the machine and what runs on it."""
    model, flags = _cpu()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": model,
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else "",
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "protomem_kernels": __version__,
        "backends": " ".join(name for name, backend in BACKENDS.items() if backend.unavailable() is None),
    }


def _cpu() -> tuple[str, set[str]]:
    """Return the CPU's model and its flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""  # x86 or ARM
    return fields.get("model name", platform.machine()), set(flags.split())
