"""Validation while a run trains: is the averaged encoder better than it was, and is it time to stop?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from protomem_kernels.training import runs
from protomem_kernels.training.embedding import embed
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.measuring import measure
from protomem_kernels.training.steps import Training
from protomem_kernels.training.trained import save_encoder

if TYPE_CHECKING:
    from protomem_kernels.data.evaluation import VerificationResult


class Validations(NamedTuple):
    """What the validations of a run so far have found.

    Attributes:
        best_step: after which the encoder was best; 0: none was looked at yet. Of equally good ones the first.
        accuracy: its verification accuracy.
        auc: its area under the ROC, which decides between equal accuracies.
        since: how many validations ago that was.
        last: the verification accuracy of the last one.
    """

    best_step: int = 0
    accuracy: float = -1.0
    auc: float = -1.0
    since: int = 0
    last: float = -1.0

    def then(self, step: int, result: VerificationResult) -> Validations:
        """Return this after one more of them."""
        if (result.verification_accuracy, result.auc) > (self.accuracy, self.auc):
            return Validations(step, result.verification_accuracy, result.auc, 0, result.verification_accuracy)
        return self._replace(since=self.since + 1, last=result.verification_accuracy)

    def over(self, patience: int) -> bool:
        """Say whether ``patience`` validations in a row were no better than the best; 0: never."""
        return 0 < patience <= self.since

    @classmethod
    def from_checkpoint(cls, values: Any) -> Validations:
        """Return what a checkpoint holds as a list of numbers.

        Raises:
            ValueError: it is none.
        """
        if type(values) is not list or [type(value) for value in values] != [int, float, float, int, float]:
            raise ValueError(f"validations must be a step, two figures, a number and a figure, got {values!r:.80}")
        return cls(*values)


def validate(training: Training, faces: Faces, folder: Path, so_far: Validations) -> Validations:
    """Verify the averaged encoder as it is; leave it in the run's folder if it is the best so far."""
    embeddings = embed(training.average, (images for images, _ in faces.unseen_batches()), training.device)
    now = so_far.then(training.step, measure(embeddings, faces))
    if now.best_step == training.step:
        save_encoder(folder / runs.ENCODER, training, faces.transform)
    return now
