"""A memory of more than 2**31 elements: slots at its far end are written, found and differentiated like any other.

All but one row are zero pages that the system never has to provide, so this needs time but little memory.
"""

from __future__ import annotations

import pytest
import torch

import protomem_kernels as pmk
from tests.ops.cases import IN_TRITON, PLACES

D = 512
M = 2**31 // D + 1000
LAST = M - 1


# Not in Triton's interpreter, which would take an hour: there, rows that lie far apart show the same (cases.far_apart).
@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [pytest.param(backend, marks=marks, id=name) for name, (backend, marks) in PLACES.items() if name not in IN_TRITON],
)
def test_past_two_to_the_31_elements(backend: str) -> None:
    state = pmk.MemoryState.empty(M, D, dtype=torch.bfloat16)
    assert state.prototypes.numel() > 2**31
    state.cursor.fill_(LAST)
    x = torch.zeros(2, D)
    x[0, 1] = x[1, 2] = 3.0
    x.requires_grad_()
    with pmk.use_backend(backend):
        slots, _ = pmk.enqueue_(state, x.detach(), torch.tensor([7, 8]))
        assert slots.tolist() == [LAST, 0]  # around the ring's end
        assert int(state.cursor) == 1
        occupied = state.identities >= 0
        cosines, found = pmk.hardest_negatives(x, state.prototypes, k=1, occupied=occupied)
        assert found[:, 0].tolist() == [LAST, 0]
        assert cosines[:, 0].tolist() == [1.0, 1.0]
        loss, stats = pmk.margin_softmax_loss(x, state.prototypes, slots, occupied=occupied, return_stats=True)
    loss.backward()
    assert stats.target_cosine.tolist() == [1.0, 1.0]
    assert stats.negative_logsumexp.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # one other, at cosine 0
    assert torch.isfinite(x.grad).all()
