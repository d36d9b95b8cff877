"""Reference of ``negative_logsumexp``, the one heavy operator, streamed over tiles of the memory.

With x_i a unit embedding, w_j a prototype and cos_ij = x_i . w_j,

    h_ij = cos_ij where cos_ij <= tau_i, else a cos_ij + b + g cos_ij^2       (the hard-negative form, if there is one)
    n_i  = log sum over the negatives j of exp(s h_ij)                         (-inf if there are none)
    o_i  = dn_i/dx_i = s sum_j q_ij h'_ij w_j,   q_ij = exp(s h_ij - n_i)
    dL/dw_j = sum_i (dL/dn_i s q_ij h'_ij + [j is i's target] dL/dc_i) x_i,    c_i = cos at the target.

Per tile of T slots: B x T logits are formed, exponentiated and consumed while they lie in cache; o is accumulated
beside the sum, so that forward and backward together cost two matrix products. The order of the tiles is fixed, hence
so is the result. Because |s h| is bounded, the sums need no running maximum: a fixed ``offset``, found on the host from
the scale and the form alone, keeps them in range. Where no offset can (``offset=None``), a running maximum does.

Everything is computed on y = s cos ("scaled" below): s h = a y + s b + (g / s) y^2 and h' = a + 2 (g / s) y.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from protomem_kernels.backends.reference._rows import (
    add_rows_,
    chosen_rows_backward,
    gather_rows,
    keep_rows,
    memory_tiles,
    minus_infinity_unless,
    put_in_tile_,
    row_blocks,
    tile_width,
    unit_rows_backward,
    valid_slots,
)
from protomem_kernels.rows import narrowed


def reshape_hard(
    scaled: Tensor, threshold: Tensor | None, coefficients: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return s h and h' (None where it is 1 throughout) for scaled cosines (B, T), overwritten, and thresholds (B,)."""
    if threshold is None or coefficients is None:
        return scaled, None
    tau = scale * threshold.to(scaled.dtype)
    if scaled.device.type == "cpu" and scaled.shape[1]:
        rows = torch.nonzero(scaled.amax(dim=1) > tau)[:, 0]  # in a trained model few rows of a tile hold a hard one
        if rows.numel() == 0:
            return scaled, None
    else:
        rows = torch.arange(scaled.shape[0], device=scaled.device)
    a, b, g = coefficients.to(scaled.dtype)
    y = scaled[rows]
    hard = y > tau[rows, None]
    form = y.mul(g / scale).add_(a).mul_(y).add_(scale * b)
    slope = torch.ones_like(scaled)
    slope[rows] = torch.where(hard, y.mul(2 * g / scale).add_(a), 1)
    scaled[rows] = torch.where(hard, form, y)
    return scaled, slope


def all_present(occupied: Tensor | None) -> bool:
    """Say whether no slot is empty; unknown, hence False, where looking would stop a device."""
    return occupied is None or (occupied.device.type == "cpu" and bool(occupied.all()))


class Sums:
    """The sums of one call: per row ``total`` = sum of exp(s h - shift) and ``moment`` = sum of the same times h' w."""

    def __init__(self, x: Tensor, offset: float | None, with_gradient: bool) -> None:
        self.total = x.new_zeros(x.shape[0])
        self.moment = torch.zeros_like(x) if with_gradient else None
        self.running = offset is None
        self.shift = x.new_full((x.shape[0],), float("-inf") if offset is None else offset)
        self.offset = offset or 0.0

    def exponentials(self, logits: Tensor) -> Tensor:
        """Turn logits s h (B, T) into exp(s h - shift), in place; excluded ones are -inf already if the shift runs."""
        if not self.running:
            return (logits.sub_(self.offset) if self.offset else logits).exp_()
        shift = torch.maximum(self.shift, logits.amax(dim=1))
        rescale = torch.where(shift == float("-inf"), 0, (self.shift - shift).exp())
        self.total *= rescale
        if self.moment is not None:
            self.moment *= rescale[:, None]
        self.shift = shift
        return logits.sub_(torch.where(shift == float("-inf"), 0, shift)[:, None]).exp_()

    def finish(self, scale: float) -> tuple[Tensor, Tensor]:
        """Return n (B,) and o (B, D), or an empty o if no gradient is wanted."""
        nonzero = self.total != 0
        n = torch.where(nonzero, self.total.log() + self.shift, float("-inf"))
        if self.moment is None:
            return n, self.total.new_empty(0, 0)
        self.moment *= torch.where(nonzero, scale / self.total, 0)[:, None]
        return n, self.moment


def negative_logsumexp(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    negatives: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    offset: float | None,
    normalize_prototypes: bool,
    with_gradient: bool,
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return c (B,), n (B,), the target rows dc/dx (B, D), o = dn/dx (B, D; empty without ``with_gradient``) and kept.

    ``kept`` (M, D), in the dtype of the prototypes, is the memory of their gradient: its first K = ``kept_rows``
    columns hold e^{s h - offset} h' of the first K samples, and 0 at targets and empty slots. A backend may keep
    nothing and return it empty (0, 0); those that keep lay it out so, since backward may be served by another one.
    """
    targets = valid_slots(targets, prototypes.shape[0])
    target_rows = gather_rows(prototypes, targets, x.dtype, normalize_prototypes)
    cosine = (x * target_rows).sum(dim=1)
    y = x * scale
    sums = Sums(x, offset, with_gradient)
    kept = prototypes.new_empty(prototypes.shape if kept_rows else (0, 0))
    if negatives is None:
        _stream(
            y,
            prototypes,
            targets,
            occupied,
            threshold,
            coefficients,
            scale,
            normalize_prototypes,
            sums,
            kept[:, :kept_rows],
        )
    else:
        _gathered(y, prototypes, targets, negatives, threshold, coefficients, scale, normalize_prototypes, sums)
    n, o = sums.finish(scale)
    return cosine, n, target_rows, o, kept


def _stream(
    y: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize_prototypes: bool,
    sums: Sums,
    kept: Tensor,
) -> None:
    """Add every slot of the memory to the sums, tile by tile; keep what ``kept`` has room for."""
    width = tile_width(y.shape[0])
    present = None if all_present(occupied) else occupied
    buffer = y.new_empty(y.shape[0] * min(width, prototypes.shape[0]))
    for start, tile in memory_tiles(prototypes, present, y.dtype, normalize_prototypes, width):
        logits = buffer[: y.shape[0] * tile.shape[0]].view(y.shape[0], tile.shape[0])
        torch.mm(y, tile.T, out=logits)
        logits, slope = reshape_hard(logits, threshold, coefficients, scale)
        if sums.running:
            if present is not None:
                logits += minus_infinity_unless(present[start : start + width], logits.dtype)
            put_in_tile_(logits, targets - start, float("-inf"))
            e = sums.exponentials(logits)
        else:
            e = sums.exponentials(logits)
            if present is not None:
                e *= present[start : start + width]
            put_in_tile_(e, targets - start, 0.0)
        sums.total += e.sum(dim=1)
        weighted = e if slope is None else e.mul_(slope)
        if kept.shape[1]:
            kept[start : start + width] = weighted[: kept.shape[1]].T
        if sums.moment is not None:
            sums.moment.addmm_(weighted, tile)


def _gathered(
    y: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    negatives: Tensor,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize_prototypes: bool,
    sums: Sums,
) -> None:
    """Add to the sums only the chosen ``negatives`` (B, k) of each row; -1 and the target are none."""
    slots = chosen_negatives(negatives, targets, prototypes.shape[0])
    logits = y.new_empty(slots.shape)
    for rows in row_blocks(slots, y.shape[1]):
        w = gather_rows(prototypes, slots[rows], y.dtype, normalize_prototypes)
        logits[rows] = torch.bmm(w, y[rows, :, None])[:, :, 0]
    logits, slope = reshape_hard(logits, threshold, coefficients, scale)
    e = sums.exponentials(torch.where(slots >= 0, logits, float("-inf")))
    sums.total += e.sum(dim=1)
    if sums.moment is not None:
        e = e if slope is None else e * slope
        for rows in row_blocks(slots, y.shape[1]):
            w = gather_rows(prototypes, slots[rows], y.dtype, normalize_prototypes)
            sums.moment[rows] += torch.bmm(e[rows, None], w)[:, 0]


def chosen_negatives(negatives: Tensor, targets: Tensor, capacity: int) -> Tensor:
    """Return the slots (B, k) that count as negatives: inside the memory and not the target; -1 elsewhere."""
    slots = valid_slots(negatives, capacity)
    return torch.where(slots == targets[:, None], -1, slots)


def negative_logsumexp_backward_(
    grad_prototypes: Tensor,
    grad_cosine: Tensor,
    grad_n: Tensor,
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    negatives: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    n: Tensor,
    scale: float,
    offset: float | None,
    normalize_prototypes: bool,
    kept_rows: int,
) -> None:
    """Write dL/dw into ``grad_prototypes`` (M, D), whose first ``kept_rows`` columns hold what forward kept.

    The probabilities of each tile come from there, or are formed again from n. Class-stationary: a tile's gradient is
    complete when it is written, so nothing is added up across tiles.
    """
    capacity = prototypes.shape[0]
    targets = valid_slots(targets, capacity)
    n = torch.where(n == float("-inf"), float("inf"), n)[:, None]  # no negatives: no probability
    factor = scale * grad_n[:, None]

    def probabilities(scaled: Tensor, first: int = 0) -> Tensor:
        """Return dL/dcos_ij = dL/dn_i s q_ij h'_ij for scaled cosines of the samples from ``first``, overwritten."""
        tau = None if threshold is None else threshold[first:]
        logits, slope = reshape_hard(scaled, tau, coefficients, scale)
        p = logits.sub_(n[first:]).exp_().mul_(factor[first:])
        return p if slope is None else p.mul_(slope)

    if negatives is not None:
        slots = chosen_negatives(negatives, targets, capacity)
        grad_prototypes[:] = _gathered_backward(
            probabilities, grad_cosine, x, prototypes, targets, slots, scale, normalize_prototypes
        )
        return

    present = None
    if occupied is not None and not all_present(occupied):
        padded = torch.cat([occupied, occupied.new_zeros(1)])  # a target is present whatever `occupied` says
        present = padded.index_fill(0, torch.where(targets < 0, capacity, targets), True)[:capacity]
    width = tile_width(x.shape[0])
    first = kept_rows  # sample that forward kept nothing of
    kept_factor = factor[:first] * ((offset or 0.0) - n[:first]).exp()
    alive = kept_factor[:, 0] != 0
    y = x[first:] * scale
    buffer = x.new_empty(x.shape[0] * min(width, capacity))
    for start, tile in memory_tiles(prototypes, present, x.dtype, normalize_prototypes, width):
        p = buffer[: x.shape[0] * tile.shape[0]].view(x.shape[0], tile.shape[0])
        torch.mul(grad_prototypes[start : start + width, :first].T, kept_factor, out=p[:first])
        if first:
            p[:first] = keep_rows(p[:first], alive)
        torch.mm(y, tile.T, out=p[first:])
        if present is not None and occupied is not None:  # before exp, which may overflow at a slot outside n
            p[first:] += minus_infinity_unless(occupied[start : start + width], p.dtype)
        probabilities(p[first:], first)
        put_in_tile_(p, targets - start, grad_cosine)
        tile_grad = p.T @ x
        if normalize_prototypes:
            tile_grad = unit_rows_backward(tile_grad, prototypes[start : start + width].to(x.dtype), tile)
        grad_prototypes[start : start + width] = narrowed(tile_grad, grad_prototypes.dtype)


def _gathered_backward(
    probabilities: Callable[[Tensor], Tensor],
    grad_cosine: Tensor,
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    slots: Tensor,
    scale: float,
    normalize_prototypes: bool,
) -> Tensor:
    """Return dL/dw (M, D) where only the chosen ``slots`` (B, k) and the targets take part."""
    grad_cosines = torch.cat([x.new_empty(slots.shape), grad_cosine[:, None]], dim=1)
    slots = torch.cat([slots, targets[:, None]], dim=1)
    for rows in row_blocks(slots, x.shape[1]):
        w = gather_rows(prototypes, slots[rows, :-1], x.dtype, normalize_prototypes)
        grad_cosines[rows, :-1] = torch.bmm(w, (x[rows] * scale)[:, :, None])[:, :, 0]
    grad_cosines[:, :-1] = probabilities(grad_cosines[:, :-1])
    grad = x.new_zeros(prototypes.shape)
    for rows in row_blocks(slots, x.shape[1]):
        w = gather_rows(prototypes, slots[rows], x.dtype, normalize_prototypes)
        raw = gather_rows(prototypes, slots[rows], x.dtype, False)
        row_grad = chosen_rows_backward(grad_cosines[rows], x[rows], raw, w, normalize_prototypes)
        add_rows_(grad, slots[rows].flatten(), row_grad.flatten(0, 1))
    return narrowed(grad, prototypes.dtype)
