"""The CUDA kernels of ``margin_softmax_logits``, run on the CPU, against the reference in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tests.backends.cuda import operators
from tests.backends.cuda.test_negative_logsumexp import Case, each_dtype, make
from tests.ops.cases import assert_as_close_as, strided

reference = importlib.import_module(
    "protomem_kernels.backends.reference.margin_softmax_logits"
)  # hidden by the function


def both(case: Case, target_logits: Tensor, grad: Tensor, need_prototypes: bool = True) -> tuple[tuple, tuple]:
    """Return the arguments of the forward and of the backward pass, in the dtype of the case."""
    x, prototypes, targets, occupied, _, threshold, coefficients, scale, _, normalize = case
    options = (occupied, threshold, coefficients, scale, normalize)
    forward = (x, prototypes, targets, target_logits.to(x.dtype), *options)
    return forward, (grad.to(x.dtype), x, prototypes, targets, *options, need_prototypes)


def random_gradient(case: Case) -> Tensor:
    """Return dL/dlogits as of a mean cross-entropy, with NaN where nobody may look and rows of very different size."""
    batch, capacity = len(case.x), len(case.prototypes)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(batch, capacity, generator=generator) * 10.0 ** torch.arange(0, -batch, -1).clamp(-7)[:, None]
    if case.occupied is not None:
        grad[:, ~case.occupied] = float("nan")
        known = (case.targets >= 0) & (case.targets < capacity)
        grad[known, case.targets[known].long()] = 1 - torch.rand(int(known.sum()), generator=generator)
    return grad


def check(ops: operators.Operators, case: Case, grad: Tensor | None = None) -> None:
    """Compare forward and backward with the reference in float64, as far off as that is in float32."""
    dtype, batch = case.prototypes.dtype, len(case.x)
    grad = random_gradient(case) if grad is None else grad
    target_logits = torch.linspace(-3, 40, batch)
    ours = both(case, target_logits, grad)
    truth, peer = (both(case.wide(wide), target_logits, grad) for wide in (torch.float64, torch.float32))

    logits = ops.kernels["margin_softmax_logits"](*ours[0])
    exact, usual = reference.margin_softmax_logits(*truth[0]), reference.margin_softmax_logits(*peer[0])
    assert torch.equal(logits.isinf(), exact.isinf())
    assert not logits.isnan().any()
    assert_as_close_as(logits, usual, exact)

    # What the rounding of factors to a 16-bit dtype may take, of each row of a gradient.
    rounding = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    gradients = ops.kernels["margin_softmax_logits_backward"](*ours[1])
    exact, usual = (reference.margin_softmax_logits_backward(*arguments[1]) for arguments in (truth, peer))
    rows = exact[0].abs().amax(dim=1, keepdim=True).clamp(min=1e-30) if exact[0].numel() else 1
    assert_as_close_as(gradients[0].double() / rows, usual[0].double() / rows, exact[0] / rows, tiny=rounding)
    assert_as_close_as(gradients[1], usual[1], exact[1], tiny=rounding)
    assert torch.equal(gradients[2], usual[2])
    alone = ops.kernels["margin_softmax_logits_backward"](*ours[1][:-1], False)
    assert torch.equal(alone[0], gradients[0])
    assert alone[1].shape == (0, 0)


# One sample, one slot, D that no chunk of 16 bytes divides, each shape that there is, several tiles and splits.
SHAPES = [(1, 1, 1), (5, 40, 3), (70, 131, 33), (7, 100, 128), (67, 70, 200), (9, 100, 512), (5, 40, 1000)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_plain(ops: operators.Operators, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(ops, make(shape, dtype))


@each_dtype
@pytest.mark.parametrize("dim", [20, 520])
def test_every_option(ops: operators.Operators, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(ops, make((9, 75, dim), dtype, hard=True, occupied=False, seed=2))
    monkeypatch.setenv("PROTOMEM_HOST_SCRATCH_BYTES", "1")  # slopes 128 slots at a time
    check(ops, make((9, 140, dim), dtype, hard=True, normalize=True, seed=1))


@each_dtype
def test_any_strides_and_dtypes(ops: operators.Operators, dtype: torch.dtype) -> None:
    for dim, normalize in ((24, True), (136, False), (520, False)):
        case = make((9, 75, dim), dtype, hard=dim != 136, normalize=normalize, seed=4)
        check(ops, case.strided(), strided(random_gradient(case)))


@each_dtype
def test_within_99_kib_of_shared_memory(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTOMEM_HOST_SHARED_BYTES", str(99 * 1024))
    ops = operators.load(mode)
    check(ops, make((5, 70, 512), dtype, seed=8))
    # Python refuses more than 512 columns on such a GPU, and so does whoever gets them past it.
    wide = make((3, 40, 1000), dtype, seed=9)
    target_logits, grad = torch.linspace(-3, 40, 3), random_gradient(wide)
    forward, backward = both(wide, target_logits, grad)
    if dtype == torch.float32:
        with pytest.raises(RuntimeError, match="shared memory"):
            ops.kernels["margin_softmax_logits"](*forward)
    else:
        truth, peer = (both(wide.wide(other), target_logits, grad)[0] for other in (torch.float64, torch.float32))
        exact, usual = reference.margin_softmax_logits(*truth), reference.margin_softmax_logits(*peer)
        assert_as_close_as(ops.kernels["margin_softmax_logits"](*forward), usual, exact)
    with pytest.raises(RuntimeError, match="shared memory"):
        ops.kernels["margin_softmax_logits_backward"](*backward)


def test_nothing_to_do(mode: str) -> None:
    forward, backward = (
        operators.load(mode).kernels[name] for name in ("margin_softmax_logits", "margin_softmax_logits_backward")
    )
    for batch, capacity, dim in ((0, 5, 4), (3, 0, 4), (0, 0, 4)):
        case = make((batch, capacity, dim), torch.bfloat16)
        arguments = both(case, torch.zeros(batch), torch.zeros(batch, capacity))
        assert forward(*arguments[0]).shape == (batch, capacity)
        gradients = backward(*arguments[1])
        assert [tuple(gradient.shape) for gradient in gradients] == [(batch, dim), (capacity, dim), (batch,)]
        assert all(not gradient.any() for gradient in gradients)


@each_dtype
def test_a_broken_embedding_touches_no_other(mode: str, dtype: torch.dtype) -> None:
    ops = operators.load(mode)
    case = make((6, 70, 40), dtype, hard=True)
    grad = random_gradient(case)
    for bad in (float("nan"), float("inf")):
        x = case.x.clone()
        x[4, 3] = bad
        # As if the sample had passed nothing on, whatever reaches it.
        silent = grad.clone()
        silent[4] = 0
        grad[4] = float("nan")
        calls = both(case._replace(x=x), torch.zeros(6), grad), both(case, torch.zeros(6), silent)
        broken, sound = (ops.kernels["margin_softmax_logits"](*call[0]) for call in calls)
        assert not broken[4][~broken[4].isinf()].isfinite().all()
        others = [0, 1, 2, 3, 5]
        assert torch.equal(broken[others], sound[others])
        broken, sound = (ops.kernels["margin_softmax_logits_backward"](*call[1]) for call in calls)
        assert torch.equal(broken[0][others], sound[0][others])
        assert torch.equal(broken[1], sound[1])


def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(mode: str) -> None:
    ops = operators.load(mode)
    case = make((40, 150, 70), torch.bfloat16, hard=True)
    arguments = both(case, torch.zeros(40), random_gradient(case))
    results = []
    for seed in range(3):
        ops.seed(seed)
        results.append(ops.kernels["margin_softmax_logits"](*arguments[0]))
        results.extend(ops.kernels["margin_softmax_logits_backward"](*arguments[1]))
    for one, other in zip(results[:-4], results[4:], strict=True):
        assert torch.equal(one, other)
