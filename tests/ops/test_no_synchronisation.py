"""Nothing on a GPU's path may read a value back to the host. No GPU is needed to see it.

Tensors without data (device "meta") raise at every ``.item()``, ``nonzero``, ``unique``, boolean index or branch on a
value, and take every branch that is not the CPU's: whatever runs through has synchronised nowhere. A copy from the host
synchronises too and raises nowhere; ``NoUploads`` stands guard against those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import protomem_kernels as pmk
from protomem_kernels.backends import reference

B, P, M, D, K = 6, 4, 300, 5, 3
DEVICE = "meta"


class NoUploads(TorchFunctionMode):
    """Refuse what would copy a value of the host, a Python number or a CPU tensor, to the device."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor)
    MOVERS = (Tensor.to, Tensor.type_as, Tensor.copy_)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == DEVICE:
            source = args[-1] if func is Tensor.copy_ or func is Tensor.new_tensor else args[0] if args else None
            on_the_host = not (isinstance(source, Tensor) and source.device.type == DEVICE)
            assert not (func in self.MAKERS + self.MOVERS and on_the_host), f"{func.__name__} copies from the host"
        return result


@pytest.fixture(autouse=True)
def no_uploads() -> Iterator[None]:
    """Have every test of this file run under the guard."""
    with NoUploads():
        yield


def kernel(name: str, *args: object) -> tuple[Tensor, ...]:
    outputs = reference.BACKEND.kernels[name](*args)
    outputs = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    assert all(output.device.type == DEVICE for output in outputs)
    return outputs


def test_the_instrument_notices() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device=DEVICE).sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        kernel(
            "aggregate_prototypes",
            torch.ones(3, 2, device=DEVICE),
            torch.ones(3, device=DEVICE).long(),
            None,
            True,
            None,
        )


def test_the_guard_notices() -> None:
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    for upload in (
        lambda: torch.tensor(0.5, device=DEVICE),
        lambda: torch.as_tensor(0.5, device=DEVICE),
        lambda: there.new_tensor([1.0, 2.0]),
        lambda: here.to(DEVICE),
        lambda: here.to(there),
        lambda: there.copy_(here),
    ):
        with pytest.raises(AssertionError, match="copies from the host"):
            upload()
    there.copy_(there.double()).to(torch.float64)
    torch.as_tensor(there, dtype=torch.float64)
    torch.full((2,), 0.5, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_kernel(dtype: torch.dtype, normalize: bool) -> None:
    accumulated = torch.promote_types(dtype, torch.float32)
    x = torch.randn(B, D, device=DEVICE, dtype=accumulated)
    w = torch.randn(M, D, device=DEVICE, dtype=dtype)
    e = torch.randn(B, D, device=DEVICE, dtype=dtype)
    index = torch.zeros(B, device=DEVICE, dtype=torch.int64)
    row = torch.randn(B, device=DEVICE, dtype=accumulated)
    occupied = torch.zeros(M, device=DEVICE, dtype=torch.bool)
    chosen = torch.zeros(B, K, device=DEVICE, dtype=torch.int64)
    form = torch.randn(3, device=DEVICE, dtype=accumulated)

    made = kernel("aggregate_prototypes", e, index, row, normalize, P)
    prototypes, identities, rows, mass, norm = made
    kernel("aggregate_prototypes_backward", prototypes, mass, e, row, rows, prototypes, mass, norm, normalize)
    for policy in ("fifo", "lru"):
        state = pmk.MemoryState.empty(M, D, dtype=dtype, device=DEVICE)
        kernel("enqueue_", *state, prototypes, identities, 0.2, policy, True)
    for hard in ((None, None), (row, form)):
        for negatives in (None, chosen):
            for offset in (0.0, 3.0, None):
                plain = offset is not None and negatives is None and w.dtype == x.dtype
                keep = B // 2 if plain else 0
                options = occupied, negatives, *hard, 64.0, offset, normalize, True, keep
                _, n, _, _, kept = kernel("negative_logsumexp", x, w, index, *options)
                options = occupied, negatives, *hard, n, 64.0, offset, normalize, keep
                kernel("negative_logsumexp_backward_", kept if keep else w.clone(), row, row, x, w, index, *options)
        (logits,) = kernel("margin_softmax_logits", x, w, index, row, occupied, *hard, 64.0, normalize)
        kernel("margin_softmax_logits_backward", logits, x, w, index, occupied, *hard, 64.0, normalize, True)
    cosines, slots = kernel("hardest_negatives", x, w, index, occupied, K, normalize)
    kernel("hardest_negatives_backward", cosines, x, w, slots, normalize, True)


@pytest.mark.parametrize("mode", ["none", "fresh", "memory"])
@pytest.mark.parametrize(
    ("margin", "mining", "quality"),
    [
        (pmk.ArcFace(), None, None),
        (pmk.AdaFace(), pmk.CurricularFace(), pmk.NormQuality()),
        (pmk.MagFace(), pmk.MVSoftmax(), pmk.CenterQuality()),
        (pmk.ElasticFace(), pmk.HardestNegatives(K), pmk.SoftmaxQuality(pmk.NormQuality())),
        (pmk.SphereFace(), pmk.HardSamples(), pmk.RecognizabilityQuality(D)),
        (pmk.CombinedMargin(1.2), pmk.NoisyNegativeFilter(), None),
        (pmk.DSoftmax(), None, None),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_whole_training_step(mode: str, margin: object, mining: object, quality: object) -> None:
    with torch._C.DisableTorchFunction():  # moving the head to the device happens once
        loss_fn = pmk.PrototypeMemoryLoss(D, M, margin=margin, mining=mining, quality=quality, prototype_gradient=mode)
        loss_fn.to(DEVICE)
    optimizer = torch.optim.SGD([*loss_fn.parameters(), torch.zeros(1, device=DEVICE)], lr=0.1, momentum=0.9)
    if mode == "memory":
        loss_fn.attach_optimizer(optimizer)
    embeddings = torch.randn(B, D, device=DEVICE, requires_grad=True)
    labels = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    loss, stats = loss_fn(embeddings, labels, return_stats=True)
    loss.backward()
    optimizer.step()
    assert loss.device.type == DEVICE
    assert embeddings.grad is not None
    assert stats.hardest_identity.shape == (B,)
    loss_fn.eval()
    loss_fn(embeddings, labels)
