"""Which triangle each pixel sees: a z-buffer for batches of small meshes, in plain PyTorch.

Every triangle is looked at in the pixels of its bounding box alone, all triangles of all meshes side by side, so that
the work follows the pixels covered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEPTHS = 2**30  # how many depths are told apart
NOTHING = 2**63 - 1


class Seen(NamedTuple):
    """The pixels that see a triangle: P of all B * H * W.

    Attributes:
        pixels: (P,) int64, ascending, places in the flattened (B, H, W).
        triangles: (P,) int64, the triangle that is nearest.
        weights: (P, 3) floating, of its three vertices at the pixel's middle; they sum to 1.
    """

    pixels: Tensor
    triangles: Tensor
    weights: Tensor


def seen(vertices: Tensor, triangles: Tensor, size: int) -> Seen:
    """Find the nearest front face at the middle of each pixel. Deterministic; of two at the same depth, the first.

    Args:
        vertices: (B, V, 3) floating: x to the right and y down, in pixels; z grows towards the viewer.
        triangles: (T, 3) int64, vertices counter-clockwise as the viewer sees them.
        size: height and width of the images in pixels.

    Example:
        >>> square = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 4.0, 0.0], [3.0, 4.0, 0.0], [3.0, 1.0, 0.0]]])
        >>> hit = seen(square, torch.tensor([[0, 1, 2], [0, 2, 3]]), 4)
        >>> hit.pixels.tolist(), hit.triangles.tolist()
        ([5, 6, 9, 10, 13, 14], [1, 1, 0, 1, 0, 0])

    """
    corners = vertices[:, triangles]  # (B, T, 3 vertices, 3)
    area = _cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    mesh, triangle = torch.nonzero(area < 0, as_tuple=True)  # the others show their back
    corners, area = corners[mesh, triangle], area[mesh, triangle]
    low = (corners[:, :, :2].amin(1) - 0.5).ceil().clamp(min=0).long()
    high = (corners[:, :, :2].amax(1) - 0.5).floor().clamp(max=size - 1).long()
    width, height = (high - low + 1).clamp(min=0).unbind(1)
    counts = width * height
    owner = torch.repeat_interleave(counts)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    x, y = low[owner, 0] + place % width[owner], low[owner, 1] + place // width[owner]
    away = corners[owner]  # (fragments, 3 vertices, 3)
    depths = away[:, :, 2]
    away = away[:, :, :2] - torch.stack([x, y], 1)[:, None] - 0.5
    weights = torch.stack([_cross(away[:, 1], away[:, 2]), _cross(away[:, 2], away[:, 0])], 1) / area[owner, None]
    weights = torch.cat([weights, 1 - weights.sum(1, keepdim=True)], 1)
    inside = (weights >= 0).all(1).nonzero().flatten()
    weights, owner = weights[inside], owner[inside]
    pixel = (mesh[owner] * size + y[inside]) * size + x[inside]
    best = _nearest(pixel, (weights * depths[inside]).sum(1), len(vertices) * size * size)
    hit = (best != NOTHING).nonzero().flatten()
    won = best[hit]
    return Seen(hit, triangle[owner[won]], weights[won])


def _nearest(pixel: Tensor, depth: Tensor, pixels: int) -> Tensor:
    """Return for each pixel the place of its fragment of the largest depth, of equal ones the first, or NOTHING."""
    low, high = depth.aminmax() if len(depth) else (depth.new_zeros(()), depth.new_ones(()))
    behind = ((high - depth) / (high - low).clamp(min=1e-30) * DEPTHS).long()
    ordered = (behind << 32) + torch.arange(len(depth))  # by depth, then by place: the smallest one wins
    best = torch.full((pixels,), NOTHING).scatter_reduce_(0, pixel, ordered, "amin")
    return torch.where(best == NOTHING, NOTHING, best & 0xFFFFFFFF)


def _cross(one: Tensor, other: Tensor) -> Tensor:
    return one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]
