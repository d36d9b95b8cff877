"""Every operator on a GPU: no wait for the host, the same bits every time, and the error that its dtype allows.

What an operator must compute is in tests/ops, which runs on the GPU too; here are the sizes that the launch table is
made for, and what a CPU cannot show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.gpu.device import DEVICE, each_backend, no_synchronisation, on_a_gpu
from tests.ops.cases import assert_as_close_as, unit
from tests.ops.dense import dense_logits, dense_loss

pytestmark = on_a_gpu
B, M, D, K, P = 200, 5000, 160, 8, 100  # no multiples of a tile but D, which the aligned kernels get
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
Call = Callable[[], list[Tensor]]


class Batch:
    """Seeded inputs on the GPU; unit prototypes, some empty slots, some ignored samples."""

    def __init__(self, dtype: torch.dtype, size: tuple[int, int, int] = (B, M, D)) -> None:
        batch, capacity, dim = size
        g = torch.Generator().manual_seed(1)
        self.x = (3 * torch.randn(batch, dim, generator=g)).to(DEVICE, dtype)
        self.w = unit(torch.randn(capacity, dim, generator=g)).to(DEVICE, dtype)
        self.targets = torch.randint(-1, capacity, (batch,), generator=g).to(DEVICE)
        self.labels = torch.randint(-1, P, (batch,), generator=g).to(DEVICE)
        self.weights = torch.rand(batch, generator=g).to(DEVICE)
        self.occupied = (torch.rand(capacity, generator=g) < 0.75).to(DEVICE)
        self.upstream = torch.rand(batch, generator=g).to(DEVICE)


def with_gradients(outputs: tuple[Tensor, ...], *leaves: Tensor) -> list[Tensor]:
    """Return the outputs and the gradients of the first, for an upstream gradient of ones."""
    grads = torch.autograd.grad(outputs[0], leaves, torch.ones_like(outputs[0]))
    return [output.detach() for output in outputs] + list(grads)


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def aggregate(batch: Batch) -> list[Tensor]:
    x, q = leaves_of(batch.x, batch.weights)
    return with_gradients(pmk.aggregate_prototypes(x, batch.labels, q, max_identities=B), x, q)


def enqueue(batch: Batch, policy: str) -> list[Tensor]:
    state = pmk.MemoryState.empty(M, D, dtype=batch.x.dtype, device=DEVICE)
    rows = torch.nn.functional.normalize(batch.x.float())
    results: list[Tensor] = []
    for call in range(3):  # in part known, in part new, round the ring
        identities = torch.arange(B, device=DEVICE) + 40 * call
        results += pmk.enqueue_(state, rows, identities, policy=policy)
    return [*results, *state]


def loss(batch: Batch, mining: object = None, normalize: bool = False) -> list[Tensor]:
    x, w = leaves_of(batch.x, batch.w)
    made = pmk.margin_softmax_loss(
        x,
        w,
        batch.targets,
        occupied=batch.occupied,
        mining=mining,
        normalize_prototypes=normalize,
        reduction="none",
        return_stats=True,
    )
    return with_gradients((made[0], *made[1]), x, w)


def logits(batch: Batch) -> list[Tensor]:
    x, w = leaves_of(batch.x, batch.w)
    made = pmk.margin_softmax_logits(x, w, batch.targets, occupied=batch.occupied)
    return with_gradients((torch.where(torch.isfinite(made), made, 0),), x, w)


def hardest(batch: Batch) -> list[Tensor]:
    x, w = leaves_of(batch.x, batch.w)
    return with_gradients(tuple(pmk.hardest_negatives(x, w, batch.targets, k=K, occupied=batch.occupied)), x, w)


OPERATORS: dict[str, Callable[[Batch], list[Tensor]]] = {
    "aggregate_prototypes": aggregate,
    "enqueue_ fifo": lambda batch: enqueue(batch, "fifo"),
    "enqueue_ lru": lambda batch: enqueue(batch, "lru"),
    "margin_softmax_loss": loss,
    "margin_softmax_loss, normalized": lambda batch: loss(batch, normalize=True),
    "margin_softmax_loss, hard form": lambda batch: loss(batch, pmk.MVSoftmax()),
    "margin_softmax_loss, hardest": lambda batch: loss(batch, pmk.HardestNegatives(K)),
    "margin_softmax_logits": logits,
    "hardest_negatives": hardest,
}


@each_backend
@each_dtype
@pytest.mark.parametrize("name", OPERATORS)
def test_waits_for_nothing_and_repeats_every_bit(backend: str, dtype: torch.dtype, name: str) -> None:
    batch, operator = Batch(dtype), OPERATORS[name]
    with pmk.use_backend(backend):
        first = operator(batch)  # compiles
        with no_synchronisation():
            others = [operator(batch) for _ in range(3)]
    for other in others:
        for place, (a, b) in enumerate(zip(first, other, strict=True)):
            assert torch.equal(a, b), f"output {place}"


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [(64, 3000, 128), (300, 20_011, 512), (33, 1000, 100)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_as_close_to_float64_as_its_dtype_allows(
    backend: str, dtype: torch.dtype, size: tuple[int, int, int], normalize: bool
) -> None:
    batch = Batch(dtype, size)
    results = {}
    for name, kind in (("truth", torch.float64), ("peer", torch.float32)):  # on the CPU, where float32 is float32
        x, w = leaves_of(batch.x.cpu().to(kind), batch.w.cpu().to(kind))
        options = {"occupied": batch.occupied.cpu(), "normalize_prototypes": normalize}
        losses = dense_loss(x, w, batch.targets.cpu(), **options)
        losses.backward(batch.upstream.cpu().to(kind))
        results[name] = [losses.detach(), x.grad.to(dtype) if name == "peer" else x.grad]
        results[name].append(w.grad.to(dtype) if name == "peer" else w.grad)
    x, w = leaves_of(batch.x, batch.w)
    with pmk.use_backend(backend):
        losses = pmk.margin_softmax_loss(
            x, w, batch.targets, occupied=batch.occupied, normalize_prototypes=normalize, reduction="none"
        )
        losses.backward(batch.upstream)
    for ours, peer, truth in zip([losses.detach(), x.grad, w.grad], results["peer"], results["truth"], strict=True):
        assert ours.is_cuda or DEVICE == "cpu"
        assert_as_close_as(ours.cpu(), peer, truth, tiny=1e-5)  # tf32x3 leaves 2^-21 of each product


@each_backend
def test_logits_and_hardest_negatives_at_the_size_of_the_table(backend: str) -> None:
    batch = Batch(torch.float32, (130, 10_007, 512))
    x, w, targets, occupied = (t.cpu() for t in (batch.x, batch.w, batch.targets, batch.occupied))
    truth = dense_logits(x.double(), w.double(), targets, occupied=occupied)
    with pmk.use_backend(backend):
        ours = pmk.margin_softmax_logits(batch.x, batch.w, batch.targets, occupied=batch.occupied).cpu()
        found = pmk.hardest_negatives(batch.x, batch.w, batch.targets, k=64, occupied=batch.occupied)
    peer = dense_logits(x, w, targets, occupied=occupied)
    assert_as_close_as(ours, peer, truth, tiny=1e-5)
    cosine = unit(x.double()) @ w.double().T
    allowed = occupied & (torch.arange(w.shape[0]) != targets[:, None])
    best = torch.where(allowed, cosine, -torch.inf).topk(64, dim=1).values
    torch.testing.assert_close(found.cosines.cpu().double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(cosine.gather(1, found.slots.cpu()), best, rtol=0, atol=1e-5)
    assert allowed.gather(1, found.slots.cpu()).all()
    assert all(len(set(row)) == 64 for row in found.slots.tolist())
