"""What is held against what: numbers within what truth allows, integers and bits exactly, refusals by their words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.fuzz.draw import Draw, accumulation

GPU_KERNELS = (
    "cuda",
    "triton",
    "chunked",
)  # their products are of the coarser of two dtypes, as tensor cores have them
Values = dict[str, Tensor]
Oracle = Callable[..., Values]  # tensors of one dtype -> what is right, in that dtype


class BrokenRuleError(AssertionError):
    """The package broke a rule."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


def require(rule: str, holds: bool, message: str = "") -> None:
    if not holds:
        raise BrokenRuleError(rule, message or "does not hold")


def exact(rule: str, ours: Tensor | Sequence[int], right: Tensor | Sequence[int]) -> None:
    """Hold integers, or bits, to being the same."""
    a, b = (v.tolist() if isinstance(v, Tensor) else list(v) for v in (ours, right))
    require(rule, a == b, f"{a} is not {b}")


def jiggled(draw: Draw, x: Tensor, eps: float) -> Tensor:
    """Return the same numbers in float64, off by some roundings."""
    return x.double() * (1 + 4 * eps * (2 * draw.uniform(*x.shape) - 1))


class Judge:
    """Holds numbers to the truth in float64.

    They may be off twice as far as plain PyTorch is in the same dtype, on these inputs or on inputs that differ by some
    roundings, and by some roundings of the ``natural`` size of what was summed: what cancels cannot be better.
    """

    def __init__(self, draw: Draw, oracle: Oracle, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        kind = accumulation(dtype)
        self.eps, self.largest = torch.finfo(kind).eps, torch.finfo(kind).max
        if str(draw.notes.get("backend")).startswith(GPU_KERNELS):
            self.eps = max(self.eps, *(torch.finfo(x.dtype).eps for x in tensors))
        self.truth = oracle(*(x.double() for x in tensors))
        self.rivals = [oracle(*(jiggled(draw, x, self.eps) for x in tensors)) for _ in range(2)]
        if kind != torch.float64:
            self.rivals.append(oracle(*(x.to(kind) for x in tensors)))

    def close(
        self,
        rule: str,
        name: str,
        ours: Tensor,
        natural: Tensor | float = 1.0,
        where: Tensor | None = None,
        *,
        in_parts: bool = False,
        scaled_up: bool = False,
    ) -> None:
        """Hold ``ours`` to the truth called ``name``; ``natural`` and ``where`` are broadcast to its shape.

        ``in_parts``: autograd adds parts up that were rounded to the dtype asked for, each by itself.
        ``scaled_up``: backward began with more than 1, and an overflow of a float16 gradient may stay one.
        """
        truth = self.truth[name].detach()
        require(rule, ours.shape == truth.shape, f"shape {tuple(ours.shape)}, not {tuple(truth.shape)}")
        if truth.numel() == 0:
            return
        counts = torch.ones_like(truth, dtype=torch.bool) if where is None else where.expand_as(truth)
        natural = torch.as_tensor(natural, dtype=torch.float64).expand_as(truth)
        kind = torch.finfo(ours.dtype)
        value = ours.detach().double()
        beyond = counts & (truth.abs() >= min(kind.max, self.largest))  # nobody can hold it
        require(rule, not bool((beyond & value.isnan()).any()), "NaN where the truth is beyond the dtype")
        if (
            ours.dtype == torch.float16 and not scaled_up
        ):  # a gradient stays in range, so that one number does not spoil a step
            held = truth.abs() < self.largest  # what has left the accumulation's range stays out
            out = beyond & held & ~value.isfinite()
            require(rule, not bool(out.any()), "infinite where float16 ends")
        counts = counts & ~beyond & ~(truth.isnan() & ~natural.isfinite())  # the truth left float64 itself
        odd = counts & (value.isfinite() != truth.isfinite())
        if bool(odd.any()):
            raise BrokenRuleError(rule, f"finite in one alone, {_at(odd, ours, truth)}")
        infinite = counts & ~truth.isfinite() & ~(value == truth) & ~(value.isnan() & truth.isnan())
        if bool(infinite.any()):
            raise BrokenRuleError(rule, f"another infinity, {_at(infinite, ours, truth)}")
        counts = counts & truth.isfinite() & (natural > 0) & natural.isfinite()
        scale = torch.where(counts, natural, 1)
        spread = 0.0
        for rival in self.rivals:
            off = (rival[name].detach().double() - truth).abs() / scale
            spread = max(spread, float(torch.where(counts & off.isfinite(), off, 0).max()))
        size = torch.where(counts, truth.abs(), 0)
        rounded = torch.maximum(scale, size) if in_parts else size
        rounding = 2 * kind.eps * rounded if kind.eps > self.eps else 0
        floor = kind.tiny if ours.dtype != torch.float16 else kind.smallest_normal * kind.eps
        allowed = scale * (2 * spread + 32 * self.eps) + rounding + floor
        wrong = counts & ((value - truth).abs() > allowed)
        if bool(wrong.any()):
            excess = torch.where(wrong, (value - truth).abs() / allowed, 0).max()
            raise BrokenRuleError(rule, f"{float(excess):.3g} times what is allowed, {_at(wrong, ours, truth)}")


def scales_up(upstream: Tensor) -> bool:
    """Say whether backward began with more than 1 somewhere."""
    return bool((upstream.abs() > 1).any())


def _at(wrong: Tensor, ours: Tensor, truth: Tensor) -> str:
    place = tuple(wrong.nonzero()[0].tolist())
    return f"at {place}: {ours[place].item()!r}, truth {truth[place].item()!r} ({int(wrong.sum())} of {wrong.numel()})"


def refused(rule: str, call: Callable[[], object], *words: str) -> str:
    """Hold a call to raising TypeError, ValueError or RuntimeError with each of the words; return what it said."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        said = str(error)
        missing = [word for word in words if word not in said]
        require(rule, not missing, f"{type(error).__name__} does not name {missing}: {said!r}")
        return said
    except Exception as error:
        raise BrokenRuleError(rule, f"{type(error).__name__} is no way to refuse: {error}") from error
    raise BrokenRuleError(rule, f"taken without a word (expected an error that names {words})")
