"""aggregate_prototypes: the quality-weighted prototype of every identity in a batch, and its backward pass.

e_i (D numbers) is the embedding of sample i < B, q_i its weight, x_i = e_i / |e_i| (or e_i itself without
``normalize``). For each identity c, over its samples i in batch order,

    mass_c = sum q_i        (if that is 0, every q_i counts as 1 in what follows)
    m_c = sum q_i x_i       p_c = m_c / |m_c|

p_c is zero, and so is the stored |m_c|, where |m_c| <= 1e-6 sum q_i |x_i| or anything is not finite. Backward, with
g_c and h_c the gradients of p_c and mass_c,

    t_c = (g_c - (g_c . p_c) p_c) / |m_c|       a_i = x_i . t_c
    de_i = q_i (t_c - a_i x_i) / |e_i|   (q_i t_c without ``normalize``)       dq_i = a_i + h_c   (h_c where mass_c = 0)

Two launches forward:

1. ``order_kernel``: every label's position in the stable order, by counting (``rows.ranks``; B^2 comparisons). At the
   position of an identity's first sample stands how many samples it has, elsewhere 0: a segment.
2. ``sum_kernel``: one program per position. It counts the segments before its own, which is its identity's number c;
   no scan between the launches is needed, at the price of reading B flags of one byte, from L2. Programs in the middle
   of a segment end there. The others walk their segment, some samples at a time, in batch order, and write row c.

One launch backward: one program per few samples; t_c is computed anew for each, since g_c and p_c are in cache.

Bytes: forward reads B D and writes P D numbers, backward reads B D + 2 P D (from memory; each row comes once per
sample from cache) and writes B D. Nothing is read back to the host, unless the number of rows is to be found
out (``max_identities=None``). Deterministic: one program adds up one identity, in an order that the batch alone sets.
One identity's samples are never split over programs: a batch of one single identity is walked by one program. Larger
than 1024 columns works too, but the row is held in registers whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.rows import ranks, unit_rows
from protomem_kernels.backends.triton.tiles import load_rows, load_slots, narrow_gradient
from protomem_kernels.rows import accumulation_dtype

ANTIPODAL = tl.constexpr(1e-6)  # |m_c| at or below this share of sum q_i |x_i| has no direction worth keeping


@triton.jit
def order_kernel(
    labels_ptr, stride_label, order_ptr, length_ptr, head_ptr, index_ptr, size, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Sort the samples by label: which sample stands at each position, and where the segments begin."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    label, less, before, equal = ranks(labels_ptr, stride_label, size, rows, BLOCK_KEYS)
    inside = rows < size
    position = less + before
    first = (label >= 0) & (before == 0)
    tl.store(order_ptr + position, rows, mask=inside)
    tl.store(length_ptr + position, tl.where(first, equal, 0), mask=inside)
    tl.store(head_ptr + position, first.to(tl.int8), mask=inside)
    tl.store(index_ptr + rows, -1, mask=inside)  # the second launch knows better for all that belong somewhere


@triton.jit
def load_weights(weights_ptr, samples, stride, keep, dtype: tl.constexpr):
    """Return the weights (N,): 1 if there are none, 0 in place of negative or non-finite ones and where not kept."""
    if weights_ptr is None:
        weights = keep.to(dtype)
    else:
        weights = tl.load(weights_ptr + samples.to(tl.int64) * stride, mask=keep, other=0.0).to(dtype)
        weights = tl.where((weights > 0) & (weights < float("inf")), weights, 0.0)
    return weights


@triton.jit
def sum_kernel(
    embeddings_ptr, stride_embedding, stride_column, labels_ptr, stride_label, weights_ptr, stride_weight,
    order_ptr, length_ptr, head_ptr, prototypes_ptr, identities_ptr, index_ptr, mass_ptr, norm_ptr, size, dim, rows,
    NORMALIZE: tl.constexpr, BLOCK_FLAGS: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the row of the identity whose segment begins at this program's position, and the unused row of its number.

    ``rows`` is the number of rows of the outputs.
    """
    position = tl.program_id(0)
    dtype = prototypes_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_D)
    length = tl.load(length_ptr + position, mask=position < size, other=0)
    number, count = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    if (length > 0) | (position < rows):
        heads_before = tl.zeros([BLOCK_FLAGS], tl.int32)
        heads = tl.zeros([BLOCK_FLAGS], tl.int32)
        for start in range(0, size, BLOCK_FLAGS):
            at = start + tl.arange(0, BLOCK_FLAGS)
            head = tl.load(head_ptr + at, mask=at < size, other=0).to(tl.int32)
            heads += head
            heads_before += tl.where(at < position, head, 0)
        number = tl.sum(heads_before, axis=0)
        count = tl.sum(heads, axis=0)

    if (position >= count) & (position < rows):  # an unused row
        row = position.to(tl.int64) * dim + columns
        tl.store(prototypes_ptr + row, tl.zeros([BLOCK_D], dtype), mask=columns < dim)
        tl.store(identities_ptr + position, -1)
        tl.store(mass_ptr + position, 0.0)
        tl.store(norm_ptr + position, 0.0)

    if (length > 0) & (number < rows):
        partial = tl.zeros([BLOCK_FLAGS], dtype)
        for start in range(0, length, BLOCK_FLAGS):
            at = start + tl.arange(0, BLOCK_FLAGS)
            samples = tl.load(order_ptr + position + at, mask=at < length, other=0)
            partial += load_weights(weights_ptr, samples, stride_weight, at < length, dtype)
        mass = tl.sum(partial, axis=0)

        total = tl.zeros([BLOCK_D], dtype)
        budget = tl.zeros([BLOCK_SAMPLES], dtype)
        for start in range(0, length, BLOCK_SAMPLES):
            at = start + tl.arange(0, BLOCK_SAMPLES)
            keep = at < length
            samples = tl.load(order_ptr + position + at, mask=keep, other=0)
            x = load_rows(embeddings_ptr, samples, columns, stride_embedding, stride_column, keep, dim).to(dtype)
            unit, size_of_x = unit_rows(x)
            if NORMALIZE:
                x = unit
                size_of_x = tl.where(size_of_x == 0, 0.0, 1.0)  # a NaN is seen in the sum
            weights = load_weights(weights_ptr, samples, stride_weight, keep, dtype)
            weights = tl.where(mass > 0, weights, 1.0)  # samples that are not kept are zero rows
            total += tl.sum(weights[:, None] * x, axis=0)
            budget += weights * size_of_x
            tl.store(index_ptr + samples, number.to(tl.int64), mask=keep)

        prototype, norm = unit_rows(total[None, :])
        # False for NaN. An infinite entry makes the norm NaN too.
        exists = (norm < float("inf")) & (norm > ANTIPODAL * tl.sum(budget, axis=0))
        row = number.to(tl.int64) * dim + columns[None, :]
        tl.store(prototypes_ptr + row, tl.where(exists[:, None], prototype, 0.0), mask=columns[None, :] < dim)
        one = tl.arange(0, 1)
        tl.store(norm_ptr + number + one, tl.where(exists, norm, 0.0))
        tl.store(mass_ptr + number, mass)
        sample = tl.load(order_ptr + position)
        tl.store(identities_ptr + number, tl.load(labels_ptr + sample.to(tl.int64) * stride_label).to(tl.int64))


@triton.jit
def backward_kernel(
    grad_prototypes_ptr, stride_grad, stride_grad_column, grad_mass_ptr, stride_grad_mass,
    embeddings_ptr, stride_embedding, stride_column, weights_ptr, stride_weight, index_ptr, stride_index,
    prototypes_ptr, stride_prototype, stride_prototype_column, mass_ptr, stride_mass, norm_ptr, stride_norm,
    grad_embeddings_ptr, grad_weights_ptr, size, dim, rows,
    NORMALIZE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a few samples; both outputs are contiguous."""
    samples = tl.program_id(0) * BLOCK_SAMPLES + tl.arange(0, BLOCK_SAMPLES)
    columns = tl.arange(0, BLOCK_D)
    dtype = prototypes_ptr.dtype.element_ty
    inside = samples < size
    row = load_slots(index_ptr, samples, stride_index, inside, rows)
    norm = tl.load(norm_ptr + row * stride_norm, mask=row >= 0, other=0.0)
    mass = tl.load(mass_ptr + row * stride_mass, mask=row >= 0, other=0.0)
    grad_mass = tl.load(grad_mass_ptr + row * stride_grad_mass, mask=row >= 0, other=0.0).to(dtype)
    lives = norm > 0  # a zero row passes nothing, and its embeddings, finite or not, are not even read

    p = load_rows(prototypes_ptr, row, columns, stride_prototype, stride_prototype_column, lives, dim)
    g = load_rows(grad_prototypes_ptr, row, columns, stride_grad, stride_grad_column, lives, dim).to(dtype)
    length = tl.where(lives, norm, 1.0)
    u = g - tl.sum(g * p, axis=1)[:, None] * p
    t = u / length[:, None]
    e = load_rows(embeddings_ptr, samples, columns, stride_embedding, stride_column, lives, dim).to(dtype)
    weights = load_weights(weights_ptr, samples, stride_weight, inside, dtype)
    q = tl.where(mass > 0, weights, 1.0)
    if NORMALIZE:
        x, size_of_e = unit_rows(e)
        along = tl.sum(x * u, axis=1) / length
        grad = q[:, None] * (t - along[:, None] * x)
        grad = tl.where((size_of_e > 0)[:, None], grad / tl.where(size_of_e > 0, size_of_e, 1.0)[:, None], 0.0)
    else:
        along = tl.sum(e * u, axis=1) / length  # in this order: entries of e t may leave the range with either sign
        grad = q[:, None] * t
    out = samples.to(tl.int64)[:, None] * dim + columns[None, :]
    mask = inside[:, None] & (columns < dim)[None, :]
    tl.store(grad_embeddings_ptr + out, narrow_gradient(grad, grad_embeddings_ptr.dtype.element_ty), mask=mask)

    grad_weights = tl.where(mass > 0, along, 0.0) + grad_mass
    if weights_ptr is not None:
        given = tl.load(weights_ptr + samples.to(tl.int64) * stride_weight, mask=inside, other=0.0)
        grad_weights = tl.where((given >= 0) & (given < float("inf")), grad_weights, 0.0)
    tl.store(grad_weights_ptr + samples, narrow_gradient(grad_weights, grad_weights_ptr.dtype.element_ty), mask=inside)


def aggregate_prototypes(
    embeddings: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool, max_identities: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return prototypes (P, D), identities (P,), index (B,), mass (P,) and ``|m_c|`` (P,), 0 for a zero row."""
    size, dim = embeddings.shape
    dtype, arch = accumulation_dtype(embeddings.dtype), launch.architecture(embeddings.device)
    index = labels.new_empty(size, dtype=torch.int64)
    order = labels.new_empty((2, size), dtype=torch.int32)
    head = labels.new_empty(size, dtype=torch.int8)
    if size > 0:
        how = launch.choose("order of labels", arch, dtype, dim)
        order_kernel[(triton.cdiv(size, how.rows),)](
            labels, labels.stride(0), order[0], order[1], head, index, size, how.rows, how.slots, **how.options(),
        )  # fmt: skip
    rows = int(head.sum()) if max_identities is None else max_identities  # the one documented read-back
    prototypes = embeddings.new_empty((rows, dim), dtype=dtype)
    identities = labels.new_empty(rows, dtype=torch.int64)
    mass, norm = (embeddings.new_empty(rows, dtype=dtype) for _ in range(2))
    if rows > 0:
        how = launch.choose("samples", arch, dtype, dim)
        sum_kernel[(max(size, rows),)](
            embeddings, *embeddings.stride(), labels, labels.stride(0), weights, 0 if weights is None else
            weights.stride(0), order[0], order[1], head, prototypes, identities, index, mass, norm, size, dim, rows,
            normalize, how.slots, how.rows, triton.next_power_of_2(dim), **how.options(),
        )  # fmt: skip
    return prototypes, identities, index, mass, norm


def aggregate_prototypes_backward(
    grad_prototypes: Tensor,
    grad_mass: Tensor,
    embeddings: Tensor,
    weights: Tensor | None,
    index: Tensor,
    prototypes: Tensor,
    mass: Tensor,
    norm: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``embeddings`` (B, D) and of the weights (B,)."""
    size, dim = embeddings.shape
    grad_embeddings = embeddings.new_empty((size, dim))
    grad_weights = (grad_mass if weights is None else weights).new_empty(size)
    if size > 0:
        how = launch.choose("samples", launch.architecture(embeddings.device), prototypes.dtype, dim)
        backward_kernel[(triton.cdiv(size, how.rows),)](
            grad_prototypes, *grad_prototypes.stride(), grad_mass, grad_mass.stride(0), embeddings,
            *embeddings.stride(), weights, 0 if weights is None else weights.stride(0), index, index.stride(0),
            prototypes, *prototypes.stride(), mass, mass.stride(0), norm, norm.stride(0), grad_embeddings,
            grad_weights, size, dim, prototypes.shape[0], normalize, how.rows, triton.next_power_of_2(dim),
            **how.options(),
        )  # fmt: skip
    return grad_embeddings, grad_weights
