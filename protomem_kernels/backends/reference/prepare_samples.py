"""Reference of ``prepare_samples``: targets, unit rows and lengths of a batch, and the gradient of the unit rows."""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels.backends.reference._rows import unit_rows_backward
from protomem_kernels.rows import accumulation_dtype, narrowed, unit_embeddings


def prepare_samples(
    embeddings: Tensor, labels: Tensor, index: Tensor, slots: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (B, D), norm (B,) and targets (B,): ``ops.prepare_samples``."""
    padded = torch.cat([slots, slots.new_full((1,), -1)])
    inside = (index >= 0) & (index < len(slots))
    targets = padded[torch.where(inside, index, len(slots))]
    broken = (labels >= 0) & (targets < 0) & ~torch.isfinite(embeddings).all(dim=1)
    targets = torch.where(broken, 0, targets)
    counts = (targets >= 0) & (targets < capacity)
    x, norm = unit_embeddings(torch.where(counts[:, None], embeddings, 0))
    return x, norm, targets


def prepare_samples_backward(grad_x: Tensor, embeddings: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return dL/d embedding (B, D): (g - (g . x) x) / |e|, 0 where x is."""
    wide = embeddings.to(accumulation_dtype(embeddings.dtype))
    return narrowed(unit_rows_backward(grad_x, wide, x), embeddings.dtype)
