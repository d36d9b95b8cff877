"""pytorch-metric-learning's ``ArcFaceLoss``, ``CosFaceLoss`` and ``CrossBatchMemory``: change the import, nothing else.

The classes derive from the originals, so that reducers, regularisers, miners' tuples, recorded statistics,
``DistributedLossWrapper`` and ``isinstance`` go on as they were. What changes is the step itself: the (B, C) logits are
never materialised, and cosines of exactly 1 have finite gradients. Needs ``pip install pytorch-metric-learning``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protomem_kernels.margins import ArcFace, CosFace, Margin
from protomem_kernels.objective import margin_softmax_loss

try:
    from pytorch_metric_learning import losses as original
    from pytorch_metric_learning.utils.common_functions import labels_required, ref_not_supported
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
except ImportError as error:
    raise ImportError(
        "protomem_kernels.compat.pytorch_metric_learning derives from the library of that name, which is not there: "
        "pip install pytorch-metric-learning"
    ) from error


class _Fused:
    """The step of a margin loss by the fused operator, in place of the one over dense logits."""

    W: nn.Parameter
    scale: float
    margin: float

    def _lay_classes_in_rows(self) -> None:
        """Lay ``W`` (D, C) out so that each class's weights are contiguous: the kernels read classes, not dimensions.

        Shape, values and ``state_dict`` stay as the original has them.
        """
        self.W = nn.Parameter(self.W.detach().t().contiguous().t())

    def _margin(self) -> Margin:
        raise NotImplementedError

    def _check_distance(self) -> None:
        distance: Any = self.distance  # type: ignore[attr-defined]
        if distance.p != 2 or distance.power != 1:
            raise ValueError(
                "distance must be CosineSimilarity() with p=2 and power=1, which the kernels compute, "
                f"got p={distance.p}, power={distance.power}"
            )

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move ``W`` to where the embeddings are; it keeps its dtype, whatever theirs."""
        self.W.data = self.W.data.to(device)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """Return the losses of a batch as the reducers take them."""
        labels_required(labels)
        ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        weights = convert_to_weights(indices_tuple, labels, dtype=torch.promote_types(embeddings.dtype, torch.float32))
        losses, stats = margin_softmax_loss(
            embeddings,
            self.W.t(),
            labels,
            margin=self._margin(),
            scale=float(self.scale),
            normalize_prototypes=True,
            reduction="none",
            return_stats=True,
        )
        if self.collect_stats:  # type: ignore[attr-defined]
            self.avg_angle = float(stats.target_cosine.clamp(-1, 1).acos().rad2deg().mean())
        loss_dict: dict[str, Any] = {
            "loss": {
                "losses": losses * weights,
                "indices": torch.arange(len(labels), device=labels.device),
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())  # type: ignore[attr-defined]
        return loss_dict


class ArcFaceLoss(_Fused, original.ArcFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``ArcFaceLoss`` without the logits.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: degrees, in [0, 180); the attribute ``margin`` is in radians, as the original has it.
        scale: s > 0.
        kwargs: ``reducer``, ``distance`` (``CosineSimilarity`` with p=2 and power=1), ``embedding_regularizer``,
            ``weight_regularizer``, ``weight_init_func``, ``collect_stats`` and their weights, as the original takes
            them.

    Parameter: ``W`` (D, C), by name, shape and initial values the original's; each class's weights are contiguous.

    Shapes:
        ``forward(embeddings (B, D) floating, labels (B,) int in [0, C), indices_tuple=None) -> loss``, float32 or
        float64, reduced as ``reducer`` says. Samples with a negative label have loss 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; ``ref_emb``, as in the original.

    Example:
        >>> loss_fn = ArcFaceLoss(num_classes=3, embedding_size=2, margin=20, scale=8)
        >>> loss_fn(torch.eye(2), torch.tensor([0, 2])).shape
        torch.Size([])

    Source: Deng et al., ArcFace, arXiv 1801.07698.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)
        self._check_distance()
        self._lay_classes_in_rows()

    def _margin(self) -> Margin:
        return ArcFace(float(self.margin))


class CosFaceLoss(_Fused, original.CosFaceLoss):  # type: ignore[misc]
    """pytorch-metric-learning's ``CosFaceLoss`` without the logits.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: a difference of cosines, >= 0.
        scale: s > 0.
        kwargs: as in ``ArcFaceLoss``.

    Parameter, shapes and errors: as in ``ArcFaceLoss``.

    Source: Wang et al., CosFace, arXiv 1801.09414.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, margin=margin, scale=scale, **kwargs)
        self._check_distance()
        self._lay_classes_in_rows()

    def _margin(self) -> Margin:
        return CosFace(float(self.margin))


class CrossBatchMemory(original.CrossBatchMemory):  # type: ignore[misc]
    """pytorch-metric-learning's ``CrossBatchMemory``, whose memory comes back when training goes on.

    The original saves the embeddings in its memory but not how many there are nor where the next one goes, so that a
    resumed run begins with an empty one. Here both travel in the metadata of ``state_dict()``: its keys stay the
    original's, and either class loads what the other has saved. Where the metadata lack (a state of the original's, or
    one that went through a format without them), rows of zeros at the end are taken for empty slots, and a full memory
    is overwritten from its first slot on. The loss inside is the library's own: no kernel of ours runs in it.

    Args:
        loss, embedding_size, memory_size, miner: as the original takes them.

    Example:
        >>> memory = CrossBatchMemory(original.ContrastiveLoss(), embedding_size=2, memory_size=4)
        >>> _ = memory(torch.eye(2), torch.tensor([0, 0]))
        >>> resumed = CrossBatchMemory(original.ContrastiveLoss(), embedding_size=2, memory_size=4)
        >>> resumed.load_state_dict(memory.state_dict())
        <All keys matched successfully>
        >>> resumed.queue_idx
        2

    Source: Wang et al., Cross-Batch Memory, arXiv 1912.06798.
    """

    queue_idx: int
    has_been_filled: bool

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        place = {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix.removesuffix("."), {}).update(place)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if prefix + "embedding_memory" not in state_dict:
            return
        if "queue_idx" in local_metadata:
            self.queue_idx, self.has_been_filled = local_metadata["queue_idx"], local_metadata["has_been_filled"]
        else:
            filled = (self.embedding_memory != 0).any(dim=1).nonzero()
            used = int(filled[-1]) + 1 if len(filled) else 0
            self.queue_idx, self.has_been_filled = used % self.memory_size, used == self.memory_size
