"""What PyTorch sees of every operator: schema, fake kernel, autograd, compilation, dispatch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import protomem_kernels as pmk
from protomem_kernels.backends import reference
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import OPERATORS
from protomem_kernels.backends.protocol import Backend
from protomem_kernels.ops.register import values_can_be_read
from tests.ops.cases import each_backend
from tests.ops.test_margin_softmax_loss import inputs


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Arguments for every registered operator: plain, with every option, and for the backward ones."""
    x, w, targets, occupied = inputs((5, 40, 4))
    x = (x / x.norm(dim=1, keepdim=True)).requires_grad_()
    w = w.requires_grad_()
    tau, form = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.tensor([1.2, 0.2, 0.5], dtype=torch.float64)
    chosen = torch.tensor([[0, 3, -1]] * 5)
    g = torch.ones(5, dtype=torch.float64)
    labels = torch.tensor([3, 1, -1, 3, 7])
    e, q = torch.randn(5, 4, requires_grad=True), torch.rand(5, requires_grad=True)

    yield "negative_logsumexp", "plain", (x, w, targets, None, None, None, None, 8.0, 0.0, False, True, 0)
    yield "negative_logsumexp", "full", (x, w, targets, occupied, None, tau, form, 8.0, None, True, True, 0)
    yield "negative_logsumexp", "chosen", (x, w, targets, occupied, chosen, None, None, 8.0, 0.0, True, True, 0)
    inside = x.detach(), w.detach(), targets
    yield "negative_logsumexp", "no gradient", (*inside, None, None, None, None, 8.0, 0.0, False, False, 0)
    backward = g, g, *inside, occupied, None, tau, form, g, 8.0, 1.0, True
    yield "negative_logsumexp_backward_", "", (torch.empty(40, 4, dtype=torch.float64), *backward, 0)
    yield "negative_logsumexp_backward_", "kept", (torch.rand(40, 4, dtype=torch.float64), *backward, 3)
    yield "hardest_negatives", "plain", (x, w, targets, occupied, 3, False)
    yield "hardest_negatives", "normalized", (x, w, targets, None, 3, True)
    yield "hardest_negatives_backward", "", (g[:, None].expand(5, 3), *inside[:2], chosen, True, True)
    yield "hardest_negatives_backward", "x", (g[:, None].expand(5, 3), *inside[:2], chosen, False, False)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    yield "margin_softmax_logits", "", (x, w, targets, z, occupied, tau, form, 8.0, True)
    upstream = torch.ones(5, 40, dtype=torch.float64)
    yield "margin_softmax_logits_backward", "", (upstream, *inside, occupied, tau, form, 8.0, True, True)
    yield "margin_softmax_logits_backward", "x", (upstream, *inside, None, None, None, 8.0, False, False)
    yield "aggregate_prototypes", "dynamic", (e, labels, q, True, None)
    yield "aggregate_prototypes", "fixed", (e, labels, None, False, 4)
    made = reference.BACKEND.kernels["aggregate_prototypes"](e.detach(), labels, q.detach(), True, 4)
    prototypes, _, index, mass, norm = made
    yield (
        "aggregate_prototypes_backward",
        "",
        (prototypes, mass, e.detach(), q.detach(), index, prototypes, mass, norm, True),
    )
    yield (
        "aggregate_prototypes_backward",
        "unweighted",
        (prototypes, mass, e.detach(), None, index, prototypes, mass, norm, True),
    )
    index, slots = torch.tensor([0, 1, -1, 0, 2]), torch.tensor([3, -1, 17])
    yield "prepare_samples", "", (e, labels, index, slots, 40)
    rows, norm, _ = reference.BACKEND.kernels["prepare_samples"](e.detach(), labels, index, slots, 40)
    yield "prepare_samples_backward", "", (rows.roll(1, 0), e.detach(), rows, norm)
    c, n = (torch.linspace(-0.9, 0.9, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    for kind in ("angle", "unguarded angle", "cosine"):
        yield "reduce_losses", kind, (c, n, targets, 40, kind, 0.5, 8.0, kind == "angle")
    for policy in ("fifo", "lru"):
        state = pmk.MemoryState.empty(6, 4)
        yield "enqueue_", policy, (*state, torch.randn(3, 4), torch.tensor([4, -1, 9]), 0.2, policy, policy == "lru")


def named_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    return {f"{name} {variant}".strip(): (name, args) for name, variant, args in calls()}


CALLS = [*named_calls()]


def test_every_operator_is_checked() -> None:
    assert {name for name, _ in named_calls().values()} == set(OPERATORS)


@each_backend
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # opcheck's own
def test_opcheck(backend: str, call: str) -> None:
    name, args = named_calls()[call]  # made anew: on the GPU, where the test runs there
    if BACKENDS[backend].kernel(name) is None:
        pytest.skip(f"{backend} has no kernel for it: tests/ops/test_another_operator.py")
    with pmk.use_backend(backend):
        result = torch.library.opcheck(getattr(torch.ops.protomem, name).default, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.no_cover
@each_backend
@pytest.mark.parametrize(
    ("mining", "compiler"),
    [  # the real compiler takes 10 s a case; tracing and autograd are the same without its code generation
        (None, "inductor"),
        (pmk.HardestNegatives(3), "aot_eager"),
        (pmk.MVSoftmax(), "aot_eager"),
        (pmk.HardSamples(0.5), "aot_eager"),
    ],
)
def test_compiled_loss_equals_eager(backend: str, mining: object, compiler: str) -> None:
    x, w, targets, occupied = inputs((6, 50, 4), torch.float32)
    targets[2] = -1

    def call(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return pmk.margin_softmax_loss(x, w, targets, occupied=occupied, mining=mining, scale=16.0)

    results = []
    torch.compiler.reset()
    for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
        with pmk.use_backend(backend):
            loss = function(xx, ww, targets)
            loss.backward()
        results.append((loss.detach(), xx.grad, ww.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.no_cover
@each_backend
def test_compiled_operators_equal_eager(backend: str) -> None:
    x, w, targets, occupied = inputs((6, 50, 4), torch.float32)
    labels = torch.tensor([5, -1, 5, 2, 2, 9])

    def call(x: Tensor, w: Tensor, state: pmk.MemoryState) -> tuple[Tensor, ...]:
        made = pmk.aggregate_prototypes(x, labels, max_identities=6)
        written = pmk.enqueue_(state, made.prototypes, made.identities)
        found = pmk.hardest_negatives(x, w, targets, k=2, occupied=occupied)
        logits = pmk.margin_softmax_logits(x, w, targets, occupied=occupied)
        return (*made, *written, *found, torch.where(torch.isfinite(logits), logits, 0))

    results = []
    torch.compiler.reset()
    for function in (call, torch.compile(call, fullgraph=True)):
        xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
        state = pmk.MemoryState.empty(7, 4)
        with pmk.use_backend(backend):
            outputs = function(xx, ww, state)
            (outputs[0].sum() + outputs[6].sum() + outputs[8].sum()).backward()
        results.append((*(t.detach() for t in outputs), xx.grad, ww.grad, *state))
    assert results[0][4].any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_explain_names_every_backend_and_a_reason() -> None:
    choices = pmk.explain("margin_softmax_loss", torch.zeros(2, 2))
    assert [choice.backend for choice in choices] == ["triton", "cuda", "chunked", "cpu", "reference"]
    assert sum(choice.chosen for choice in choices) == 1
    for choice in choices:  # no reason: it could serve the call too
        assert (choice.reason is None) == (BACKENDS[choice.backend].unavailable() is None)
    assert choices[-1].backend == "reference"
    with pmk.use_backend("reference"):
        assert pmk.explain("enqueue_")[-1].chosen


def test_explain_refuses_unknown_operators() -> None:
    with pytest.raises(ValueError, match=r"operator must be one of .*enqueue_.*, got 'softmax'"):
        pmk.explain("softmax")


def test_an_unknown_or_unavailable_backend_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, chunked, cpu, reference, got 'tpu'"):
        pmk.use_backend("tpu").__enter__()

    class Absent(Backend):
        def unavailable(self) -> str:
            return "there is no GPU in this test"

    monkeypatch.setitem(BACKENDS, "cuda", Absent("cuda"))
    with pytest.raises(RuntimeError, match=r"(?s)backend 'cuda' is not available.*cuda +there is no GPU.*reference"):
        pmk.use_backend("cuda").__enter__()


def test_another_backend_plugs_in_and_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def kernel(*args: Any) -> Any:
        seen.append(args)
        return reference.BACKEND.kernels["hardest_negatives"](*args)

    class Small(Backend):
        def refuses(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
            return "only small" if tensors and tensors[0].shape[0] > 3 else None

    monkeypatch.setitem(BACKENDS, "cpu", Small("cpu", {"hardest_negatives": kernel}))
    w = torch.eye(4)
    pmk.hardest_negatives(w[:2], w, k=1)
    assert len(seen) == 1  # preferred to the reference
    pmk.hardest_negatives(w, w, k=1)
    assert len(seen) == 1  # refused: the reference served it
    choices = {choice.backend: choice for choice in pmk.explain("hardest_negatives", w)}
    assert choices["cpu"].reason == "only small"
    assert choices["reference"].chosen
    with pmk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"(?s)cpu +only small.*reference +could"):
        pmk.hardest_negatives(w, w, k=1)
    with pmk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu +has no kernel for negative_logsumexp"):
        pmk.margin_softmax_loss(w, w, torch.arange(4))
    assert {c.backend: c.reason for c in pmk.explain("margin_softmax_loss")}["cpu"].startswith("has no kernel")
    with pmk.use_backend("reference"):
        assert "in force" in str({c.backend: c for c in pmk.explain("hardest_negatives")}["cpu"])
        pmk.hardest_negatives(w[:2], w, k=1)
    assert len(seen) == 1


def test_values_are_read_elsewhere_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROTOMEM_DEBUG", raising=False)
    assert values_can_be_read(torch.zeros(1))
    assert not values_can_be_read(torch.zeros(1, device="meta"))
    monkeypatch.setenv("PROTOMEM_DEBUG", "1")
    assert values_can_be_read(torch.zeros(1, device="meta"))


def test_unchecked_values_are_harmless() -> None:
    """What a GPU meets without PROTOMEM_DEBUG=1, run on the CPU below the checks."""
    x, w, _, _ = inputs((3, 5, 2))
    x = x / x.norm(dim=1, keepdim=True)
    wild = torch.tensor([5, 2**40, -(2**40)])
    none = torch.tensor([-1, -1, -1])
    for name, extra in (
        ("negative_logsumexp", (None, None, None, None, 4.0, 0.0, False, True, 0)),
        ("hardest_negatives", (None, 2, False)),
    ):
        kernel = reference.BACKEND.kernels[name]
        for ours, expected in zip(kernel(x, w, wild, *extra), kernel(x, w, none, *extra), strict=True):
            assert torch.equal(ours, expected)
    weights = torch.tensor([float("nan"), -3.0, 1.0])
    made = reference.BACKEND.kernels["aggregate_prototypes"](x, torch.tensor([0, 0, 0]), weights, True, 1)
    torch.testing.assert_close(made[0][0], x[2])
    assert made[3].tolist() == [1.0]
    crowded = reference.BACKEND.kernels["aggregate_prototypes"](x, torch.tensor([8, 3, 5]), None, True, 2)
    assert crowded[1].tolist() == [3, 5]
    assert crowded[2].tolist() == [-1, 0, 1]


IMPORT_TIME = """
import time, torch
start = time.perf_counter()
import protomem_kernels
print(time.perf_counter() - start)
import sys
print(sorted({"sklearn", "matplotlib", "typer", "PIL", "tensorboard"} & set(sys.modules)))
"""


def test_importing_is_quick_and_pulls_nothing_in() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT_TIME], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        for _ in range(3)
    ]
    assert min(float(run[0]) for run in runs) < 0.3
    assert runs[0][1] == "[]"


class Watching(TorchDispatchMode):
    """Notes the operators that go by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_whoever_watches_sees_the_operators() -> None:
    """A call goes past the dispatcher only where nothing but autograd could tell."""
    x, w, targets, _ = inputs((4, 9, 3))
    x.requires_grad_()
    targets = targets.clamp(min=0)
    with Watching() as watching:
        loss = pmk.margin_softmax_loss(x, w, targets)
        loss.backward()
    assert "protomem::negative_logsumexp" in watching.seen
    plain = x.detach().requires_grad_()
    pmk.margin_softmax_loss(plain, w, targets).backward()
    torch.testing.assert_close(plain.grad, x.grad)
    transformed = torch.func.grad(lambda x: pmk.margin_softmax_loss(x, w, targets))(x.detach())
    torch.testing.assert_close(transformed, x.grad)
    marked = pmk.margin_softmax_loss(x.detach().as_subclass(Subclass), w, targets)
    assert isinstance(marked, Subclass)
    torch.testing.assert_close(marked.as_subclass(Tensor), loss.detach())
