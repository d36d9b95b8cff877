"""The z-buffer against a loop over all pixels and triangles."""

import numpy as np
import pytest
import torch

from protomem_kernels.data.rasterizer import seen


def loop(vertices: np.ndarray, triangles: np.ndarray, size: int) -> np.ndarray:
    """Return for each pixel of each mesh the nearest triangle, or -1."""
    found = np.full((len(vertices), size, size), -1)
    for mesh, points in enumerate(vertices):
        for y in range(size):
            for x in range(size):
                best = -np.inf
                for number, corners in enumerate(points[triangles]):
                    matrix = np.vstack([corners[:, :2].T, np.ones(3)])
                    if np.linalg.det(matrix) >= 0:  # clockwise where y points up: its back
                        continue
                    weights = np.linalg.solve(matrix, [x + 0.5, y + 0.5, 1])
                    depth = weights @ corners[:, 2]
                    if (weights >= 0).all() and depth > best:
                        best, found[mesh, y, x] = depth, number
    return found


@pytest.mark.parametrize("seed", range(3))
def test_random_triangles(seed):
    random, size = np.random.default_rng(seed), 9
    vertices = random.uniform(-4, 13, (2, 12, 3))
    triangles = np.stack([random.permutation(12)[:3] for _ in range(14)])
    hit = seen(torch.from_numpy(vertices), torch.from_numpy(triangles), size)
    found = torch.full((2 * size * size,), -1)
    found[hit.pixels] = hit.triangles
    expected = loop(vertices, triangles, size)
    assert (found.view(2, size, size).numpy() == expected).all()
    assert (expected >= 0).sum() > 30
    assert torch.equal(hit.pixels, hit.pixels.unique())
    mesh, y, x = np.unravel_index(hit.pixels.numpy(), (2, size, size))
    corners = vertices[mesh[:, None], triangles[hit.triangles.numpy()]]
    middles = (hit.weights[:, :, None].numpy() * corners[:, :, :2]).sum(1)
    np.testing.assert_allclose(middles, np.stack([x + 0.5, y + 0.5], 1), atol=1e-9)
    torch.testing.assert_close(hit.weights.sum(1), torch.ones(len(hit.weights), dtype=torch.float64))


def test_the_first_of_two_at_one_depth_and_nothing_at_all():
    corners = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 8.0, 1.0], [8.0, 0.0, 1.0]]])
    twice = seen(corners, torch.tensor([[0, 1, 2], [0, 1, 2]]), 4)
    assert twice.triangles.tolist() == [0] * 16
    assert len(seen(corners, torch.tensor([[0, 2, 1]]), 4).pixels) == 0  # its back
    assert len(seen(corners + 100, torch.tensor([[0, 1, 2]]), 4).pixels) == 0  # outside
    assert len(seen(corners, torch.empty(0, 3, dtype=torch.int64), 4).pixels) == 0
