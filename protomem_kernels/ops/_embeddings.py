"""Unit embeddings and their norms."""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels import reference


def unit_embeddings(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit rows (B, D) and norms (B,) in the accumulation dtype (float32, float64 for float64)."""
    e = embeddings.to(torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    return reference.unit_rows(e), torch.linalg.vector_norm(e, dim=1)
