"""The compiled CPU kernels beyond the contract suites: every instruction set, any number of threads, drawn inputs.

The reference is the truth here; the contract suites hold it to formulas from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk
from protomem_kernels.backends import cpu
from protomem_kernels.backends.choice import use_backend

pytestmark = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason=str(cpu.BACKEND.unavailable()))
CAPABILITIES = [] if cpu.OBJECT is None else cpu.OBJECT.capabilities()
each_capability = pytest.mark.parametrize("capability", CAPABILITIES)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def using(capability: str) -> Iterator[None]:
    assert cpu.OBJECT is not None
    before = cpu.OBJECT.capability()
    cpu.OBJECT.set_capability(capability)
    try:
        with use_backend("cpu"):
            yield
    finally:
        cpu.OBJECT.set_capability(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values, contiguous or not, starting inside a larger storage of NaN."""
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.t().contiguous().t() if x.ndim == 2 else x
    wide = (
        x.new_full([2 * n + 3 for n in x.shape], float("nan"))
        if x.is_floating_point()
        else x.new_zeros([2 * n + 3 for n in x.shape])
    )
    view = wide[tuple(slice(3, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def differentiated(call: Callable[..., Tensor | tuple[Tensor, ...]], *arguments: Tensor | None) -> list[Tensor]:
    """Return the outputs and, for upstream gradients of many sizes, the gradients of the floating arguments."""
    copies = [a.detach().requires_grad_() if a is not None and a.is_floating_point() else a for a in arguments]
    outputs = call(*copies)
    copies = [leaf for leaf in copies if leaf is not None and leaf.requires_grad]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floating = [o for o in outputs if o.requires_grad]
    upstream = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in floating]
    upstream = [torch.where(torch.isfinite(o), g, 0) for o, g in zip(floating, upstream, strict=True)]
    grads = torch.autograd.grad(floating, copies, upstream, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in grads if g is not None]


def assert_same(ours: list[Tensor], reference: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 3e-5}.get(dtype, 3e-2)
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        scale = float(torch.where(torch.isfinite(b), b, 0).abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + scale), equal_nan=True)


shapes = st.tuples(st.integers(0, 70), st.integers(0, 300), st.integers(1, 70))
layouts = st.sampled_from(["contiguous", "transposed", "strided"])
MARGINS = [pmk.ArcFace(0.5), pmk.CosFace(0.4)]
MININGS = [None, pmk.MVSoftmax(), pmk.NoisyNegativeFilter(0.1), pmk.HardestNegatives(3), pmk.HardestNegatives(500)]


# Not D = 1, where every cosine is 1 or -1 and every true gradient 0: what is left there is amplified rounding.
@each_capability
@settings(max_examples=120, deadline=None)
@given(
    shape=shapes.filter(lambda shape: shape[2] > 1),
    dtype=st.sampled_from(DTYPES),
    memory_dtype=st.sampled_from(DTYPES),
    layout=layouts,
    mining=st.sampled_from(MININGS),
    margin=st.sampled_from(MARGINS),
    normalize=st.booleans(),
    filled=st.sampled_from([None, 0.0, 0.5, 0.97]),
    scale=st.sampled_from([1.0, 64.0, 300.0]),
    poison=st.sampled_from([None, float("nan"), float("inf"), 1e-42, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_losses_and_logits_on_drawn_inputs(
    capability: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    memory_dtype: torch.dtype,
    layout: str,
    mining: object,
    margin: object,
    normalize: bool,
    filled: float | None,
    scale: float,
    poison: float | None,
    seed: int,
) -> None:
    batch, capacity, dim = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    w = torch.nn.functional.normalize(torch.randn(capacity, dim, generator=generator, dtype=torch.float64))
    if normalize:
        w *= torch.logspace(-3, 3, capacity, dtype=torch.float64)[:, None]
    targets = torch.randint(-2, max(capacity, 1), (batch,), generator=generator).clamp(max=capacity - 1)
    occupied = None if filled is None else torch.rand(capacity, generator=generator) < filled
    if poison is not None and batch:
        x[batch // 2] = poison  # one broken, vanishing or zero sample
    if occupied is not None:
        unused = ~occupied
        unused[targets[targets >= 0]] = False
        w[unused] = float("nan") if poison is None else poison  # never looked at
    x = laid_out(x.to(dtype), layout)
    w = laid_out(w.to(memory_dtype), layout)
    options = {"margin": margin, "scale": scale, "occupied": occupied, "normalize_prototypes": normalize}

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return pmk.margin_softmax_loss(x, w, targets, mining=mining, reduction="none", **options)

    def logits(x: Tensor, w: Tensor) -> Tensor:
        form = None if isinstance(mining, pmk.HardestNegatives) else mining
        values = pmk.margin_softmax_logits(x, w, targets, mining=form, **options)
        # In a broken sample's row an empty slot may be NaN or -inf.
        return values if occupied is None or poison is None else values.masked_fill(~occupied, 0)

    def stats(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        values = pmk.margin_softmax_loss(x, w, targets, mining=mining, return_stats=True, **options)[1]
        # A broken sample without negatives has n = NaN or -inf.
        return tuple(values if poison is None else (t[torch.arange(batch) != batch // 2] for t in values))

    lowest = min(dtype, memory_dtype, key=lambda d: torch.finfo(d).bits)
    for call in (loss, logits, stats):
        with use_backend("reference"):
            truth = differentiated(call, x, w) if call is not stats else [t.detach() for t in stats(x, w)]
        with using(capability):
            ours = differentiated(call, x, w) if call is not stats else [t.detach() for t in stats(x, w)]
        assert [o.shape for o in ours] == [t.shape for t in truth]
        # A threshold may fall between two roundings of the same cosine, hence float64 alone is compared with a mining
        # rule that jumps there; the others must still return, with the same shapes and the same broken rows.
        if poison == 1e-42:  # a gradient times 1e42: its roundings are large, and its own
            for results in (ours, truth):
                results[:] = [t[torch.arange(batch) != batch // 2] if t.shape == x.shape else t for t in results]
        if lowest == torch.float64 or not isinstance(mining, pmk.NoisyNegativeFilter | pmk.MVSoftmax):
            assert_same(ours, truth, lowest)


@each_capability
@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=layouts,
    k=st.integers(1, 400),
    normalize=st.booleans(),
    filled=st.sampled_from([None, 0.3]),
    ties=st.booleans(),
    order=st.sampled_from(["random", "ascending", "descending"]),
    seed=st.integers(0, 2**31),
)
def test_hardest_negatives_on_drawn_inputs(
    capability: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    layout: str,
    k: int,
    normalize: bool,
    filled: float | None,
    ties: bool,
    order: str,
    seed: int,
) -> None:
    batch, capacity, dim = shape
    k = min(k, max(capacity, 1))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    w = torch.randn(capacity, dim, generator=generator, dtype=torch.float64)
    if ties:  # cosines that are exact in every dtype, many of them equal
        x, w = (functional_sign(t, generator) for t in (x, w))
    elif order != "random" and batch and capacity:  # the worst case for a list that keeps the best so far
        rank = (w @ x[0]).argsort(descending=order == "descending")
        w = w[rank]
    targets = torch.randint(-1, max(capacity, 1), (batch,), generator=generator).clamp(max=capacity - 1)
    occupied = None if filled is None else torch.rand(capacity, generator=generator) < filled
    x, w = laid_out(x.to(dtype), layout), laid_out(w.to(dtype), layout)

    def call(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(pmk.hardest_negatives(x, w, targets, k=k, occupied=occupied, normalize_prototypes=normalize))

    with use_backend("reference"):
        truth = differentiated(call, x, w)
    with using(capability):
        ours = differentiated(call, x, w)
    one_number = dim == 1 and normalize  # rows of unit length that differ in rounding alone
    if ties or (dtype == torch.float64 and not one_number):
        assert torch.equal(ours[1], truth[1])
        assert_same(ours, truth, dtype)
    else:  # near ties may swap, which moves the upstream gradient to another slot
        assert_same(ours[:1], truth[:1], dtype)
        assert torch.equal(ours[1] < 0, truth[1] < 0)


def functional_sign(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return one-hot rows with signs: cosines -1, 0 and 1."""
    column = torch.randint(0, min(3, x.shape[1]), (x.shape[0], 1), generator=generator)
    return torch.zeros_like(x).scatter_(1, column, 1.0) * x[:, :1].sign()


def without_near_cancellation(x: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool) -> Tensor:
    """Drop the labels of identities whose samples all but cancel: what is left of their sum is amplified rounding.

    Where they cancel outright, the rule for antipodal images applies to both sides.
    """
    q = torch.ones(len(x)) if weights is None else weights
    rows = torch.nn.functional.normalize(x.double()) if normalize else x.double()
    labels = labels.clone()
    for label in labels.unique():
        of = labels == label
        terms = (q[of] if q[of].any() else torch.ones_like(q[of]))[:, None] * rows[of]
        if 1e-9 < terms.sum(dim=0).norm() / terms.norm(dim=1).sum() < 0.02:
            labels[of] = -1
    return labels


@each_capability
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 60),
    capacity=st.integers(1, 200),
    dim=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
    memory_dtype=st.sampled_from(DTYPES),
    layout=layouts,
    policy=st.sampled_from(["fifo", "lru"]),
    refresh_ratio=st.sampled_from([0.0, 0.2, 1.0]),
    weighted=st.booleans(),
    normalize=st.booleans(),
    labels_dtype=st.sampled_from([torch.int64, torch.int32]),
    poison=st.sampled_from([None, float("nan"), float("inf"), 1e-42, 3e38, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_aggregate_and_enqueue_on_drawn_inputs(
    capability: str,
    batch: int,
    capacity: int,
    dim: int,
    dtype: torch.dtype,
    memory_dtype: torch.dtype,
    layout: str,
    policy: str,
    refresh_ratio: float,
    weighted: bool,
    normalize: bool,
    labels_dtype: torch.dtype,
    poison: float | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    huge = torch.iinfo(labels_dtype).max
    pool = torch.cat(
        [torch.arange(-2, min(capacity, 30)), torch.tensor([huge, huge - 1, torch.iinfo(labels_dtype).min])]
    )
    states = {name: pmk.MemoryState.empty(capacity, dim, dtype=memory_dtype) for name in ("reference", "cpu")}
    for _ in range(4):
        x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
        if poison is not None and batch:
            x[batch // 2, -1] = poison
        x = laid_out(x.to(dtype), layout)
        labels = pool[torch.randint(len(pool), (batch,), generator=generator)].to(labels_dtype)
        weights = torch.rand(batch, generator=generator).round(decimals=1) if weighted else None
        labels = laid_out(without_near_cancellation(x, labels, weights, normalize), layout)
        if int((labels >= 0).sum()) and labels[labels >= 0].unique().numel() > capacity:
            continue
        results = {}
        for name, state in states.items():
            with using(capability) if name == "cpu" else use_backend("reference"):
                made = pmk.aggregate_prototypes(x, labels, weights, normalize=normalize)
                grads = differentiated(
                    lambda e, *rest: pmk.aggregate_prototypes(e, *rest, normalize=normalize).prototypes,
                    x,
                    labels,
                    weights,
                )
                queued = pmk.enqueue_(
                    state,
                    results["reference"][0][0] if results else made.prototypes,
                    made.identities,
                    refresh_ratio=refresh_ratio,
                    policy=policy,
                )
            # Gradients of a sum as short as 1e-42 are roundings times 1e42.
            results[name] = ([*made], [*queued], [] if poison == 1e-42 else grads)
        for ours, truth in zip(results["cpu"], results["reference"], strict=True):
            assert_same(ours, truth, dtype)
        for ours, truth in zip(states["cpu"], states["reference"], strict=True):
            if ours.is_floating_point():
                torch.testing.assert_close(ours, truth, rtol=1e-5 if memory_dtype.itemsize > 2 else 1e-2, atol=1e-5)
                ours.copy_(truth)  # a rounding to the other side is one unit now, not two after the next refresh
            else:
                assert torch.equal(ours, truth)


@each_capability
@pytest.mark.parametrize("shape", [(96, 100_000, 16), (70, 130_001, 8), (64, 20_000, 512)])
def test_results_too_large_for_a_cache(capability: str, shape: tuple[int, int, int]) -> None:
    """From 32 MiB on, logits and what forward keeps for the prototypes' gradient are stored past the caches."""
    batch, capacity, dim = shape
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, dim, generator=generator)
    w = functional.normalize(torch.randn(capacity, dim, generator=generator))
    targets = torch.randint(-1, capacity, (batch,), generator=generator)
    assert max(batch * capacity, capacity * dim) * 4 >= 32 << 20

    def logits_then_loss(x: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return pmk.margin_softmax_logits(x, w, targets), pmk.margin_softmax_loss(x, w, targets)

    with use_backend("reference"):
        truth = differentiated(logits_then_loss, x, w, targets)
    with using(capability):
        assert_same(differentiated(logits_then_loss, x, w, targets), truth, torch.float32)


@each_capability
def test_results_do_not_depend_on_the_number_of_threads(capability: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 65)
    w = torch.nn.functional.normalize(torch.randn(7001, 65))
    targets = torch.randint(-1, 7001, (300,))
    labels = torch.randint(0, 90, (300,))
    calls: list[Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = [
        lambda x, w: pmk.margin_softmax_loss(x, w, targets, reduction="none"),
        lambda x, w: pmk.margin_softmax_loss(x, w, targets, scale=200.0, reduction="none"),
        lambda x, w: pmk.margin_softmax_loss(x, w, targets, mining=pmk.MVSoftmax(), reduction="none"),
        lambda x, w: pmk.margin_softmax_loss(x, w, targets, mining=pmk.HardestNegatives(9), reduction="none"),
        lambda x, w: pmk.margin_softmax_logits(x, w, targets),
        lambda x, w: tuple(pmk.hardest_negatives(x, w, targets, k=20)),
        lambda x, w: pmk.aggregate_prototypes(x.repeat(8, 8), labels.repeat(8)).prototypes,
    ]
    for call in calls:
        results = []
        for count in (1, 2, 3, 8):
            with threads(count), using(capability):
                results.append(differentiated(call, x, w))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_stress_many_calls_from_many_threads() -> None:
    """Calls from several Python threads at once, each of which uses PyTorch's pool, agree with a single one."""
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    x, w = torch.randn(64, 32), torch.nn.functional.normalize(torch.randn(3000, 32))
    targets = torch.randint(0, 3000, (64,))

    def work(_: int) -> list[Tensor]:
        with use_backend("cpu"):
            return differentiated(lambda x, w: pmk.margin_softmax_loss(x, w, targets, reduction="none"), x, w)

    expected = work(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(40)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
