"""How fast stored prototypes go stale: their cosine with what today's encoder makes of the same images, by their age.

The age of a prototype is how many steps ago its identity was last in a batch. The re-computed one is the mean of the
unit embeddings of some of its identity's images. A stored one is no such mean to begin with (it was made in training
mode, of fewer images; a class weight is not made of images at all), so what counts is how it falls with age.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from protomem_kernels.experiments.images import Images
from protomem_kernels.experiments.learning import Learner, embed

LOOKS = (0.25, 0.5, 0.75)  # parts of the training after which is looked; at its end nothing moves any more
IDENTITIES, IMAGES = 500, 8  # that are looked at, at most
COSINE = "cosine_at_age_"  # begins the names of the figures


class Ages:
    """Looks at the stored prototypes of a trial."""

    def __init__(self, images: Images, labels: Tensor, steps: int) -> None:
        self.images, self.labels = images, labels
        self._found: dict[int, list[float]] = defaultdict(list)  # cosines by age
        self._last = torch.full((int(labels.max()) + 1,), -1)
        self._when = {round(part * steps) for part in LOOKS}

    def look(self, learner: Learner, labels: Tensor) -> None:
        """Take note of who was in the batch of the step that was just taken, and look if it is time."""
        step = learner.steps - 1
        self._last[labels] = step
        if step in self._when:
            self._look(step, learner)

    @torch.no_grad()
    def _look(self, step: int, learner: Learner) -> None:
        met = (self._last >= 0).nonzero().flatten()
        stored, there = learner.head.prototypes(met)
        met, stored = met[there], stored[there]
        some = torch.randperm(len(met), generator=torch.Generator().manual_seed(step))[:IDENTITIES]
        theirs = [(self.labels == label).nonzero().flatten()[:IMAGES] for label in met[some]]
        rows = embed(learner.encoder, self.images.of(torch.cat(theirs))).split([len(images) for images in theirs])
        made = torch.stack([images.mean(0) for images in rows])
        cosines = F.cosine_similarity(stored[some], made).tolist()
        for age, cosine in zip((step - self._last[met[some]]).tolist(), cosines, strict=True):
            self._found[_rounded(age)].append(cosine)

    def figures(self) -> dict[str, float]:
        """Return the mean cosine by age; ages are rounded down to powers of two."""
        return {f"{COSINE}{age}": statistics.fmean(cosines) for age, cosines in sorted(self._found.items())}


def _rounded(age: int) -> int:
    return 1 << (age.bit_length() - 1) if age else 0
