"""negative_logsumexp in Triton.

The mathematics, h, n, o, c and their gradients for x_i (i < B), w_j (j < M) and the scale s, is derived once, in
``backends/reference/negative_logsumexp.py``. The kernels stand in ``logsumexp_stream.py`` (all of the memory) and in
``logsumexp_chosen.py`` (``negatives`` given); here they are launched.

Forward, three launches. *Target*: each sample's target row is gathered and multiplied. *Stream*: a program holds R rows
of x and walks one split of the memory in tiles of C slots; per tile the logits are formed, turned into exponentials and
multiplied with the tile again: o is attention with keys = values = memory. *Reduction*: the splits are added in order.
Per tile C D entries of the memory are read and 4 R C D operations done (float32: three times as many of tf32; 16-bit:
6 R C D, see below). A call reads the memory once per row block, M D ceil(B / R) entries, of which all but the first
M D come from the L2 cache where the row blocks that share a split run side by side (they are neighbours in the grid);
the splits' sums are written and read, 8 S B D bytes. With one row block of 64, float32 sums and S = 128 splits that is
a tenth of the memory's bytes or less from M = 164,000 at 4 bytes, 328,000 at 2; below that it is a larger share, but no
more than 64 D KiB, which L2 holds on an H100 (32 MiB at D = 512).

Backward for the prototypes, one launch (two with 16-bit factors): class-stationary. A program holds C slots and walks
the batch in tiles of R; it forms the probabilities again from n, and its (C, D) sum is complete when it is written.
With ``negatives`` given, a program per sample gathers rows instead; their gradient goes through ``chosen_rows``.

Every sum has a fixed order, nothing is added by atomics, nothing is read back: the result is the same bits on the same
device. Exponents need no running maximum where a constant ``offset`` keeps them in range; otherwise rows keep their
maximum, and the splits are rescaled when they are added. Rows that are scaled to unit length first have their 1 / |w|
from a pass of its own (one more launch), which multiplies logits and exponentials instead of the rows.

16-bit memories are multiplied as they are stored. x, which is float32, is split into two 16-bit halves: the target's
kernel writes them, and the stream multiplies both at once, stacked as one factor of 2 R rows (M = 128 of wgmma and
tcgen05). What is left, up to 2^-18 of x in bfloat16, would make n wrong by s 2^-18, 2e-4 at s = 64; but as dn/dx = o
is there, its first-order share (x - halves) . o is added to n, and what remains is the square of that. So n keeps the
accuracy of float32, c is float32 throughout. Exponentials are rounded to 16 bits for the second product, as in flash
attention: o and dL/dw have a relative error near 2^-9 (2^-11). float16 would lose small exponentials: there a running
maximum brings them to 2^10 at most, and gradients of cosines are divided by their largest. That is why the sums are
never formed without o for 16-bit memories.

float64 is served everywhere, for checks. D is padded to a power of two; beyond 1024 it is only slow.

Source of the idea: online softmax and flash attention (Dao et al., arXiv 2205.14135, 2307.08691), with one key per
class; two-term splitting: Ozaki's scheme. The order of the work is this package's own.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from protomem_kernels.backends import precision
from protomem_kernels.backends.triton import autotune, launch
from protomem_kernels.backends.triton.chosen_rows import chosen_rows_backward_
from protomem_kernels.backends.triton.cosines import inverse_lengths
from protomem_kernels.backends.triton.launch import Launch
from protomem_kernels.backends.triton.logsumexp_chosen import launch_chosen, stride
from protomem_kernels.backends.triton.logsumexp_samples import launch_reduction, launch_targets, parts_of, split_into
from protomem_kernels.backends.triton.logsumexp_stream import gradient_kernel, stream_kernel


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

    Nothing is kept for backward, whatever ``kept_rows`` allows.
    """
    (batch, dim), capacity = x.shape, prototypes.shape[0]
    dtype = launch.compute_dtype(x, prototypes)
    halves = parts_of(x, dtype) if negatives is None else None
    with_moment = with_gradient or halves is not None  # n is corrected by it
    kept = prototypes.new_empty(0, 0)
    cosine, target_rows = launch_targets(x, prototypes, targets, normalize_prototypes, halves)
    if batch == 0:
        return cosine, x.new_empty(0), target_rows, x.new_empty((0, dim) if with_gradient else (0, 0)), kept
    if negatives is not None:
        n, o = x.new_empty(batch), x.new_empty((batch, dim) if with_gradient else (0, 0))
        launch_chosen(
            x,
            prototypes,
            targets,
            negatives,
            threshold,
            coefficients,
            scale,
            normalize_prototypes,
            n=n,
            o=o if with_gradient else None,
        )
        return cosine, n, target_rows, o, kept

    running = offset is None or normalize_prototypes or dtype == torch.float16
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    factor = x if halves is None else halves

    def stream(how: Launch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Launch the stream; return what the splits wrote."""
        chunks = launch.padded(dim) // how.columns if with_moment else 1
        blocks = triton.cdiv(batch, how.rows)
        splits, per_split = launch.split(capacity, how.slots, blocks * chunks, launch.processors(x.device))
        totals = x.new_empty(splits, batch)
        maxima = x.new_empty(splits, batch) if running else None
        moments = x.new_empty(splits, batch, dim) if with_moment else None
        stream_kernel[(blocks * chunks, splits)](
            factor,
            prototypes,
            targets,
            occupied,
            inverse,
            threshold,
            coefficients,
            totals,
            maxima,
            moments,
            batch,
            capacity,
            dim,
            per_split,
            scale,
            0.0 if running or offset is None else offset,
            *factor.stride()[-2:],
            *prototypes.stride(),
            targets.stride(0),
            stride(occupied),
            stride(threshold),
            stride(coefficients),
            HALVES=1 if halves is None else len(halves),
            TF32=precision.tf32(),
            **how.blocks(),
            BLOCK_DIM=launch.padded(dim),
            **how.options(),
        )
        return totals, maxima, moments

    kind = "stream with moment" if with_moment else "stream"
    if with_moment and None not in (occupied, inverse, threshold):
        kind += ", every option"
    totals, maxima, moments = stream(autotune.best(kind, x.device, dtype, dim, stream))
    n, o = launch_reduction(x, halves, totals, maxima, moments, scale, 0.0 if running or offset is None else offset)
    return cosine, n, target_rows, o if with_gradient else x.new_empty(0, 0), kept


def largest_gradient(grad_cosine: Tensor, grad_n: Tensor, scale: float) -> Tensor:
    """Return the largest gradient of a cosine that there can be, (); not 0."""
    return torch.maximum(scale * grad_n.abs().amax(), grad_cosine.abs().amax()).clamp(min=1e-30)


def occupied_or_target(occupied: Tensor | None, targets: Tensor, capacity: int) -> Tensor | None:
    """Return which slots take part in a gradient: a target is present whatever ``occupied`` says. None: all."""
    if occupied is None:
        return None
    inside = (targets >= 0) & (targets < capacity)
    padded = torch.cat([occupied, occupied.new_zeros(1)])
    return padded.index_fill(0, torch.where(inside, targets, capacity).long(), True)


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
    (batch, dim), capacity = x.shape, prototypes.shape[0]
    if grad_prototypes.numel() == 0:
        return
    grad_cosine, grad_n, n = grad_cosine.contiguous(), grad_n.contiguous(), n.contiguous()
    if negatives is not None:
        slots = torch.empty(batch, negatives.shape[1] + 1, dtype=torch.int64, device=x.device)
        grads = x.new_empty(slots.shape)
        if batch:
            launch_chosen(
                x,
                prototypes,
                targets,
                negatives,
                threshold,
                coefficients,
                scale,
                normalize_prototypes,
                n=n,
                grad_cosine=grad_cosine,
                grad_n=grad_n,
                slots=slots,
                grads=grads,
            )
        chosen_rows_backward_(grad_prototypes, grads, slots, x, prototypes, normalize_prototypes)
        return

    dtype = launch.compute_dtype(x, prototypes)
    halves = parts_of(x, dtype)
    factor = x if halves is None else split_into(halves, x)
    unit = largest_gradient(grad_cosine, grad_n, scale) if dtype == torch.float16 and batch else None
    present = occupied_or_target(occupied, targets, capacity) if normalize_prototypes else occupied
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None

    def write(how: Launch) -> None:
        """Launch the kernel that writes the gradient."""
        chunks = launch.padded(dim) // how.columns
        gradient_kernel[(triton.cdiv(capacity, how.slots) * chunks,)](
            grad_prototypes,
            grad_cosine,
            grad_n,
            unit,
            factor,
            prototypes,
            targets,
            occupied,
            present,
            inverse,
            threshold,
            coefficients,
            n,
            batch,
            capacity,
            dim,
            scale,
            *factor.stride()[-2:],
            *prototypes.stride(),
            stride(targets),
            stride(occupied),
            stride(present),
            stride(threshold),
            stride(coefficients),
            HALVES=1 if halves is None else len(halves),
            TF32=precision.tf32(),
            **how.blocks(),
            BLOCK_DIM=launch.padded(dim),
            **how.options(),
        )

    kind = "gradient of slots"
    if None not in (occupied, inverse):
        kind += ", every option"
    write(autotune.best(kind, x.device, dtype, dim, write))
