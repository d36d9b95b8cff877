"""What the contract suites run over: backends, dtypes and ragged shapes; and the tolerance that truth sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomem_kernels.ops.dispatch import BACKENDS

AVAILABLE = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]
each_backend = pytest.mark.parametrize("backend", AVAILABLE)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# (B, M, D): one sample, one slot, nothing, sizes that are no multiple of a tile, and more than one tile of memory.
SHAPES = [(1, 1, 1), (0, 5, 3), (3, 0, 4), (7, 1, 5), (5, 130, 33), (33, 257, 17), (64, 9001, 8)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def strided(x: Tensor) -> Tensor:
    """Return the same values in a tensor that is contiguous in neither dimension."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan") if x.is_floating_point() else -7)
    wide[..., ::2] = x
    return wide[..., ::2]


def assert_as_close_as(ours: Tensor, peer: Tensor, truth: Tensor, tiny: float = 1e-6) -> None:
    """Hold the error of ``ours`` against float64 ``truth`` to twice that of ``peer``: PyTorch in the same dtype."""
    assert ours.shape == truth.shape
    same = ours.double() == truth  # infinities
    error = torch.where(same, 0, (ours.double() - truth).abs()).max() if truth.numel() else torch.zeros(())
    allowed = torch.where(peer.double() == truth, 0, (peer.double() - truth).abs()).max() if truth.numel() else 0.0
    scale = torch.where(torch.isfinite(truth), truth.abs(), 0).max().item() if truth.numel() else 0.0
    assert float(error) <= 2 * float(allowed) + tiny * (1 + scale), f"error {float(error)}, peer {float(allowed)}"
