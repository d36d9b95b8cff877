"""Where the tests of this folder run, and the two things that only CUDA can do: watch for synchronisation, and graphs.

Everything is skipped where there is no GPU; with ``PROTOMEM_GPU_STAND_IN=cpu`` all but these two things run on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from protomem_kernels.gpu_check import device
from tests.ops.cases import GPU, ON_GPU

DEVICE = GPU or "cuda"
ON_CUDA = DEVICE == "cuda"
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="needs a CUDA device; torch sees none here")]
each_backend = pytest.mark.parametrize("backend", ON_GPU or ["triton", "reference"])


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Have everything that makes the host wait for the device raise."""
    if not ON_CUDA:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that replays ``step``, captured in a CUDA graph after three runs that warm up.

    ``step`` reads and writes the same tensors each time.
    """
    if not ON_CUDA:
        for _ in range(4):
            step()
        return step
    return device.captured(step)[0]
