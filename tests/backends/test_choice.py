"""``use_backend`` and threads: which of them a block holds for, and that a block's backward passes are served by it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels.backends import reference
from protomem_kernels.backends.choice import BACKENDS, in_force
from protomem_kernels.backends.protocol import Backend

Served = list[tuple[str, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """Backends "cpu" and "reference" that note which operators they serve."""
    log: Served = []

    def noting(backend: str, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            log.append((backend, name))
            return kernel(*args)

        return call

    for backend in ("cpu", "reference"):
        kernels = {name: noting(backend, name, kernel) for name, kernel in reference.BACKEND.kernels.items()}
        monkeypatch.setitem(BACKENDS, backend, Backend(backend, kernels))
    return log


def loss() -> Tensor:
    x, w = torch.randn(3, 4).requires_grad_(), torch.eye(4).requires_grad_()
    return pmk.margin_softmax_loss(x, w, torch.arange(3))


def in_thread(function: Callable[[], Any]) -> Any:
    """Return what the function returns in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_started_within_the_block_has_its_own(served: Served) -> None:
    def nested() -> str | None:
        with pmk.use_backend("cpu"):
            return in_force()

    with pmk.use_backend("reference"):
        assert in_thread(in_force) is None
        assert in_thread(nested) == "cpu"
        assert in_thread(lambda: contextvars.copy_context()) is not None
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(in_force)) == "reference"
        assert in_force() == "reference"
    assert in_force() is None


def test_tasks_made_within_the_block_have_it_and_leave_others_alone() -> None:
    async def asks(within: bool) -> tuple[str | None, str | None]:
        if not within:
            await asyncio.sleep(0)  # while the other task is within its block
            return in_force(), None
        with pmk.use_backend("reference"):
            made = asyncio.create_task(asyncio.to_thread(in_force))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return in_force(), await made

    async def both() -> list[tuple[str | None, str | None]]:
        return await asyncio.gather(asks(True), asks(False))

    assert asyncio.run(both()) == [("reference", "reference"), (None, None)]


@pytest.mark.parametrize("past_the_dispatcher", [True, False])
def test_backward_after_the_block_is_served_as_forward_was(
    served: Served, past_the_dispatcher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not past_the_dispatcher:
        monkeypatch.setattr("protomem_kernels.ops.call.is_watched", lambda args: True)
    with pmk.use_backend("reference"):
        computed = loss()
    in_thread(lambda: computed.backward())
    assert ("reference", "negative_logsumexp_backward_") in served
    assert {backend for backend, _ in served} == {"reference"}


def test_a_block_around_backward_goes_before_that_of_forward(served: Served) -> None:
    with pmk.use_backend("reference"):
        computed = loss()
    with pmk.use_backend("cpu"):
        computed.backward()
    assert ("cpu", "negative_logsumexp_backward_") in served


class Deep(torch.autograd.Function):
    """A backward pass within a backward pass, so deep that autograd goes on in a thread of its own, as on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, innermost: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.innermost = depth, innermost
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            if ctx.depth:
                x = torch.zeros((), requires_grad=True)
                Deep.apply(x, ctx.depth - 1, ctx.innermost).backward()
            else:
                ctx.innermost()
        return grad, None, None


@pytest.mark.parametrize("within", [False, True], ids=["forward in the block", "backward in the block"])
def test_the_threads_of_autograd(served: Served, within: bool) -> None:
    threads = []

    def innermost() -> None:
        threads.append(threading.get_ident())
        computed.backward()

    start = Deep.apply(torch.zeros((), requires_grad=True), 70, innermost)
    if within:
        computed = loss()
        served.clear()
        with pmk.use_backend("reference"):
            start.backward()
    else:
        with pmk.use_backend("reference"):
            computed = loss()
        start.backward()
    assert threads[0] != threading.get_ident()
    assert ("reference", "negative_logsumexp_backward_") in served
    assert {backend for backend, _ in served} == {"reference"}
