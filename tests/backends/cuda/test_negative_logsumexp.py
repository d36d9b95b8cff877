"""The CUDA kernels of ``negative_logsumexp``, run on the CPU, against the reference in float64."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from protomem_kernels.ops.negative_logsumexp import exponent_offset
from protomem_kernels.types import HardNegativeForm
from tests.backends.cuda import operators
from tests.ops.cases import assert_as_close_as, strided, unit

reference = importlib.import_module("protomem_kernels.backends.reference.negative_logsumexp")  # hidden by the function

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Case(NamedTuple):
    """One call. ``x`` (B, D), ``prototypes`` (M, D) with NaN in slots that nobody may read, and the options."""

    x: Tensor
    prototypes: Tensor
    targets: Tensor
    occupied: Tensor | None
    negatives: Tensor | None
    threshold: Tensor | None
    coefficients: Tensor | None
    scale: float
    offset: float | None
    normalize: bool

    def wide(self, dtype: torch.dtype) -> Case:
        return self._replace(
            x=self.x.to(dtype),
            prototypes=self.prototypes.to(dtype),
            threshold=None if self.threshold is None else self.threshold.to(dtype),
            coefficients=None if self.coefficients is None else self.coefficients.to(dtype),
        )

    def strided(self) -> Case:
        """Return the same values in tensors that are contiguous nowhere, some in other dtypes."""
        return self._replace(
            x=strided(self.x),
            prototypes=strided(self.prototypes),
            targets=strided(self.targets.int()),
            occupied=None if self.occupied is None else self.occupied.repeat_interleave(2)[::2],
            threshold=None if self.threshold is None else strided(self.threshold.double()),
            coefficients=None if self.coefficients is None else strided(self.coefficients),
        )


def make(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    scale: float = 64.0,
    occupied: bool = True,
    hard: bool = False,
    normalize: bool = False,
    chosen: int | None = None,
    running: bool = False,
    seed: int = 0,
) -> Case:
    """Make a case; targets reach from -2 to past the end, and so do chosen negatives."""
    batch, capacity, dim = shape
    generator = torch.Generator().manual_seed(seed)
    x, prototypes = (unit(torch.randn(n, dim, generator=generator)) for n in (batch, capacity))
    targets = torch.randint(-2, capacity + 2, (batch,), generator=generator)
    if capacity > 3 and batch > 3:
        x[0], targets[0] = prototypes[2], 2  # cosines of exactly 1, at the target
        x[1] = prototypes[3]  # and at a negative
        x[2] = 0
    if normalize:
        prototypes *= 3 * torch.rand(capacity, 1, generator=generator) + 1e-3
        if capacity > 5:
            prototypes[5] = 0
    present = None
    if occupied:
        present = torch.rand(capacity, generator=generator) < 0.7
        read = present.clone()
        read[targets[(targets >= 0) & (targets < capacity)]] = True
        prototypes[~read] = float("nan")
    negatives = None
    if chosen is not None:
        readable = torch.nonzero(~prototypes.isnan().any(1))[:, 0] if capacity else torch.tensor([-1])
        readable = torch.cat([readable, torch.tensor([-1, capacity])])
        negatives = readable[torch.randint(0, len(readable), (batch, chosen), generator=generator)]
    form = None
    if hard:
        threshold = 0.2 * torch.rand(batch, generator=generator) - 0.05
        form = HardNegativeForm(threshold, torch.tensor([1.2, 0.2, 0.1]), -1.2, 1.5, 1.4)
    offset = None if running else exponent_offset(scale, capacity, form, torch.float32)
    return Case(
        x,
        prototypes.to(dtype),
        targets,
        present,
        negatives,
        None if form is None else form.threshold,
        None if form is None else form.coefficients,
        scale,
        offset,
        normalize,
    )


def check(ops: operators.Operators, case: Case, *, with_gradient: bool = True) -> None:
    """Compare forward and backward with the reference in float64, as far off as that is in float32."""
    dtype, truth_case, peer_case = case.prototypes.dtype, case.wide(torch.float64), case.wide(torch.float32)
    # What of a gradient rounding may take: of exponentials to a 16-bit dtype, else of exponents as large as the scale.
    # (The peer alone would not do: with few samples its error is a matter of luck.)
    eps = torch.finfo(dtype).eps
    rounding = eps * case.scale / 2 if dtype == torch.float32 else 2 * eps
    ours = ops.kernels["negative_logsumexp"](*case, with_gradient, 0)
    truth = reference.negative_logsumexp(*truth_case, with_gradient, 0)
    peer = reference.negative_logsumexp(*peer_case, with_gradient, 0)
    for name, tiny, a, b, c in zip(
        ("c", "n", "rows", "o"), (1e-6, 1e-6, 1e-6, rounding), ours, peer, truth, strict=False
    ):
        assert not a.isnan().any(), name
        assert_as_close_as(a, b, c, tiny=tiny)

    generator = torch.Generator().manual_seed(7)
    gradients = [torch.randn(len(case.x), generator=generator) for _ in range(2)]
    grad = torch.full_like(case.prototypes, float("nan"), memory_format=torch.contiguous_format)
    grad_peer, grad_truth = torch.empty_like(grad, dtype=torch.float32), torch.empty_like(grad, dtype=torch.float64)

    def backward(call: Any, to: Tensor, of: Case, n: Tensor) -> None:
        x, prototypes, *rest, scale, offset, normalize = of
        wide = [g.to(x.dtype) for g in gradients]
        call(to, *wide, x, prototypes, *rest, n, scale, offset, normalize, 0)

    backward(ops.kernels["negative_logsumexp_backward_"], grad, case, ours[1])
    backward(reference.negative_logsumexp_backward_, grad_truth, truth_case, truth[1])
    backward(reference.negative_logsumexp_backward_, grad_peer, peer_case, peer[1])
    assert_as_close_as(grad, grad_peer, grad_truth, tiny=rounding)


# One sample, one slot, nothing, D that no chunk of 16 bytes divides, every shape that with_shape has, several tiles.
SHAPES = [(1, 1, 1), (5, 40, 3), (3, 0, 4), (40, 130, 33), (7, 100, 128), (67, 70, 200), (35, 100, 512), (5, 40, 1000)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_plain(ops: operators.Operators, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(ops, make(shape, dtype))


@each_dtype
@pytest.mark.parametrize("dim", [20, 256, 520])
def test_every_option(ops: operators.Operators, dim: int, dtype: torch.dtype) -> None:
    check(ops, make((9, 75, dim), dtype, hard=True, normalize=True, seed=1))
    check(ops, make((9, 75, dim), dtype, hard=True, running=True, occupied=False, seed=2))
    check(ops, make((9, 75, dim), dtype, scale=128.0, seed=3), with_gradient=False)


@each_dtype
def test_any_strides_and_dtypes(ops: operators.Operators, dtype: torch.dtype) -> None:
    for dim in (24, 264, 600):
        check(ops, make((9, 75, dim), dtype, hard=True, seed=4).strided())


@each_dtype
def test_chosen_negatives(ops: operators.Operators, dtype: torch.dtype) -> None:
    for dim, chosen in ((3, 1), (130, 6), (512, 11)):
        check(ops, make((9, 40, dim), dtype, chosen=chosen, seed=5))
        check(ops, make((9, 40, dim), dtype, chosen=chosen, hard=True, normalize=True, seed=6))


@each_dtype
def test_within_99_kib_of_shared_memory(
    ops: operators.Operators, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTOMEM_HOST_SHARED_BYTES", str(99 * 1024))
    check(ops, make((35, 100, 512), dtype, seed=8))
    case = make((5, 40, 1024), dtype, seed=9)
    if dtype == torch.float32:
        with pytest.raises(RuntimeError, match="shared memory"):
            check(ops, case)
    else:  # forward alone
        _, n, _, o, _ = ops.kernels["negative_logsumexp"](*case, True, 0)
        _, n_truth, _, o_truth, _ = reference.negative_logsumexp(*case.wide(torch.float64), True, 0)
        assert_as_close_as(n, n_truth.float(), n_truth)
        assert_as_close_as(o, o_truth.float(), o_truth, tiny=2 * torch.finfo(dtype).eps)


def test_a_broken_embedding_touches_no_other(mode: str) -> None:
    ops = operators.load(mode)
    case = make((6, 70, 40), torch.bfloat16)
    good = ops.kernels["negative_logsumexp"](*case, True, 0)
    for bad in (float("nan"), float("inf")):
        x = case.x.clone()
        x[4, 3] = bad
        broken = ops.kernels["negative_logsumexp"](*case._replace(x=x), True, 0)
        assert not broken[1][4].isfinite()
        assert not broken[3][4].isfinite().all()
        others = [0, 1, 2, 3, 5]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(good[:4], broken[:4], strict=True))


def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(mode: str) -> None:
    ops = operators.load(mode)
    case = make((40, 300, 70), torch.bfloat16)
    results = []
    for seed in range(3):
        ops.seed(seed)
        results.append(ops.kernels["negative_logsumexp"](*case, True, 0))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
