"""Reference of ``margin_softmax_logits``: the (B, M) logits themselves, written once, tile by tile.

Column j of sample i holds z_i at the target, s h_ij (see ``negative_logsumexp``) at a negative, -inf at an empty slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels.backends.reference._rows import (
    memory_tiles,
    minus_infinity_unless,
    put_in_tile_,
    tile_width,
    unit_rows_backward,
    valid_slots,
)
from protomem_kernels.backends.reference.negative_logsumexp import all_present, reshape_hard
from protomem_kernels.rows import narrowed


def margin_softmax_logits(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    target_logits: Tensor,
    occupied: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize_prototypes: bool,
) -> Tensor:
    """Return the logits (B, M) in the dtype of ``x``; ``target_logits`` (B,) go to the targets as they are."""
    targets = valid_slots(targets, prototypes.shape[0])
    present = None if all_present(occupied) else occupied
    logits = x.new_empty(x.shape[0], prototypes.shape[0])
    width = tile_width(x.shape[0])
    y = x * scale
    for start, tile in memory_tiles(prototypes, present, x.dtype, normalize_prototypes, width):
        values, _ = reshape_hard(y @ tile.T, threshold, coefficients, scale)
        if present is not None:
            values += minus_infinity_unless(present[start : start + width], values.dtype)
        put_in_tile_(values, targets - start, target_logits)
        logits[:, start : start + width] = values
    return logits


def margin_softmax_logits_backward(
    grad: Tensor,
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize_prototypes: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x`` (B, D), ``prototypes`` (M, D; empty unless needed) and ``target_logits`` (B,)."""
    capacity = prototypes.shape[0]
    targets = valid_slots(targets, capacity)
    present = None if all_present(occupied) else occupied
    grad_x = torch.zeros_like(x)
    grad_w = (
        torch.empty_like(prototypes, memory_format=torch.contiguous_format) if need_prototypes else x.new_empty(0, 0)
    )
    # A broken embedding passes nothing on: the prototypes' gradient belongs to all samples.
    alive = torch.isfinite(x).all(dim=1, keepdim=True)
    all_alive = x.device.type == "cpu" and bool(alive.all())
    sound = torch.where(alive, x, 0)
    width = tile_width(x.shape[0])
    y = x * scale
    for start, tile in memory_tiles(prototypes, present, x.dtype, normalize_prototypes, width):
        g = grad[:, start : start + width] * scale
        if threshold is not None:
            slope = reshape_hard(y @ tile.T, threshold, coefficients, scale)[1]
            g = g if slope is None else g * slope
        if present is not None:
            g.masked_fill_(~present[start : start + width], 0)
        put_in_tile_(g, targets - start, 0.0)
        grad_x.addmm_(g, tile)
        if need_prototypes:
            tile_grad = (g if all_alive else torch.where(alive, g, 0)).T @ sound
            if normalize_prototypes:
                tile_grad = unit_rows_backward(tile_grad, prototypes[start : start + width].to(x.dtype), tile)
            grad_w[start : start + width] = narrowed(tile_grad, grad_w.dtype)
    if capacity == 0:
        return grad_x, grad_w, x.new_zeros(x.shape[0])
    grad_target = grad.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return grad_x, grad_w, torch.where(targets >= 0, grad_target, 0)
