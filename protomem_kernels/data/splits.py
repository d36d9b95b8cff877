"""Identities kept apart: those that train, those that choose among settings, those that are asked once at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protomem_kernels._checks import as_labels, check_number

__all__ = ["split_by_identity"]


def split_by_identity(labels: Tensor, parts: Sequence[float] = (0.6, 0.2, 0.2), *, seed: int = 0) -> list[Tensor]:
    """Share identities out by chance, each with all of its images, to parts of given size.

    Args:
        labels: (N,) integers, the identity of each image; a tensor, an array or a list.
        parts: the share of each part in the identities. They are positive and sum to 1.
        seed: of the chance. One seed gives the same identities to the same parts, however many images each has.

    Returns:
        For each part the positions of its images, ascending: int64 tensors, disjoint, N in all.

    Raises:
        TypeError, ValueError: labels that are no (N,) integers, parts that do not sum to 1, or a part that would get no
            identity.

    Example:
        >>> train, validation, test = split_by_identity(torch.arange(10).repeat_interleave(3), seed=1)
        >>> [len(part) for part in (train, validation, test)]
        [18, 6, 6]

    """
    labels = as_labels("labels", labels, "(N,)").cpu()
    for number, part in enumerate(parts):
        check_number(f"parts[{number}]", part, low=0, high=1, open_low=True)
    if abs(sum(parts) - 1) > 1e-6:
        raise ValueError(f"parts must sum to 1, got {sum(parts):g}")
    identities, rows = torch.unique(labels, return_inverse=True)
    ends = (torch.tensor(parts, dtype=torch.float64).cumsum(0) * len(identities)).round().long()
    if bool((ends.diff(prepend=torch.zeros(1, dtype=torch.int64)) == 0).any()):
        raise ValueError(f"parts must each hold an identity, got {len(identities)} identities for {tuple(parts)}")
    order = torch.randperm(len(identities), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    part_of = torch.bucketize(place, ends, right=True)[rows]
    return [torch.nonzero(part_of == number).flatten() for number in range(len(parts))]
