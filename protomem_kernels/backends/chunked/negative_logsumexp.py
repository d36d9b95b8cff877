"""negative_logsumexp by chunks: GEMM, weights, GEMM.

The mathematics is derived in ``backends/reference/negative_logsumexp.py``. With x split into PARTS numbers of a 16-bit
memory's dtype (``triton/negative_logsumexp.py`` says why two suffice, and how n is put right to first order after two
or, in "medium", one), and a chunk W of the memory:

    forward     L = parts W^T;   P, sums = weights(L);   o += P W        2 (PARTS + 1) b C D operations in two products
    backward    L = parts W^T;   P = probabilities(L);   dW = P^T parts  4 PARTS b C D

What else a chunk moves, through L2: its logits and weights, b C (8 PARTS + 4) bytes beside a 16-bit memory, and its
rows twice more where slots may be empty, whose rows must not be multiplied as they stand. The memory itself is read
once, for batches of up to 4,096 samples. Where rows keep a running maximum, o is scaled before the product is added to
it.

Deterministic as far as PyTorch's products are, which take one order of the sum for one shape on one device. Given
``negatives`` it is Triton's kernel, which gathers rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from protomem_kernels.backends import precision
from protomem_kernels.backends.chunked import products
from protomem_kernels.backends.chunked.products import add_product_, cut, factor_of, logits_of, part_of, present_rows
from protomem_kernels.backends.chunked.weights import probabilities_kernel, weights_kernel
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton import negative_logsumexp as whole
from protomem_kernels.backends.triton.cosines import inverse_lengths
from protomem_kernels.backends.triton.logsumexp_chosen import stride
from protomem_kernels.backends.triton.logsumexp_samples import LIFT, launch_reduction, launch_targets, parts_of
from protomem_kernels.backends.triton.margin_softmax_logits import through_normalisation
from protomem_kernels.rows import narrowed


def _slots(x: Tensor, prototypes: Tensor, parts: int) -> int:
    """Return the slots of a chunk."""
    rows, item = min(len(x), products.ROWS), launch.compute_dtype(x, prototypes).itemsize
    per_logit = parts * x.element_size() + item
    per_slot = x.shape[1] * (2 * item + x.element_size())
    return products.slots_of_chunk(x.device, rows, len(prototypes), per_logit, per_slot)


class _Sums:
    """The sums of some samples over the chunks so far; each step writes beside what it reads."""

    def __init__(self, x: Tensor, running: bool) -> None:
        self.totals, self.new_totals = x.new_zeros(len(x)), x.new_empty(len(x))
        self.maxima = x.new_full((len(x),), float("-inf")) if running else None
        self.new_maxima = x.new_empty(len(x)) if running else None
        self.rescale = x.new_empty(len(x)) if running else None

    def turn(self) -> None:
        """Take what was written for what is read."""
        self.totals, self.new_totals = self.new_totals, self.totals
        self.maxima, self.new_maxima = self.new_maxima, self.maxima


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
    """Return c (B,), n (B,), the target rows dc/dx (B, D), o = dn/dx (B, D; empty without ``with_gradient``), nothing.

    Arguments and returns are those of ``triton.negative_logsumexp``.
    """
    if negatives is not None or len(x) == 0:
        return whole.negative_logsumexp(
            x,
            prototypes,
            targets,
            occupied,
            negatives,
            threshold,
            coefficients,
            scale,
            offset,
            normalize_prototypes,
            with_gradient,
            kept_rows,
        )
    dtype, capacity = launch.compute_dtype(x, prototypes), len(prototypes)
    parts = parts_of(x, dtype)
    cosine, target_rows = launch_targets(x, prototypes, targets, normalize_prototypes, parts)
    factor, lift = (x[None], 1.0) if parts is None else (parts, float(LIFT.value))
    running = offset is None or normalize_prototypes or dtype == torch.float16
    taken = 0.0 if running or offset is None else offset
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    moment = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_gradient or parts is not None else None
    step = min(_slots(x, prototypes, len(factor)), max(capacity, 1))
    blocks = list(cut(len(x), products.ROWS))
    sums = [_Sums(x[block], running) for block in blocks]
    most = len(x[blocks[0]])
    logits = x.new_empty(len(factor) * most * step)
    weights = x.new_empty(0 if moment is None else most * step, dtype=dtype)
    how = launch.choose("chunk", launch.architecture(x.device), dtype, x.shape[1])
    with precision.held_by_cublas():
        for here in cut(capacity, step):
            present = part_of(occupied, here)
            rows = present_rows(prototypes[here], present, dtype)
            for block, of in zip(blocks, sums, strict=True):
                size = block.stop - block.start
                w = None if moment is None else weights[: size * len(rows)].view(size, len(rows))
                weights_kernel[(triton.cdiv(size, how.rows),)](
                    w,
                    logits_of(factor[:, block], rows, logits),
                    targets[block],
                    present,
                    part_of(inverse, here),
                    part_of(threshold, block),
                    coefficients,
                    of.totals,
                    of.new_totals,
                    of.maxima,
                    of.new_maxima,
                    of.rescale,
                    here.start,
                    len(rows),
                    size,
                    capacity,
                    scale,
                    lift,
                    taken,
                    targets.stride(0),
                    stride(occupied),
                    stride(threshold),
                    stride(coefficients),
                    PARTS=len(factor),
                    HEADROOM=10.0 if dtype == torch.float16 else 0.0,
                    BLOCK_ROWS=how.rows,
                    BLOCK_SLOTS=how.slots,
                    **how.options(),
                )
                if moment is not None and w is not None:
                    if of.rescale is not None:
                        moment[block].mul_(of.rescale[:, None])
                    add_product_(moment[block], w, rows)
                of.turn()
    totals = torch.cat([of.totals for of in sums])[None] if len(sums) > 1 else sums[0].totals[None]
    maxima = torch.cat([of.maxima for of in sums if of.maxima is not None])[None] if running else None
    n, o = launch_reduction(x, parts, totals, maxima, None if moment is None else moment[None], scale, taken)
    return cosine, n, target_rows, o if with_gradient else x.new_empty(0, 0), prototypes.new_empty(0, 0)


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
    """Write dL/dw into all of ``grad_prototypes`` (M, D); probabilities are formed again from n."""
    if negatives is not None or len(x) == 0 or grad_prototypes.numel() == 0:
        whole.negative_logsumexp_backward_(
            grad_prototypes,
            grad_cosine,
            grad_n,
            x,
            prototypes,
            targets,
            occupied,
            negatives,
            threshold,
            coefficients,
            n,
            scale,
            offset,
            normalize_prototypes,
            kept_rows,
        )
        return
    grad_cosine, grad_n, n = grad_cosine.contiguous(), grad_n.contiguous(), n.contiguous()
    dtype, capacity = launch.compute_dtype(x, prototypes), len(prototypes)
    factor, lift = factor_of(x, prototypes, precision.halves(dtype))
    unit, size = None, x.new_full((), 1 / lift)
    if dtype == torch.float16:
        unit = whole.largest_gradient(grad_cosine, grad_n, scale)
        size = unit / (1024 * lift)
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    present = whole.occupied_or_target(occupied, targets, capacity) if normalize_prototypes else occupied
    step = min(_slots(x, prototypes, len(factor)), capacity)
    most = min(len(x), products.ROWS)
    logits, weights = x.new_empty(len(factor) * most * step), x.new_empty(most * step, dtype=dtype)
    grad_of_chunk = x.new_empty(step, x.shape[1])
    how = launch.choose("chunk", launch.architecture(x.device), dtype, x.shape[1])
    with precision.held_by_cublas():
        for here in cut(capacity, step):
            rows = present_rows(prototypes[here], part_of(occupied, here), dtype)
            grad = grad_of_chunk[: len(rows)].zero_()
            for block in cut(len(x), products.ROWS):
                part = factor[:, block]
                height = part.shape[1]
                p = weights[: height * len(rows)].view(height, len(rows))
                probabilities_kernel[(triton.cdiv(height, how.rows) * triton.cdiv(len(rows), how.slots),)](
                    p,
                    logits_of(part, rows, logits),
                    targets[block],
                    part_of(occupied, here),
                    part_of(inverse, here),
                    part_of(threshold, block),
                    coefficients,
                    n[block],
                    grad_n[block],
                    grad_cosine[block],
                    unit,
                    here.start,
                    len(rows),
                    height,
                    capacity,
                    scale,
                    lift,
                    targets.stride(0),
                    stride(occupied),
                    stride(threshold),
                    stride(coefficients),
                    PARTS=len(factor),
                    BLOCK_ROWS=how.rows,
                    BLOCK_SLOTS=how.slots,
                    **how.options(),
                )
                for numbers in part:
                    add_product_(grad, p.T, numbers)
            if lift != 1:
                grad *= size
            into = grad_prototypes[here]
            if inverse is None:
                into.copy_(narrowed(grad, into.dtype))
            else:
                through_normalisation(into, grad, prototypes[here], inverse[here], part_of(present, here))
