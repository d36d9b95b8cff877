"""How the memory is cut into splits."""

from __future__ import annotations

import pytest

from protomem_kernels.backends import triton
from protomem_kernels.backends.triton import launch

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
]


def test_splits_cover_the_memory_and_fill_the_device() -> None:
    for capacity in (0, 1, 31, 32, 33, 1000, 100_000):
        for blocks in (1, 2, 8, 94, 200):
            splits, size = launch.split(capacity, 32, blocks, 132)
            assert size % 32 == 0
            assert (splits - 1) * size < max(capacity, 1) <= splits * size
    for blocks in (1, 2, 8, 94, 200):
        splits, _ = launch.split(1_000_000, 32, blocks, 132)
        programs = splits * blocks
        assert programs / (-(-programs // 132) * 132) >= 0.9
