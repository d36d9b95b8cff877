"""Whole training steps on a GPU: nothing waits for the host, a CUDA graph captures them, every bit repeats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.gpu.device import DEVICE, captured, each_backend, no_synchronisation, on_a_gpu
from tests.oracles import same

pytestmark = on_a_gpu
B, M, D, IDENTITIES = 48, 150, 64, 200
HEADS: dict[str, dict[str, Any]] = {
    "arcface": {},
    "fresh, norm quality": {"prototype_gradient": "fresh", "quality": pmk.NormQuality()},
    "adaface, curricular, center quality, lru": {
        "margin": pmk.AdaFace(),
        "mining": pmk.CurricularFace(),
        "quality": pmk.CenterQuality(),
        "policy": "lru",
    },
    "magface, mv-softmax": {"margin": pmk.MagFace(), "mining": pmk.MVSoftmax()},
    "hardest negatives": {"mining": pmk.HardestNegatives(5)},
    "noisy negatives, bfloat16 memory": {"mining": pmk.NoisyNegativeFilter(), "dtype": torch.bfloat16},
    "hard samples, softmax quality": {
        "mining": pmk.HardSamples(),
        "quality": pmk.SoftmaxQuality(pmk.NormQuality()),
    },
    "sphereface": {"margin": pmk.SphereFace()},
    "d-softmax": {"margin": pmk.DSoftmax()},
}
each_head = pytest.mark.parametrize("head", HEADS)


def made(head: str) -> pmk.PrototypeMemoryLoss:
    return pmk.PrototypeMemoryLoss(D, M, **copy.deepcopy(HEADS[head])).to(DEVICE)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches on the GPU in which people return, and some samples have no label."""
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(B, D, generator=g).to(DEVICE), torch.randint(-1, IDENTITIES, (B,), generator=g).to(DEVICE))
        for _ in range(count)
    ]


def step(head: pmk.PrototypeMemoryLoss, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the embeddings."""
    leaf = embeddings.detach().requires_grad_()
    loss = head(leaf, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def run(head: pmk.PrototypeMemoryLoss, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [result for batch in data for result in step(head, *batch)]


@each_backend
@each_head
def test_waits_for_nothing_and_repeats_every_bit(backend: str, head: str) -> None:
    data = batches(8)  # past the end of the ring
    with pmk.use_backend(backend):
        first = made(head)
        expected = run(first, data)
        second = made(head)
        with no_synchronisation():
            results = run(second, data)
    assert all(torch.isfinite(result).all() for result in expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    assert same(first.state_dict(), second.state_dict())


@each_backend
@each_head
def test_a_cuda_graph_replays_the_step(backend: str, head: str) -> None:
    data = batches(8)
    with pmk.use_backend(backend):
        eager, graphed = made(head), made(head)
        start = {name: value.clone() for name, value in graphed.state_dict().items()}
        expected = run(eager, data)
        embeddings, labels = (tensor.clone() for tensor in data[0])
        loss, grad = torch.zeros((), device=DEVICE), torch.zeros_like(embeddings)

        def whole_step() -> None:
            for target, result in zip((loss, grad), step(graphed, embeddings, labels), strict=True):
                target.copy_(result)

        replay = captured(whole_step)
        graphed.load_state_dict(start)  # in place: the graph holds the tensors themselves
        results = []
        for batch in data:
            for ours, theirs in zip((embeddings, labels), batch, strict=True):
                ours.copy_(theirs)
            replay()
            results += [loss.clone(), grad.clone()]
    for a, b in zip(expected, results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for name, value in graphed.state_dict().items():
        torch.testing.assert_close(value, eager.state_dict()[name], rtol=1e-6, atol=1e-7, msg=name)
    assert len(eager.memory) == M


@each_backend
def test_the_gpu_and_the_cpu_agree(backend: str) -> None:
    data = batches(8)
    there, here = made("arcface"), made("arcface").cpu()
    with pmk.use_backend(backend):
        results = run(there, data)
    with pmk.use_backend("reference"):
        expected = run(here, [(embeddings.cpu(), labels.cpu()) for embeddings, labels in data])
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    for name in ("identities", "stamps", "cursor", "clock"):
        assert torch.equal(getattr(there.memory, name).cpu(), getattr(here.memory, name)), name
    torch.testing.assert_close(there.memory.prototypes.cpu(), here.memory.prototypes, rtol=1e-4, atol=1e-5)
