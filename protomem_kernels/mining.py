"""Mining rules: which negatives, or which samples, count for more or for nothing.

A rule reshapes negatives above a threshold, chooses a few of them, or keeps a share of the samples: each is a method of
``MiningRule`` whose default does nothing. Those without state are frozen dataclasses. A new one is a class here that
overrides one of them, a test and a line in the docs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from protomem_kernels._checks import check_choice, check_int, check_number
from protomem_kernels.distributed.ranks import ranks_of
from protomem_kernels.margins import TargetMap
from protomem_kernels.recomputation import Replay
from protomem_kernels.state import StatefulModule, check_statistic
from protomem_kernels.types import HardNegativeForm

# Of each bank of prototypes, the slots (B, k) that count as negatives of each sample; -1 is none.
Chosen: TypeAlias = list[Tensor]


class MiningRule:
    """What a loss may ask of a mining rule. Every default does nothing: a subclass overrides what it has to say.

    What costs a pass over prototypes is handed in as a function, for the rule to call if it needs it.
    """

    def hard_negatives(
        self, target_cosine: Callable[[], Tensor], counts: Tensor, target_map: TargetMap
    ) -> HardNegativeForm | None:
        """Return how negatives above a threshold are reshaped in this batch, or None.

        Args:
            target_cosine: returns the samples' target cosines (B,), detached.
            counts: (B,) bool, False for ignored samples.
            target_map: the loss's margin, bound to the batch.
        """
        return None

    def chosen_negatives(self, hardest: Callable[[int], Chosen]) -> Chosen | None:
        """Return the negatives that enter the sum, or None for all.

        Args:
            hardest: returns the k hardest negatives over all banks.
        """
        return None

    def kept(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return which samples' losses stay (B,) bool, given losses (B,) and which are not ignored (B,)."""
        return counts


@dataclass(frozen=True)
class MVSoftmax(MiningRule):
    """Emphasise misclassified negatives: where cos > T(c), the negative becomes (t + 1) cos + t ("adaptive").

    Args:
        t: emphasis, >= 0.
        kind: "adaptive", or "fixed" for cos + t.

    Source: Wang et al., Mis-classified Vector Guided Softmax, arXiv 1912.00833.
    """

    t: float = 0.2
    kind: str = "adaptive"

    def __post_init__(self) -> None:
        check_number("t", self.t, low=0)
        check_choice("kind", self.kind, ("adaptive", "fixed"))

    def hard_negatives(
        self, target_cosine: Callable[[], Tensor], counts: Tensor, target_map: TargetMap
    ) -> HardNegativeForm:
        """Return tau = T(c) and the linear form."""
        cosine = target_cosine()
        a = self.t + 1 if self.kind == "adaptive" else 1.0
        # Filled in on the device: a copy from the host would synchronise, and a CUDA graph cannot capture it.
        form = torch.stack([cosine.new_full((), value) for value in (a, self.t, 0.0)])
        # For cos >= -1, a cos + t >= -1.
        return HardNegativeForm(target_map(cosine), form, -1.0, a + self.t, a)


class CurricularFace(StatefulModule, MiningRule):
    """Ignore hard negatives early and emphasise them late: where cos > cos(theta + m), it becomes cos (t + cos).

    In training mode t <- momentum mean(c) + (1 - momentum) t before it is used, over the samples that are not ignored.
    cos(theta + m) is the margin without its guard.

    Args:
        momentum: share of the new batch in t, in (0, 1].
        process_group: of ``torch.distributed``; the mean is then over all its ranks' samples, one all-reduce of two
            numbers a step. Default: this process alone, without any collective; in a head with a process group, which
            shows the rule the batch of all its ranks, that is the mean over them.

    Buffer: ``t`` () float32 whatever ``module.to(dtype)`` says, starting at 0.

    Source: Huang et al., CurricularFace, arXiv 2004.00288.
    """

    KEEPS_DTYPE = ("t",)

    t: Tensor

    def __init__(self, momentum: float = 0.01, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        check_number("momentum", momentum, low=0, high=1, open_low=True)
        self.momentum, self.process_group = momentum, process_group
        self._ranks = ranks_of(process_group)
        self.register_buffer("t", torch.zeros((), dtype=torch.float32))
        self._updated: Replay[None] = Replay("CurricularFace's update")

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"momentum={self.momentum}"

    def reset_parameters(self) -> None:
        """Start over with t = 0."""
        self.t.zero_()

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise if t is no mean of cosines."""
        if "t" in state:
            check_statistic("t", state["t"], low=-1.01, high=1.01)  # prototypes are rounded, maybe coarsely

    @torch.no_grad()
    def _update(self, cosine: Tensor, counts: Tensor) -> None:
        usable = counts & torch.isfinite(cosine)
        sums = torch.stack([torch.where(usable, cosine, 0).sum(), usable.sum().to(cosine.dtype)])
        sums = self._ranks.sum_(sums)
        moved = self.momentum * sums[0] / sums[1].clamp(min=1) + (1 - self.momentum) * self.t
        self.t.copy_(torch.where(sums[1] > 0, moved, self.t))

    def hard_negatives(
        self, target_cosine: Callable[[], Tensor], counts: Tensor, target_map: TargetMap
    ) -> HardNegativeForm:
        """Update t and return tau = cos(theta + m) and the quadratic form."""
        cosine = target_cosine()
        if self.training:
            self._updated(lambda: self._update(cosine, counts), inputs=(cosine, counts), state=(self.t,))
        t = self.t.to(cosine.dtype)
        coefficients = torch.stack([t, torch.zeros_like(t), torch.ones_like(t)])
        # t is a mean of cosines: |t| <= 1, so cos (t + cos) lies in [-1/4, 2] and its slope in [-3, 3].
        return HardNegativeForm(target_map.unguarded(cosine), coefficients, -1.0, 2.0, 3.0)


@dataclass(frozen=True)
class NoisyNegativeFilter(MiningRule):
    """Take negatives above the threshold for mislabelled twins of the sample: they count as cos = 0.

    Args:
        threshold: cosine in [-1, 1].

    Source: the inter-class filter of An et al., Partial FC, arXiv 2203.15565.
    """

    threshold: float = 0.4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, low=-1, high=1)

    def hard_negatives(
        self, target_cosine: Callable[[], Tensor], counts: Tensor, target_map: TargetMap
    ) -> HardNegativeForm:
        """Return the same tau for every sample and the zero form."""
        cosine, highest = target_cosine(), max(self.threshold, 0.0)
        return HardNegativeForm(torch.full_like(cosine, self.threshold), cosine.new_zeros(3), -1.0, highest, 1.0)


@dataclass(frozen=True)
class HardestNegatives(MiningRule):
    """Only each sample's k hardest negatives enter the sum: exact top-k, and a gradient that touches only them.

    Args:
        k: how many, >= 1.
    """

    k: int = 64

    def __post_init__(self) -> None:
        check_int("k", self.k, at_least=1)

    def chosen_negatives(self, hardest: Callable[[int], Chosen]) -> Chosen:
        """Return the k hardest."""
        return hardest(self.k)


@dataclass(frozen=True)
class HardSamples(MiningRule):
    """The loss averages the hardest share of the samples (online hard example mining); the others' losses are 0.

    Args:
        keep: share of the samples that are not ignored, in (0, 1]; rounded up to whole samples.

    Source: Shrivastava et al., OHEM, arXiv 1604.03540.
    """

    keep: float = 0.9

    def __post_init__(self) -> None:
        check_number("keep", self.keep, low=0, high=1, open_low=True)

    def kept(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return which samples stay (B,) bool, given losses (B,) and which are not ignored (B,); ties: the earlier."""
        ranked = torch.where(counts, losses.detach(), float("-inf")).argsort(descending=True, stable=True)
        rank = torch.empty_like(ranked).scatter_(0, ranked, torch.arange(ranked.shape[0], device=ranked.device))
        keep = (self.keep * counts.sum().double() - 1e-9).ceil().clamp(min=1)  # 0.55 * 100 is a little more than 55
        return counts & (rank < keep)
