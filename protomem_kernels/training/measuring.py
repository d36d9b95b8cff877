"""What verifies a run: all pairs of the unseen identities, or a list of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from protomem_kernels.training.faces import Faces

if TYPE_CHECKING:
    from protomem_kernels.data.evaluation import HardestPairs, VerificationResult


def measure(embeddings: Tensor, faces: Faces) -> VerificationResult:
    """Return the figures of (N, D) embeddings of the images that verify, in their order."""
    from protomem_kernels.data.evaluation import evaluate, evaluate_pairs

    assert faces.unseen is not None
    if faces.pairs is None:
        return evaluate(embeddings, faces.unseen.labels, faces.config.seed)
    labels = faces.unseen.labels if faces.identities_known else None
    return evaluate_pairs(embeddings, faces.pairs, faces.config.seed, labels=labels)


def hardest(embeddings: Tensor, faces: Faces, count: int) -> HardestPairs:
    """Return the pairs that these embeddings judge worst, so many of each kind."""
    from protomem_kernels.data.evaluation import hardest_listed_pairs, hardest_pairs

    assert faces.unseen is not None
    if faces.pairs is None:
        return hardest_pairs(embeddings, faces.unseen.labels, count)
    return hardest_listed_pairs(embeddings, faces.pairs, count)
