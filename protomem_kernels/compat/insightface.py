"""insightface's ``PartialFC_V2`` and its margin losses (arcface_torch): change the import, nothing else.

``PartialFC_V2`` is ``MarginSoftmaxLoss`` by that name: classes spread over the ranks of the world, each step over a
sample of them, one all-reduce of three numbers per sample in place of the logits of all ranks' batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protomem_kernels._checks import check_choice, check_number
from protomem_kernels._warnings import warn_caller
from protomem_kernels.losses import MarginSoftmaxLoss
from protomem_kernels.margins import ArcFace as ArcFaceMargin
from protomem_kernels.margins import CombinedMargin, Margin
from protomem_kernels.margins import CosFace as CosFaceMargin
from protomem_kernels.mining import MiningRule, NoisyNegativeFilter

GRADIENTS = ("straight_through", "exact")


class MarginLoss(nn.Module):
    """What ``PartialFC_V2`` takes for its ``margin_loss``: a margin, its scale and a filter of negatives.

    Attributes:
        s: the scale.
    """

    s: float

    def margin_of_targets(self) -> Margin:
        """Return the margin on target cosines."""
        raise NotImplementedError

    def filter_of_negatives(self) -> MiningRule | None:
        """Return which negatives are left out, or None."""
        return None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return scaled logits with the margin in them, for whoever has the cosines; the arguments stay as they are.

        Args:
            logits: (B, C) cosines.
            labels: (B,) or (B, 1) int64; -1: no target among these.
        """
        labels = labels.reshape(-1)
        rows = (labels != -1).nonzero()[:, 0]
        at = rows, labels[rows]
        target = logits[at]
        rule = self.filter_of_negatives()
        if isinstance(rule, NoisyNegativeFilter):
            logits = torch.where(logits.detach() > rule.threshold, 0, logits)
        return self.s * logits.index_put(at, self.margin_of_targets()(target, torch.ones_like(target)))


class CombinedMarginLoss(MarginLoss):
    """insightface's ``CombinedMarginLoss``: ArcFace for (1, m2, 0), CosFace for (m1, m2, m3 > 0).

    Args:
        s: scale > 0.
        m1: factor of the angle; other than 1 with m3 = 0, where the original raises, it is ``CombinedMargin``.
        m2: angle added, radians in [0, pi).
        m3: cosine subtracted, >= 0; where it is not 0, m1 and m2 count for nothing, as in the original, and a warning
            says so (``protomem_kernels.CombinedMargin`` has all three).
        interclass_filtering_threshold: negatives with a larger cosine count as cosine 0; 0: none.
        gradient: of ArcFace: "straight_through", the original's, takes cos(theta + m) for cos(theta) in the backward
            pass, and its value has no guard past theta + m = pi; "exact" differentiates it, with ArcFace's guard.

    Shapes:
        ``forward(logits (B, C), labels (B,) or (B, 1)) -> (B, C)``.

    Raises:
        TypeError, ValueError: a wrong type or range.

    Example:
        >>> CombinedMarginLoss(10, 1.0, 0.0, 0.4)(torch.tensor([[0.75, 0.25]]), torch.tensor([0])).round(decimals=4)
        tensor([[3.5000, 2.5000]])

    Source: Deng et al., ArcFace, arXiv 1801.07698; the filter: An et al., Partial FC, arXiv 2203.15565.
    """

    def __init__(
        self,
        s: float,
        m1: float,
        m2: float,
        m3: float,
        interclass_filtering_threshold: float = 0,
        *,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        check_number("s", s, low=0, open_low=True)
        check_number("m1", m1, low=1)
        check_number("m2", m2, low=0)
        check_number("m3", m3, low=0)
        check_number("interclass_filtering_threshold", interclass_filtering_threshold, low=0, high=1)
        check_choice("gradient", gradient, GRADIENTS)
        self.s, self.m1, self.m2, self.m3, self.gradient = s, m1, m2, m3, gradient
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.margin_of_targets()
        if m3 > 0 and (m1 != 1 or m2 != 0):
            warn_caller(
                f"CombinedMarginLoss: with m3 = {m3:g} insightface leaves m1 = {m1:g} and m2 = {m2:g} out, and so does "
                "this; say m1=1, m2=0, or take protomem_kernels.CombinedMargin for all three"
            )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        filtered = self.interclass_filtering_threshold
        also = f", interclass_filtering_threshold={filtered:g}" if filtered else ""
        return f"s={self.s:g}, m1={self.m1:g}, m2={self.m2:g}, m3={self.m3:g}{also}, gradient={self.gradient!r}"

    def margin_of_targets(self) -> Margin:
        """Return the margin that these numbers stand for."""
        if self.m3 > 0:
            return CosFaceMargin(float(self.m3))
        if self.m1 == 1:
            return ArcFaceMargin(float(self.m2), straight_through=self.gradient == "straight_through")
        return CombinedMargin(float(self.m1), float(self.m2))

    def filter_of_negatives(self) -> MiningRule | None:
        """Return the filter, if there is one."""
        threshold = float(self.interclass_filtering_threshold)
        return NoisyNegativeFilter(threshold) if threshold > 0 else None


class ArcFace(MarginLoss):
    """insightface's ``ArcFace``.

    Args:
        s: scale > 0.
        margin: radians in [0, pi).
        gradient: as in ``CombinedMarginLoss``.
    """

    def __init__(self, s: float = 64.0, margin: float = 0.5, *, gradient: str = "straight_through") -> None:
        super().__init__()
        check_number("s", s, low=0, open_low=True)
        check_choice("gradient", gradient, GRADIENTS)
        self.s, self.margin, self.gradient = s, margin, gradient
        self.margin_of_targets()

    def margin_of_targets(self) -> Margin:
        """Return the margin."""
        return ArcFaceMargin(float(self.margin), straight_through=self.gradient == "straight_through")


class CosFace(MarginLoss):
    """insightface's ``CosFace``.

    Args:
        s: scale > 0.
        m: a difference of cosines, >= 0.
    """

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__()
        check_number("s", s, low=0, open_low=True)
        self.s, self.m = s, m
        self.margin_of_targets()

    def margin_of_targets(self) -> Margin:
        """Return the margin."""
        return CosFaceMargin(float(self.m))


# Their own classes, by name, and the attributes that say what they compute.
_THEIRS: dict[str, tuple[type[MarginLoss], tuple[str, ...]]] = {
    "CombinedMarginLoss": (CombinedMarginLoss, ("s", "m1", "m2", "m3", "interclass_filtering_threshold")),
    "ArcFace": (ArcFace, ("s", "margin")),
    "CosFace": (CosFace, ("s", "m")),
}


def as_margin_loss(margin_loss: Any) -> MarginLoss:
    """Return a margin loss of insightface's or of this file as one of this file.

    Raises:
        TypeError: another one: a function of dense logits, which are never there.
    """
    if isinstance(margin_loss, MarginLoss):
        return margin_loss
    kind, attributes = _THEIRS.get(type(margin_loss).__name__, (None, ()))
    if kind is None or not all(hasattr(margin_loss, name) for name in attributes):
        raise TypeError(
            f"margin_loss must be CombinedMarginLoss, ArcFace or CosFace, of insightface or of this package, got "
            f"{type(margin_loss).__name__}: a function of the logits needs them all. A margin of your own is a "
            "function of the target cosine in protomem_kernels.MarginSoftmaxLoss(margin=...)"
        )
    return kind(*(getattr(margin_loss, name) for name in attributes))


class PartialFC_V2(MarginSoftmaxLoss):  # noqa: N801  # insightface's name
    """insightface's ``PartialFC_V2`` without the logits, over all ranks of the world.

    Args:
        margin_loss: ``CombinedMarginLoss``, ``ArcFace`` or ``CosFace`` of this file, or insightface's own objects of
            these names, whose numbers are read. They are read in every step, so that a schedule may change them.
        embedding_size: D.
        num_classes: C, of all ranks together.
        sample_rate: in (0, 1]; below 1 a step in training mode runs over int(sample_rate * num_local) of each rank's
            classes, those of the batch among them (more only where the batch has more).
        fp16: kept as an attribute; what is computed does not change (float32 sums whatever the embeddings' dtype).
        process_group: over whose ranks the classes are spread. Default: the world where ``torch.distributed`` is
            initialised, else this process alone.

    Attributes:
        weight: (num_local, D) parameter: classes ``class_start`` to ``class_start + num_local``, by name and layout the
            original's, so that ``state_dict()`` of each rank goes both ways.
        rank: as in the original, and so are ``world_size``, ``num_local``, ``class_start`` and ``num_sample``.
        weight_index: (K,) the rows of ``weight`` that the last step ran over, where ``sample_rate`` < 1.

    Shapes:
        ``forward(local_embeddings (B, D) floating, local_labels (B,) or (B, 1) int) -> ()``, the mean over the samples
        of all ranks; the embeddings' gradient is that of the mean times ``world_size``, for ``DistributedDataParallel``
        to average. Negative labels are ignored. B may differ from step to step and from rank to rank.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> head = PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.5, 0.0), embedding_size=4, num_classes=10)
        >>> head(torch.randn(2, 4), torch.tensor([3, 9])).shape
        torch.Size([])

    Source: An et al., Partial FC, arXiv 2203.15565.
    """

    weight_index: Tensor

    def __init__(
        self,
        margin_loss: Any,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        taken = as_margin_loss(margin_loss)
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        super().__init__(
            num_classes,
            embedding_size,
            margin=taken.margin_of_targets(),
            scale=taken.s,
            mining=taken.filter_of_negatives(),
            sample_rate=sample_rate,
            process_group=process_group,
        )
        self.margin_softmax, self.embedding_size, self.fp16 = margin_loss, embedding_size, fp16
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.num_local, self.class_start = len(self.weight), self.first_class
        self.num_sample = int(self.sample_rate * self.num_local)

    def forward(  # type: ignore[override]  # its arguments have insightface's names
        self, local_embeddings: Tensor, local_labels: Tensor, **options: Any
    ) -> Any:
        """Return the mean loss of all ranks' samples; options as in ``MarginSoftmaxLoss``."""
        taken = as_margin_loss(self.margin_softmax)
        self.margin, self.scale, self.mining = taken.margin_of_targets(), float(taken.s), taken.filter_of_negatives()
        if isinstance(local_labels, Tensor) and local_labels.ndim == 2 and local_labels.shape[1] == 1:
            local_labels = local_labels[:, 0]
        return super().forward(local_embeddings, local_labels, **options)

    @torch.no_grad()
    def sampled_classes(self, targets: Tensor) -> Tensor:
        """Draw the rows of ``weight`` that a step runs over, as the original does from a generator in the same state.

        Args:
            targets: (N,) int64 rows of ``weight`` that must be among them; -1 is none.
        """
        count = max(self.num_sample, 1)
        if len(targets) > count:  # only then can the targets be too many, and only then their number is read back
            positive: Tensor = targets[targets >= 0].unique()
            if len(positive) > count:
                self.weight_index = positive
                return positive
        order = torch.rand(self.num_local, device=targets.device)
        order = torch.cat([order, order.new_zeros(1)])  # the last place is for samples whose class is not here
        order = order.index_fill(0, torch.where(targets < 0, self.num_local, targets), 2.0)[: self.num_local]
        self.weight_index = order.topk(count).indices.sort().values
        return self.weight_index
