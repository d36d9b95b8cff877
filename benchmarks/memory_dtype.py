"""How far a 16-bit memory drifts from a float32 one: the same identities refreshed by the same images, step by step.

    python -m benchmarks.memory_dtype

Each identity has a direction; each of its images is that direction with noise of the given length beside it. A row is
refreshed and rounded once per step, so that rounding adds up only as far as refreshing forgets.
"""

from __future__ import annotations

import torch

from protomem_kernels import PrototypeMemory


def drift(dtype: torch.dtype, ratio: float, *, refreshes: int, noise: float, identities: int, dim: int) -> torch.Tensor:
    """Return 1 - cosine between the rows of a memory in ``dtype`` and of one in float32 (identities,), at the end."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(identities, dim, generator=generator))
    memories = [PrototypeMemory(identities, dim, refresh_ratio=ratio, dtype=d) for d in (torch.float32, dtype)]
    labels = torch.arange(identities)
    for _ in range(refreshes):
        images = directions + noise * torch.randn(identities, dim, generator=generator) / dim**0.5
        for memory in memories:
            memory.update(images, labels)
    exact, rounded = (torch.nn.functional.normalize(m.prototypes_of(labels).double()) for m in memories)
    return 1 - (exact * rounded).sum(dim=1)


def main() -> None:
    """Print the table of docs/migrating.md."""
    print("| dtype | refresh ratio | after 10 refreshes: mean, largest | after 300 |\n|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for ratio in (0.5, 0.2, 0.05, 0.01):
            cells = []
            for refreshes in (10, 300):
                found = drift(dtype, ratio, refreshes=refreshes, noise=1.0, identities=500, dim=512)
                cells.append(f"{found.mean():.1e}, {found.max():.1e}")
            print(f"| {str(dtype).removeprefix('torch.')} | {ratio:g} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
