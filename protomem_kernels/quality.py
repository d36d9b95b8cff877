"""Quality estimators: how much each image counts when a prototype is made of its identity's images.

An estimator is any callable ``(embeddings (B, D), labels (B,)) -> weights (B,)`` with weights >= 0; better images weigh
more. The weights are detached unless ``detach=False``. Samples with a negative label get 0.

Source: Smirnov et al., Quality-Aware Prototype Memory, arXiv 2311.07734.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protomem_kernels._checks import check_batch, check_choice, check_int, check_number, check_tensor
from protomem_kernels._torch import without_autocast
from protomem_kernels.distributed.agreement import Agreement
from protomem_kernels.distributed.ranks import SeesAllRanks
from protomem_kernels.recomputation import Replay
from protomem_kernels.rows import unit_embeddings
from protomem_kernels.state import StatefulModule, check_statistic

QualityEstimator = Callable[[Tensor, Tensor], Tensor]


def _finish(weights: Tensor, labels: Tensor, detach: bool) -> Tensor:
    weights = torch.where((labels >= 0) & torch.isfinite(weights), weights, 0)
    return weights.detach() if detach else weights


@dataclass(frozen=True)
class NormQuality:
    """q = (|x| / max |x|)^power: encoders trained with a softmax give clear images longer embeddings.

    Args:
        power: exponent, >= 0.
        detach: keep the weights out of the gradient.

    >>> NormQuality()(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1, 1]))
    tensor([1.0000, 0.2000])
    """

    power: float = 1.0
    detach: bool = True

    def __post_init__(self) -> None:
        check_number("power", self.power, low=0)

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the weights (B,)."""
        labels = check_batch(embeddings, labels)
        _, norm = unit_embeddings(embeddings)
        usable = (labels >= 0) & torch.isfinite(norm)
        largest = torch.where(usable, norm, 0).max() if norm.numel() else norm.new_ones(())
        ratio = norm / torch.where(largest > 0, largest, 1)
        # A zero embedding has weight 0 (for any power > 0) and no gradient to speak of: keep pow away from 0.
        positive = torch.where(ratio > 0, ratio, 1) ** self.power
        return _finish(torch.where(ratio > 0, positive, float(self.power == 0)), labels, self.detach)


class RecognizabilityQuality(StatefulModule, SeesAllRanks):
    """q = clip(1 - <x, u>, 0, 1), u the running prototype of unrecognizable images that the user feeds.

    Args:
        embedding_dim: D.
        mode: "soft" for q itself, "hard" for 1 where q >= threshold and 0 elsewhere.
        threshold: for "hard", in [0, 1].
        momentum: share of a new batch of unrecognizable images in u, in (0, 1].
        detach: keep the weights out of the gradient.

    Buffer: ``unrecognizable`` (D,) float32 whatever ``module.to(dtype)`` says, zero (every weight is 1) until
    ``update_unrecognizable`` was called.
    """

    KEEPS_DTYPE = ("unrecognizable",)

    unrecognizable: Tensor

    def __init__(
        self,
        embedding_dim: int,
        mode: str = "soft",
        threshold: float = 0.5,
        momentum: float = 0.1,
        detach: bool = True,
    ) -> None:
        super().__init__()
        check_int("embedding_dim", embedding_dim, at_least=1)
        check_choice("mode", mode, ("soft", "hard"))
        check_number("threshold", threshold, low=0, high=1)
        check_number("momentum", momentum, low=0, high=1, open_low=True)
        self.mode, self.threshold, self.momentum, self.detach = mode, threshold, momentum, detach
        self.register_buffer("unrecognizable", torch.zeros(embedding_dim, dtype=torch.float32))
        self._updated: Replay[None] = Replay("update_unrecognizable")

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"embedding_dim={self.unrecognizable.shape[0]}, mode={self.mode!r}, threshold={self.threshold}"

    def reset_parameters(self) -> None:
        """Forget the unrecognizable images: every weight is 1 again."""
        self.unrecognizable.zero_()

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise if this is no direction."""
        if "unrecognizable" in state:
            check_statistic("unrecognizable", state["unrecognizable"], low=-1.01, high=1.01)  # rounded, maybe coarsely

    def update_unrecognizable(self, embeddings: Tensor) -> None:
        """Move u towards the mean direction of embeddings (N, D) of images that nobody could recognize.

        In a head with a process group it is collective: every rank calls with its own images, maybe none.
        """
        if self.ranks.alone:
            self._check(embeddings)
        else:
            Agreement(self.ranks)(
                self.unrecognizable.device,
                lambda: self._check(embeddings),
                lambda _: len(embeddings),
                lambda _: {"the call": "update_unrecognizable", "momentum": self.momentum, "mode": self.mode},
            )
        self._updated(lambda: self._update(embeddings), inputs=(embeddings,), state=(self.unrecognizable,))

    @torch.no_grad()
    def _update(self, embeddings: Tensor) -> None:
        x, _ = unit_embeddings(embeddings)
        finite = torch.isfinite(x).all(dim=1, keepdim=True)
        u, _ = unit_embeddings(self.ranks.sum_(torch.where(finite, x, 0).sum(dim=0, keepdim=True)))
        known = (self.unrecognizable != 0).any()
        moved = torch.where(known, (1 - self.momentum) * self.unrecognizable + self.momentum * u[0], u[0])
        moved, _ = unit_embeddings(moved[None])
        self.unrecognizable.copy_(torch.where((u != 0).any(), moved[0], self.unrecognizable))

    def _check(self, embeddings: Tensor) -> None:
        check_tensor("embeddings", embeddings, 2, "(B, D)", floating=True)
        if embeddings.shape[1] != self.unrecognizable.shape[0]:
            raise ValueError(
                f"embeddings must have shape (B, {self.unrecognizable.shape[0]}) to match embedding_dim, "
                f"got {tuple(embeddings.shape)}"
            )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the weights (B,)."""
        self._check(embeddings)
        labels = check_batch(embeddings, labels)
        x, _ = unit_embeddings(embeddings)
        quality = (1 - (x * self.unrecognizable.to(x.dtype)).sum(dim=1)).clamp(0, 1)
        if self.mode == "hard":
            quality = (quality >= self.threshold).to(quality.dtype)
        return _finish(quality, labels, self.detach)


@dataclass(frozen=True)
class CenterQuality:
    """q = max(0, cos(x_i, mean of the other images of its identity)); 1 for an only image.

    Args:
        detach: keep the weights out of the gradient.
    """

    detach: bool = True

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the weights (B,)."""
        labels = check_batch(embeddings, labels)
        x, _ = unit_embeddings(embeddings)
        x = torch.where(torch.isfinite(x).all(dim=1, keepdim=True), x, 0)
        same = _same_identity(labels).to(x.dtype)
        with without_autocast(x):
            others, _ = unit_embeddings(same @ x - x)
        alone = same.sum(dim=1) <= 1
        return _finish(torch.where(alone, 1, (x * others).sum(dim=1).clamp(min=0)), labels, self.detach)


class SoftmaxQuality(nn.Module):
    """q = softmax of another estimator's weights over the images of an identity, at a temperature.

    Args:
        base: the other estimator.
        temperature: > 0; small: the best image takes all, large: all alike.
        detach: keep the weights out of the gradient (the base's own ``detach`` counts as well).
    """

    def __init__(self, base: QualityEstimator, temperature: float = 0.1, detach: bool = True) -> None:
        super().__init__()
        if not callable(base):
            raise TypeError(f"base must be a quality estimator, got {type(base).__name__}")
        check_number("temperature", temperature, low=0, open_low=True)
        self.base, self.temperature, self.detach = base, temperature, detach  # a base with state is saved with us

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        base = "" if isinstance(self.base, nn.Module) else f"base={self.base!r}, "
        return f"{base}temperature={self.temperature}"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the weights (B,); those of one identity sum to 1."""
        labels = check_batch(embeddings, labels)
        score = self.base(embeddings, labels) / self.temperature
        rivals = torch.where(_same_identity(labels), score[None, :], float("-inf"))
        return _finish((score - rivals.logsumexp(dim=1)).exp(), labels, self.detach)


def _same_identity(labels: Tensor) -> Tensor:
    """Return (B, B) bool: the two samples have the same label >= 0; every sample is its own."""
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None]
    return same | torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
