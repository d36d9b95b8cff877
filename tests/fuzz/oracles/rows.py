"""Lengths and directions of rows of any size."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(x: Tensor) -> Tensor:
    """Return the norms (N,) of rows (N, D), with squares that neither overflow nor vanish."""
    top = x.detach().abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    top = torch.where((top > 0) & top.isfinite(), top, 1)
    squares = (x / top[:, None]).square().sum(dim=1)
    # The square root of 0 has no derivative; the norm of a zero row is taken to have 0.
    return top * torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)


def directions(x: Tensor) -> Tensor:
    """Return rows of length 1; a zero row stays zero and passes no gradient."""
    top = x.detach().abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_ones(x.shape[0], 1)
    zero = top == 0
    y = x / torch.where(zero, 1, top)
    squares = y.square().sum(dim=1, keepdim=True)
    return torch.where(zero, 0, y / torch.where(zero, 1, squares).sqrt())
