"""No write goes unseen by autograd: version counters, and gradients after the memory was written over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import protomem_kernels as pmk
from protomem_kernels.backends import reference
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import OPERATORS
from protomem_kernels.backends.protocol import Backend
from protomem_kernels.ops.call import call
from tests.ops.cases import each_backend, interpreted
from tests.ops.test_margin_softmax_loss import dense_loss, inputs
from tests.ops.test_registration import named_calls

OVERWRITTEN = "modified by an inplace operation"
WAYS: dict[str, Callable[..., Any]] = {
    "dispatched": lambda name, *args: getattr(torch.ops.protomem, name).default(*args),
    "direct": call,
}
each_way = pytest.mark.parametrize("way", WAYS)


def versions(args: tuple[Any, ...]) -> list[int | None]:
    return [arg._version if isinstance(arg, Tensor) else None for arg in args]


def assert_seen(name: str, args: tuple[Any, ...], run: Callable[..., Any]) -> None:
    """The versions of what the schema says is written rise, and no others."""
    schema = getattr(torch.ops.protomem, name).default._schema
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    assert any(written) == schema.name.endswith("_")
    before = versions(args)
    with torch.no_grad():
        run(name, *args)
    raised = [one is not None and two > one for one, two in zip(before, versions(args), strict=True)]
    assert raised == written, f"{name}: {before} -> {versions(args)}"


@each_backend
@each_way
def test_every_write_is_seen(backend: str, way: str) -> None:
    seen = set()
    with pmk.use_backend(backend):
        for name, args in named_calls().values():
            if BACKENDS[backend].kernel(name) is not None:
                assert_seen(name, args, WAYS[way])
                seen.add(name)
    assert seen == set(BACKENDS[backend].kernels)


@each_way
@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith("_")])
def test_a_kernel_that_writes_through_pointers_is_seen(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any) -> Any:
        return reference.BACKEND.kernels[name](
            *(torch.from_numpy(arg.detach().numpy()) if isinstance(arg, Tensor) else arg for arg in args)
        )

    monkeypatch.setitem(BACKENDS, "reference", Backend("reference", {name: kernel}))
    args = next(args for operator, args in named_calls().values() if operator == name)
    with pmk.use_backend("reference"):
        assert_seen(name, args, WAYS[way])


def test_a_refused_call_writes_nothing_and_raises_no_version() -> None:
    state = pmk.MemoryState.empty(2, 3)
    before = versions(tuple(state))
    with pytest.raises(ValueError, match="at most 2 rows"):
        pmk.enqueue_(state, torch.eye(3), torch.arange(3))
    assert versions(tuple(state)) == before


def test_a_wrapper_around_tensors_is_seen_too() -> None:
    """What the dispatcher hands to the kernel is not the tensor that was saved: here a fake one, as compilers use."""
    with FakeTensorMode() as fake:
        state = pmk.MemoryState(*(fake.from_tensor(tensor) for tensor in pmk.MemoryState.empty(4, 3)))
        before = versions(tuple(state))
        pmk.enqueue_(state, torch.ones(2, 3), torch.arange(2))
    assert all(two > one for one, two in zip(before, versions(tuple(state)), strict=True))


def test_inference_tensors_have_no_version_and_are_written_all_the_same() -> None:
    with torch.inference_mode():
        state = pmk.MemoryState.empty(4, 3)
        pmk.enqueue_(state, torch.eye(3), torch.arange(3))
    assert state.identities.tolist() == [0, 1, 2, -1]


# What forward keeps suffices for the prototypes' gradient on a CPU where B <= D and all dtypes are one.
CASES = {
    "kept": (4, {}),
    "more samples than columns": (20, {}),
    "bfloat16 memory": (4, {"dtype": torch.bfloat16}),
    "float64 memory": (4, {"dtype": torch.float64}),
    "hardest negatives": (4, {"mining": pmk.HardestNegatives(3)}),
}


def two_steps(case: str) -> tuple[pmk.PrototypeMemoryLoss, list[tuple[Tensor, Tensor]], Tensor]:
    """Return a loss whose prototypes are a parameter, two batches, and the right gradient of their losses' sum."""
    batch, options = CASES[case]
    g = torch.Generator().manual_seed(batch)
    loss_fn = pmk.PrototypeMemoryLoss(8, 30, prototype_gradient="memory", scale=16.0, **options)
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.1)
    loss_fn.attach_optimizer(optimizer)
    batches = [(torch.randn(batch, 8, generator=g), torch.randint(12, (batch,), generator=g)) for _ in range(2)]
    model = copy.deepcopy(loss_fn)
    model._optimizer = optimizer
    with pmk.use_backend("reference"):
        for embeddings, labels in batches:
            model(embeddings, labels).backward()  # before the next one writes
    return loss_fn, batches, model.memory.prototypes.grad


def right_or_refused(prototypes: Tensor, backward: Callable[[], None], truth: Tensor) -> bool:
    """Return whether there is a gradient, which then has to be right."""
    refusal = ""
    try:
        backward()
    except RuntimeError as problem:
        refusal = str(problem)
    if refusal:
        assert OVERWRITTEN in refusal
        return False
    error = (prototypes.grad - truth).norm() / truth.norm()
    assert error < (2e-2 if prototypes.dtype == torch.bfloat16 else 1e-4)
    return True


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_two_forward_passes_before_backward(backend: str, case: str) -> None:
    loss_fn, batches, truth = two_steps(case)
    with pmk.use_backend(backend):
        total = sum(loss_fn(*batch) for batch in batches)
        right = right_or_refused(loss_fn.memory.prototypes, total.backward, truth)
    assert right == (case == "kept" and backend in ("cpu", "reference"))


@pytest.mark.no_cover
@pytest.mark.parametrize("together", [False, True], ids=["two calls", "one graph"])
def test_two_compiled_forward_passes_before_backward(together: bool) -> None:
    loss_fn, batches, truth = two_steps("more samples than columns")
    torch.compiler.reset()
    if together:
        total_of = torch.compile(lambda *batches: sum(loss_fn(*batch) for batch in batches), backend="aot_eager")
    else:
        compiled = torch.compile(loss_fn, backend="aot_eager")
        total_of = lambda *batches: sum(compiled(*batch) for batch in batches)  # noqa: E731
    right_or_refused(loss_fn.memory.prototypes, lambda: total_of(*batches).backward(), truth)


@each_backend
@pytest.mark.parametrize("case", ["kept", "more samples than columns"])
def test_an_update_between_forward_and_backward(backend: str, case: str) -> None:
    loss_fn, (batch, other), _ = two_steps(case)
    with pmk.use_backend(backend):
        loss = loss_fn(*batch)
        (truth,) = torch.autograd.grad(loss, loss_fn.memory.prototypes, retain_graph=True)
        loss_fn.memory.update(*other)
        right = right_or_refused(loss_fn.memory.prototypes, loss.backward, truth)
    assert right == (case == "kept" and backend in ("cpu", "reference"))


def forgetful(name: str) -> Backend:
    """Return the reference with a backward pass that forms the exponentials again, whatever forward kept."""
    kernels = dict(reference.BACKEND.kernels)
    backward = kernels["negative_logsumexp_backward_"]
    kernels["negative_logsumexp_backward_"] = lambda *args: backward(*args[:-1], 0)
    return Backend(name, kernels)


@pytest.mark.parametrize("served_by_another", [False, True])
@each_backend
def test_what_was_kept_outlives_the_prototypes(
    backend: str, served_by_another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three backward passes after a write, with a broken embedding and a second derivative among them."""
    x, w, targets, occupied = inputs((8, 60, 8))
    x[2, 1] = float("nan")
    x.requires_grad_()
    leaf = w.clone().requires_grad_()
    # A target beside the occupied slots counts; a target < 0 does not.
    targets[0], targets[1] = int((~occupied).int().argmax()), -1
    upstream = torch.rand(8, dtype=torch.float64)
    with pmk.use_backend("reference"):
        losses = pmk.margin_softmax_loss(x, leaf, targets, occupied=occupied, reduction="none", scale=16.0)
    sound = torch.ones(8, dtype=torch.bool).index_fill_(0, torch.tensor([2]), False)
    dense = dense_loss(x[sound], leaf, targets[sound], occupied=occupied, scale=16.0)
    truth = torch.autograd.grad((dense * upstream[sound]).sum(), (x, leaf))
    with torch.no_grad():
        leaf.mul_(-3)
    if served_by_another:
        monkeypatch.setitem(BACKENDS, backend, forgetful(backend))
    total = (losses[sound] * upstream[sound]).sum()
    with pmk.use_backend(backend):
        for options in ({"retain_graph": True}, {"create_graph": True}, {}):
            gradients = torch.autograd.grad(total, (x, leaf), **options)
            for ours, expected in zip(gradients, truth, strict=True):
                rows = sound if ours.shape == x.shape else slice(None)  # a broken embedding's own gradient is anything
                torch.testing.assert_close(ours.detach()[rows], expected[rows], rtol=1e-6, atol=1e-9)
            if "create_graph" in options:
                with pytest.raises(RuntimeError, match="can be differentiated once"):
                    torch.autograd.grad(gradients[0].sum(), leaf, retain_graph=True)


@each_backend
def test_a_scaled_memory_is_needed_whatever_was_kept(backend: str) -> None:
    x, w, targets, _ = inputs((4, 30, 8))
    w.requires_grad_()
    with pmk.use_backend(backend):
        loss = pmk.margin_softmax_loss(x, w, targets, normalize_prototypes=True)
        with torch.no_grad():
            w.mul_(2)
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            loss.backward()


@each_backend
def test_backward_that_reads_the_memory_says_that_it_was_written(backend: str) -> None:
    state = pmk.MemoryState.empty(6, 4)
    batch = torch.randn(3, 4)
    with pmk.use_backend(backend):
        for function in (
            lambda x: pmk.hardest_negatives(x, state.prototypes, k=2).cosines,
            lambda x: pmk.margin_softmax_logits(x, state.prototypes, torch.zeros(3, dtype=torch.int64)),
        ):
            value = function(batch.clone().requires_grad_()).sum()
            pmk.enqueue_(state, batch, torch.arange(3))
            with pytest.raises(RuntimeError, match=OVERWRITTEN):
                value.backward()


@each_backend
def test_a_memory_that_is_a_buffer_may_be_written_before_backward(backend: str) -> None:
    """Gradients of embeddings alone need no prototype: "none" and "fresh" take any number of forward passes."""
    size = 6 if interpreted(backend) else 30
    for mode in ("none", "fresh"):
        results = []
        for at_once in (True, False):
            loss_fn = pmk.PrototypeMemoryLoss(8, 40, prototype_gradient=mode, scale=16.0)
            g = torch.Generator().manual_seed(3)
            leaves = [torch.randn(size, 8, generator=g).requires_grad_() for _ in range(2)]
            with pmk.use_backend(backend):
                losses = []
                for leaf in leaves:
                    losses.append(loss_fn(leaf, torch.arange(size) % 5))
                    if not at_once:
                        losses[-1].backward()
                if at_once:
                    sum(losses).backward()
            results.append([leaf.grad for leaf in leaves])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
