"""Margins: what a classifier asks of a sample's target cosine beyond being the largest.

A margin is any callable ``(target_cosine (B,), embedding_norm (B,)) -> modified target cosine (B,)`` in plain PyTorch,
or, where it has more to say, a ``Margin``. Those without state are frozen dataclasses; those with running statistics
or a generator are ``nn.Module``s whose state is saved. A new one is a class that overrides ``bind``, a test and a line
in the docs.

All angles are radians. theta is the angle between an embedding and its prototype, c = cos(theta).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from protomem_kernels._checks import check_choice, check_number, check_tensor
from protomem_kernels.distributed.ranks import SeesAllRanks
from protomem_kernels.recomputation import Replay
from protomem_kernels.rows import sine_floor
from protomem_kernels.state import StatefulModule, check_statistic

CosineMap: TypeAlias = Callable[[Tensor], Tensor]
PLAIN_SOFTPLUS = 50.0  # beyond it softplus(u) = u to the last bit of float64


@dataclass(frozen=True)
class TargetMap:
    """A margin bound to a batch: the modified target cosine as a function of the target cosine (B,) alone.

    ``unguarded`` is the same without the guard past pi, where the margin has one.
    """

    guarded: CosineMap
    unguarded: CosineMap

    def __call__(self, cosine: Tensor) -> Tensor:
        """Apply the margin to (B,) cosines."""
        return self.guarded(cosine)


class Margin:
    """What a loss may ask of a margin. Every default does nothing: a subclass overrides what it has to say.

    Attributes:
        has_logits: whether the loss is the cross-entropy of one set of logits.
    """

    has_logits: ClassVar[bool] = True

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the margin as a function of the target cosine alone, for a batch with these norms (B,).

        Once per batch and before its cosines are known: here statistics are updated and random margins drawn. Default:
        no margin.
        """
        return TargetMap(_as_it_is, _as_it_is)

    def for_labels(self, labels: Tensor) -> Margin:
        """Return the margin for a batch with these labels (B,): identities, classes or slots. Default: itself."""
        return self

    def kernel_form(self) -> tuple[str, float] | None:
        """Return T as ``ops.reduce_losses`` knows it, its kind and the margin, or None: plain PyTorch computes it.

        Only where the loss is ``softplus(n - s T(c))`` and nothing else, for every batch alike. Default: None.
        """
        return None

    def losses(self, excess: Tensor, cosine: Tensor, negatives: Tensor, scale: float) -> Tensor:
        """Return each sample's loss (B,). Default: ``softplus(excess)``, the cross-entropy of the softmax.

        Args:
            excess: (B,) ``negatives - scale * T(cosine)``, T being the map that ``bind`` returned.
            cosine: (B,) target cosines c.
            negatives: (B,) n, the log-sum-exp of the negatives' scaled cosines.
            scale: s.
        """
        return softplus(excess)

    def penalty(self, embedding_norm: Tensor) -> Tensor | None:
        """Return what is added to each sample's loss (B,), or None. Default: None."""
        return None

    def __call__(self, target_cosine: Tensor, embedding_norm: Tensor) -> Tensor:
        """Apply the margin to (B,) cosines of embeddings with these norms (B,)."""
        return self.bind(embedding_norm)(target_cosine)


# What a loss takes for a margin.
AnyMargin: TypeAlias = Margin | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FunctionMargin(Margin):
    """A plain function ``(target_cosine, embedding_norm) -> modified cosine`` as a ``Margin``."""

    function: Callable[[Tensor, Tensor], Tensor]

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the function for a batch with these norms (B,)."""

        def apply(cosine: Tensor) -> Tensor:
            return self.function(cosine, embedding_norm)

        return TargetMap(apply, apply)


def as_margin(margin: AnyMargin) -> Margin:
    """Return a margin as a ``Margin``: itself, or a plain function dressed as one."""
    return margin if isinstance(margin, Margin) else FunctionMargin(margin)


def _as_it_is(cosine: Tensor) -> Tensor:
    return cosine


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x) to the last bit, however large ``x`` is."""
    return functional.softplus(x, threshold=PLAIN_SOFTPLUS)


def angular(m: Tensor | float) -> TargetMap:
    """Return the map of an additive angular margin of ``m`` radians, one or (B,)."""
    return TargetMap(lambda cosine: guarded_add_angle(cosine, m), lambda cosine: add_angle(cosine, m))


def subtractive(m: Tensor | float) -> TargetMap:
    """Return the map of a margin of ``m``, one or (B,), that is subtracted from the cosine."""

    def apply(cosine: Tensor) -> Tensor:
        return cosine - m

    return TargetMap(apply, apply)


def safe_sine(cosine: Tensor) -> Tensor:
    """Return sin(theta) = sqrt(1 - c^2) exactly, with a derivative that stays bounded: 0 once 1 - c^2 is mere rounding.

    A prototype made of one image *is* its embedding, so c = 1 to the last bit is routine.
    """
    squared = 1 - cosine * cosine
    floor = sine_floor(cosine.dtype)
    differentiable = squared.clamp(min=floor).sqrt()
    return differentiable + (squared.clamp(min=0).sqrt() - differentiable).detach()


def safe_angle(cosine: Tensor) -> Tensor:
    """Return theta = arccos(c), with the derivative -1 / sin(theta) bounded likewise."""
    value = cosine.detach().clamp(-1, 1)
    sine = (1 - value * value).clamp(min=sine_floor(cosine.dtype)).sqrt()
    return value.acos() - (cosine - cosine.detach()) / sine


def _beside(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """Return the margin with the dtype and on the device of ``cosine``, filled in there: a copy would synchronise."""
    return margin.to(cosine) if isinstance(margin, Tensor) else cosine.new_full((), margin)


def add_angle(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """Return cos(theta + margin), whatever the sum, without computing theta."""
    m = _beside(cosine, margin)
    return cosine * m.cos() - safe_sine(cosine) * m.sin()


def guarded_add_angle(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """Return cos(theta + margin) while theta + margin <= pi, else c - margin sin(margin), so that it keeps falling."""
    m = _beside(cosine, margin)
    return torch.where(cosine >= -m.cos(), add_angle(cosine, m), cosine - m * m.sin())


@dataclass(frozen=True)
class ArcFace(Margin):
    """Additive angular margin: cos(theta + m) if theta + m <= pi, else c - m sin m.

    Args:
        m: margin in radians, in [0, pi); the guard keeps T falling up to m = 2.3.
        straight_through: keep the value cos(theta + m) without the fallback and let dT/dc be 1.

    >>> ArcFace(0.5)(torch.tensor([1.0, 0.0]), torch.ones(2))
    tensor([ 0.8776, -0.4794])

    Source: Deng et al., ArcFace, arXiv 1801.07698; ``straight_through`` is what insightface's PyTorch code computes.
    """

    m: float = 0.5
    straight_through: bool = False

    def __post_init__(self) -> None:
        _check_angle("m", self.m)

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the map, the same for every batch."""
        return TargetMap(self._straight_through, self._add) if self.straight_through else angular(self.m)

    def kernel_form(self) -> tuple[str, float] | None:
        """Return the kind of angle and the margin; a subclass says its own."""
        if type(self) is not ArcFace:
            return None
        return "unguarded angle" if self.straight_through else "angle", self.m

    def _add(self, cosine: Tensor) -> Tensor:
        return add_angle(cosine, self.m)

    def _straight_through(self, cosine: Tensor) -> Tensor:
        return cosine + (self._add(cosine) - cosine).detach()


@dataclass(frozen=True)
class CosFace(Margin):
    """Additive cosine margin: c - m.

    Args:
        m: margin, a difference of cosines, >= 0.

    Source: Wang et al., CosFace, arXiv 1801.09414.
    """

    m: float = 0.40

    def __post_init__(self) -> None:
        check_number("m", self.m, low=0)

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the map, the same for every batch."""
        return subtractive(self.m)

    def kernel_form(self) -> tuple[str, float] | None:
        """Return the margin of the cosine; a subclass says its own."""
        return ("cosine", self.m) if type(self) is CosFace else None


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """cos(m1 theta + m2) - m3 while m1 theta + m2 <= pi; beyond, it keeps falling with the cosine.

    Beyond the edge theta* = (pi - m2) / m1 the first term goes on as c - (1 + cos theta*), which is -1 at the edge; for
    m1 = 1 it is ArcFace's own c - m2 sin m2.

    Args:
        m1: factor of the angle, >= 1.
        m2: angle added, radians, in [0, pi).
        m3: cosine subtracted, >= 0.

    Source: Deng et al., ArcFace, arXiv 1801.07698, equation 4.
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0

    def __post_init__(self) -> None:
        check_number("m1", self.m1, low=1)
        _check_angle("m2", self.m2)
        check_number("m3", self.m3, low=0)

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the map, the same for every batch."""
        return TargetMap(self._guarded, self._unguarded)

    def _guarded(self, cosine: Tensor) -> Tensor:
        if self.m1 == 1:
            return guarded_add_angle(cosine, self.m2) - self.m3
        pushed = self.m1 * safe_angle(cosine) + self.m2
        edge = math.cos((math.pi - self.m2) / self.m1)
        return torch.where(pushed <= math.pi, pushed.cos(), cosine - (1 + edge)) - self.m3

    def _unguarded(self, cosine: Tensor) -> Tensor:
        if self.m1 == 1:
            return add_angle(cosine, self.m2) - self.m3
        return (self.m1 * safe_angle(cosine) + self.m2).cos() - self.m3


@dataclass(frozen=True)
class SphereFace(Margin):
    """Multiplicative angular margin: (-1)^k cos(m theta) - 2k with k = floor(m theta / pi); use it with ``scale=30``.

    Args:
        m: factor of the angle, >= 1.

    Source: Liu et al., SphereFace, arXiv 1704.08063, in the form of SphereFace-R, arXiv 2109.05565.
    """

    m: float = 1.5

    def __post_init__(self) -> None:
        check_number("m", self.m, low=1)

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the map, the same for every batch."""
        return TargetMap(self._map, self._map)

    def _map(self, cosine: Tensor) -> Tensor:
        angle = self.m * safe_angle(cosine)
        k = (angle.detach() / math.pi).floor()
        return (1 - 2 * (k % 2)) * angle.cos() - 2 * k


class AdaFace(StatefulModule, Margin):
    """Margin that adapts to image quality, read off the embedding's norm.

    With g = clip(h (|x| - mu) / (sigma + 1e-3), -1, 1): cos(theta - m g) - m (1 + g), the angle clipped to (0, pi).
    Norms are clipped to [1e-3, 100] and detached; mu and sigma are running statistics of the norms, updated in training
    mode. A batch of one sample leaves them untouched; zero embeddings (ignored samples come in as such) take no part.

    Args:
        m: margin, radians in its angular part, >= 0.
        h: concentration, >= 0.
        momentum: share of the new batch in the running statistics, in (0, 1].

    Buffers: ``mean`` () and ``std`` () float32 whatever ``module.to(dtype)`` says, starting at 20 and 100.

    Source: Kim et al., AdaFace, arXiv 2204.00964.
    """

    KEEPS_DTYPE = ("mean", "std")

    mean: Tensor
    std: Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__()
        check_number("m", m, low=0)
        check_number("h", h, low=0)
        check_number("momentum", momentum, low=0, high=1, open_low=True)
        self.m, self.h, self.momentum = m, h, momentum
        self.register_buffer("mean", torch.empty((), dtype=torch.float32))
        self.register_buffer("std", torch.empty((), dtype=torch.float32))
        self._updated: Replay[None] = Replay("AdaFace's update")
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"m={self.m}, h={self.h}, momentum={self.momentum}"

    def reset_parameters(self) -> None:
        """Start over with the statistics of a new module."""
        self.mean.fill_(20.0)
        self.std.fill_(100.0)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise if these are no mean and standard deviation of norms."""
        for name in ("mean", "std"):
            if name in state:
                check_statistic(name, state[name], low=0)

    @torch.no_grad()
    def _update(self, norm: Tensor, counts: Tensor) -> None:
        number = counts.sum()
        mean = torch.where(counts, norm, 0).sum() / number.clamp(min=1)
        spread = torch.where(counts, norm - mean, 0).square().sum() / (number - 1).clamp(min=1)
        share = torch.where(number > 1, self.momentum, 0.0)
        self.mean.copy_(torch.where(share > 0, share * mean + (1 - share) * self.mean, self.mean))
        self.std.copy_(torch.where(share > 0, share * spread.sqrt() + (1 - share) * self.std, self.std))

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Update the statistics with a batch of norms (B,) and return its margin."""
        raw = embedding_norm.detach()
        norm = raw.clamp(1e-3, 100)
        if self.training:
            counts = (raw > 0) & torch.isfinite(raw)
            self._updated(lambda: self._update(norm, counts), inputs=(raw,), state=(self.mean, self.std))
        g = (self.h * (norm - self.mean.to(norm.dtype)) / (self.std.to(norm.dtype) + 1e-3)).clamp(-1, 1)

        def apply(cosine: Tensor) -> Tensor:
            theta = safe_angle(cosine)
            return (theta - self.m * g).clamp(1e-3, math.pi - 1e-3).cos() - self.m * (1 + g)

        return TargetMap(apply, apply)

    def forward(self, target_cosine: Tensor, embedding_norm: Tensor) -> Tensor:
        """Apply the margin to (B,) cosines of embeddings with these norms (B,)."""
        return self.bind(embedding_norm)(target_cosine)


@dataclass(frozen=True)
class MagFace(Margin):
    """ArcFace with a margin that grows with the embedding's norm, and a regulariser that rewards large norms.

    With a = |x| clipped to [l_a, u_a]: m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a), and the loss of each sample
    gets ``regularizer * (a / u_a**2 + 1 / a)``. The norm is not detached.

    Args:
        l_a: norm at which the margin is smallest, > 0.
        u_a: norm at which it is largest.
        l_m: smallest margin, radians.
        u_m: largest margin, radians.
        regularizer: weight of the regulariser, >= 0.

    Source: Meng et al., MagFace, arXiv 2103.06627.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    regularizer: float = 35.0

    def __post_init__(self) -> None:
        check_number("l_a", self.l_a, low=0, open_low=True)
        check_number("u_a", self.u_a, low=self.l_a, open_low=True)
        _check_angle("l_m", self.l_m)
        _check_angle("u_m", self.u_m)
        check_number("regularizer", self.regularizer, low=0)

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Return the margins that a batch's norms (B,) ask for."""
        a = embedding_norm.clamp(self.l_a, self.u_a)
        return angular(self.l_m + (self.u_m - self.l_m) * (a - self.l_a) / (self.u_a - self.l_a))

    def penalty(self, embedding_norm: Tensor) -> Tensor:
        """Return what is added to each sample's loss (B,)."""
        a = embedding_norm.clamp(self.l_a, self.u_a)
        return self.regularizer * (a / self.u_a**2 + 1 / a)


class ElasticFace(StatefulModule, SeesAllRanks, Margin):
    """ArcFace or CosFace with a margin drawn anew for every sample from a normal distribution.

    Args:
        m: mean of the margin; radians for "arc", a difference of cosines for "cos".
        std: its standard deviation, >= 0.
        kind: "arc" or "cos".
        generator: where the margins are drawn from, on the embeddings' device. Default: PyTorch's own, whose state is
            for the training script to save, as with dropout. In a head with a process group all ranks draw, and rank
            0's margins count on all: one broadcast a step.

    State: with a ``generator`` its state, ``generator_state`` in ``state_dict()``, so that a resumed run draws on.

    Source: Boutros et al., ElasticFace, arXiv 2109.09416.
    """

    def __init__(
        self, m: float = 0.5, std: float = 0.05, kind: str = "arc", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_number("m", m, low=0)
        check_number("std", std, low=0)
        check_choice("kind", kind, ("arc", "cos"))
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.m, self.std, self.kind, self.generator = m, std, kind, generator
        self._drawn: Replay[Tensor] = Replay("ElasticFace's draw")

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"m={self.m}, std={self.std}, kind={self.kind!r}"

    def reset_parameters(self) -> None:
        """Start the generator over at its seed, if there is one."""
        if self.generator is not None:
            self.generator.manual_seed(self.generator.initial_seed())

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Draw the margins of a batch and return the function that applies them."""
        shape, dtype, device = embedding_norm.shape, embedding_norm.dtype, embedding_norm.device

        def draw() -> Tensor:
            drawn = torch.randn(shape, dtype=dtype, device=device, generator=self.generator)
            return self.m + self.std * self.ranks.first_(drawn)

        m = self._drawn(draw, inputs=(embedding_norm,), state=())
        return angular(m) if self.kind == "arc" else subtractive(m)

    def forward(self, target_cosine: Tensor, embedding_norm: Tensor) -> Tensor:
        """Apply the margin to (B,) cosines of embeddings with these norms (B,)."""
        return self.bind(embedding_norm)(target_cosine)

    def check_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raise if the generator's state is none of such a generator's."""
        super().check_state_dict(state_dict, prefix)
        state = state_dict.get(prefix + "generator_state")
        if self.generator is not None and prefix + "generator_state" in state_dict:
            ours = self.generator.get_state()
            if not isinstance(state, Tensor) or state.dtype != ours.dtype or state.shape != ours.shape:
                came = f"{tuple(state.shape)} of {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
                raise RuntimeError(
                    f"state_dict holds no state of ElasticFace: generator_state must be {tuple(ours.shape)} of "
                    f"{ours.dtype}, a generator's on {self.generator.device}, got {came}"
                )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.generator is not None:
            destination[prefix + "generator_state"] = self.generator.get_state()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        key = prefix + "generator_state"
        if self.generator is not None:
            if key in state_dict:
                self.generator.set_state(state_dict.pop(key).cpu())
            elif strict:
                missing_keys.append(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)


@dataclass(frozen=True, eq=False)
class LabelMargins(Margin):
    """ArcFace or CosFace with a margin of its own for each label: larger ones for rare classes, say.

    Args:
        margins: (C,) floating, the margin of each label in [0, C), on the embeddings' device (elsewhere it is copied in
            every step); or a function ``labels (B,) int64 -> margins (B,)``, for identities that are any int64.
            Radians below pi for "arc", differences of cosines for "cos"; >= 0. Ignored samples ask for label 0.
        kind: "arc" or "cos".

    Labels are what the loss was called with: identities in ``PrototypeMemoryLoss``, classes in ``MarginSoftmaxLoss``,
    targets in ``margin_softmax_loss``.

    Raises:
        IndexError: a label >= C (CPU).

    >>> margin = LabelMargins(torch.tensor([0.1, 0.3]), kind="cos").for_labels(torch.tensor([1, 0]))
    >>> margin(torch.tensor([0.5, 0.5]), torch.ones(2))
    tensor([0.2000, 0.4000])

    Source: Ha et al., Google Landmark Recognition 2020, arXiv 2010.05350, whose margins follow the classes' sizes.
    """

    margins: Tensor | Callable[[Tensor], Tensor]
    kind: str = "arc"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("arc", "cos"))
        if isinstance(self.margins, Tensor):
            check_tensor("margins", self.margins, 1, "(C,)", floating=True)
            low, high = (float(value) for value in self.margins.aminmax()) if len(self.margins) else (0.0, 0.0)
            check_number("the smallest of margins", low, low=0)
            if self.kind == "arc":
                _check_angle("the largest of margins", high)
        elif not callable(self.margins):
            raise TypeError(f"margins must be a tensor or a function of labels, got {type(self.margins).__name__}")

    def for_labels(self, labels: Tensor) -> Margin:
        """Return the margin with the labels' own values in place."""
        labels = labels.long().clamp(min=0)
        found = (
            self.margins[labels.to(self.margins.device)] if isinstance(self.margins, Tensor) else self.margins(labels)
        )
        if found.shape != labels.shape:
            raise ValueError(f"margins must give {tuple(labels.shape)}, one for each label, got {tuple(found.shape)}")
        return _MarginOfEach(found.to(labels.device), self.kind)

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        """Refuse: it takes labels to know the margins."""
        raise TypeError("LabelMargins needs labels: for_labels(labels) returns the margin of a batch")


@dataclass(frozen=True, eq=False)
class _MarginOfEach(Margin):
    """``LabelMargins`` of a batch: a margin (B,) for each of its samples."""

    m: Tensor
    kind: str

    def bind(self, embedding_norm: Tensor) -> TargetMap:
        m = self.m.to(embedding_norm.dtype)
        return angular(m) if self.kind == "arc" else subtractive(m)


@dataclass(frozen=True)
class DSoftmax(Margin):
    """No margin, but another loss: softplus(s (d - c)) + softplus(n); use it with ``scale=30``.

    It parts the pull to the target from the push off the negatives, n being the log-sum-exp over the negatives.

    Args:
        d: the cosine from which on a target counts as reached, in [-1, 1].

    Source: He et al., Softmax Dissection, arXiv 1908.01281.
    """

    d: float = 0.9

    has_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("d", self.d, low=-1, high=1)

    def losses(self, excess: Tensor, cosine: Tensor, negatives: Tensor, scale: float) -> Tensor:
        """Return the sum of the two parts (B,)."""
        return softplus(scale * (self.d - cosine)) + softplus(negatives)


def _check_angle(name: str, value: float) -> None:
    check_number(name, value, low=0)
    if value >= math.pi:
        raise ValueError(f"{name} is an angle in radians and must be below pi, got {value} (degrees?)")
