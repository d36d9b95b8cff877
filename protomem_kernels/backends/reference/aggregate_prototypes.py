"""Reference of ``aggregate_prototypes``.

With x_i the embedding of sample i (scaled to unit length first if ``normalize``) and q_i its weight, identity c gets

    m_c = sum over {i: label_i = c} of q_i x_i,      p_c = m_c / |m_c|.

Equal weights stand in where the weights of an identity sum to zero. A row is zero where ``|m_c|`` vanishes against
``sum q_i |x_i|`` or where anything is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels.backends.reference._rows import sum_rows
from protomem_kernels.rows import accumulation_dtype, narrowed, row_lengths, unit_rows

ANTIPODAL = 1e-6  # |m_c| at or below this share of sum q_i |x_i| has no direction worth keeping


def number_identities(labels: Tensor, max_identities: int | None) -> tuple[Tensor, Tensor]:
    """Return the ascending distinct labels >= 0, (P,) int64, and each sample's row among them, (B,) int64 or -1."""
    labels = labels.long()
    ordered, order = labels.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    first &= ordered >= 0
    rank = first.cumsum(0) - 1
    rows = int(first.sum()) if max_identities is None else max_identities  # the sum is the one documented read-back
    rank = torch.where(rank < rows, rank, -1)
    identities = labels.new_full((rows + 1,), -1)  # the last row takes what belongs nowhere
    identities.scatter_(0, torch.where(first & (rank >= 0), rank, rows), ordered)
    index = torch.empty_like(labels).scatter_(0, order, rank)
    return identities[:rows], index


def sample_weights(weights: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (B,) in ``dtype``: 1 if there are none, 0 in place of negative or non-finite ones."""
    if weights is None:
        return torch.ones(index.shape, dtype=dtype, device=index.device)
    weights = weights.to(dtype)
    return torch.where(torch.isfinite(weights) & (weights > 0), weights, 0)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]`` with zeros where the index is -1."""
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return padded[torch.where(index < 0, rows.shape[0], index)]


def aggregate_prototypes(
    embeddings: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool, max_identities: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return prototypes (P, D), identities (P,), index (B,), mass (P,) and ``|m_c|`` (P,), 0 for a zero row."""
    dtype = accumulation_dtype(embeddings.dtype)
    identities, index = number_identities(labels, max_identities)
    rows = identities.shape[0]
    x = embeddings.to(dtype)
    if normalize:
        x = unit_rows(x)

    given = sample_weights(weights, index, dtype)
    mass = sum_rows(given, index, rows)
    q = torch.where(take(mass, index) > 0, given, 1)
    total = sum_rows(q[:, None] * x, index, rows)
    budget = sum_rows(q * row_lengths(x), index, rows)
    norm = row_lengths(total)
    exists = torch.isfinite(total).all(dim=1) & torch.isfinite(norm) & (norm > ANTIPODAL * budget)
    prototypes = torch.where(exists[:, None], unit_rows(total), 0)
    return prototypes, identities, index, mass, torch.where(exists, norm, 0)


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
    """Return the gradients of ``embeddings`` (B, D) and of the weights (B,).

    With u_c = g_c - (g_c . p_c) p_c: dm_c = u_c / |m_c|;  dx_i = q_i dm_c;  dq_i = x_i . u_c / |m_c| + dmass_c,
    in this order, since entries of x_i / |m_c| may leave the range with either sign;
    through the normalisation: de_i = (dx_i - (dx_i . x_i) x_i) / |e_i|. A zero row passes nothing.
    """
    dtype = accumulation_dtype(embeddings.dtype)
    e = embeddings.to(dtype)
    x = unit_rows(e) if normalize else e
    given = sample_weights(weights, index, dtype)
    weighted = take(mass, index) > 0
    q = torch.where(weighted, given, 1)

    along = (grad_prototypes * prototypes).sum(dim=1, keepdim=True)
    across = grad_prototypes - along * prototypes
    total = take(norm, index)[:, None]
    lives = total > 0  # also keeps non-finite embeddings of zero rows out of what follows
    total = torch.where(lives, total, 1)
    x = torch.where(lives, x, 0)
    across = torch.where(lives, take(across, index), 0)
    grad_sum = across / total

    from_sum = (x * across).sum(dim=1) / total[:, 0]
    grad_weights = torch.where(weighted, from_sum, 0) + take(grad_mass, index)
    if weights is not None:
        grad_weights = torch.where(torch.isfinite(weights) & (weights >= 0), grad_weights, 0)
        grad_weights = narrowed(grad_weights, weights.dtype)
    grad = q[:, None] * grad_sum
    if normalize:
        length = row_lengths(e)[:, None]
        grad = grad - (grad * x).sum(dim=1, keepdim=True) * x
        grad = torch.where(lives & (length > 0), grad / torch.where(length > 0, length, 1), 0)
    return narrowed(grad, embeddings.dtype), grad_weights
