"""The images of a trial: identities that train, identities on which options are chosen, identities that are measured.

No identity is in two of the three sets, and all trials of a data set and of one number of identities share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels.data.degradations import degrade_share
from protomem_kernels.data.glyphs import glyph_images
from protomem_kernels.data.images import orl_faces
from protomem_kernels.data.reading import read_all
from protomem_kernels.data.sources import labelled_images
from protomem_kernels.data.splits import split_by_identity
from protomem_kernels.experiments.trial import Trial
from protomem_kernels.training.errors import RunError

SPLIT, DAMAGE = 0, 1  # seeds
HANGUL = "hangul"


class Images(NamedTuple):
    """N images and whose they are."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    quality: Tensor  # (N,) float32 in [0, 1], 1 where nothing was done to the image

    def of(self, chosen: Tensor) -> Images:
        """Return some of them, by position."""
        return Images(*(part[chosen] for part in self))

    def floats(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Return (n, C, H, W) float32 in [0, 1], by position."""
        return self.pixels[chosen].float().div_(255)


class Sets(NamedTuple):
    """Three sets of images, of disjoint identities."""

    train: Images
    validation: Images
    test: Images


def prepare(trial: Trial, progress: Callable[[int, int], object]) -> list[str]:
    """Make what the trials of a data set read, unless it is there; return what there is to say of it, a line each.

    Args:
        trial: any of them.
        progress: is called with how much is done and how much there is, if anything is made.

    Raises:
        DatasetError: it cannot be made.
    """
    if trial.data != HANGUL:
        return []
    made = False

    def noted(done: int, total: int) -> None:
        nonlocal made
        made = True
        progress(done, total)

    glyphs = glyph_images(trial.fonts or None, size=trial.image_size[0], progress=noted)
    return [*glyphs.notes, *(map(str, glyphs.tally) if made else [])]


def read_sets(trial: Trial) -> Sets:
    """Return the images of a trial. Where it says damaged, a share of those that train is, with known quality.

    Raises:
        RunError: there are fewer identities than it asks for.
        DatasetError: the images cannot be used.
    """
    found = _read(trial)
    identities, counts = found.labels.unique(return_counts=True)
    usable = torch.isin(found.labels, identities[counts > 1]).nonzero().flatten()
    total = int((counts > 1).sum())
    test, validation = trial.test_identities, trial.validation_identities
    train = trial.identities or total - test - validation
    if train < 2 or train + test + validation > total:
        raise RunError(
            f"{trial.data} has {total} identities of two images or more; {train} to train, {validation} for validation "
            f"and {test} for the test do not fit"
        )
    # The test comes first, so that it stays the same whoever trains.
    shares = (test / total, validation / total, 1 - (test + validation) / total)
    chosen = [usable[part] for part in split_by_identity(found.labels[usable], shares, seed=SPLIT)]
    some = found.labels[chosen[2]].unique()
    some = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(SPLIT))[:train]]
    seen = found.of(chosen[2][torch.isin(found.labels[chosen[2]], some)])
    measured = [found.of(part) for part in chosen[:2]]
    if trial.images_tested:
        measured = [at_most(images, trial.images_tested) for images in measured]
    return Sets(damaged(seen, trial.degraded), validation=measured[1], test=measured[0])


def _read(trial: Trial) -> Images:
    if trial.data == HANGUL:
        glyphs = glyph_images(trial.fonts or None, size=trial.image_size[0])
        return Images(glyphs.images, glyphs.labels, torch.ones(len(glyphs)))
    dataset = orl_faces() if trial.data == "orl" else labelled_images(trial.data)
    dataset.image_size = trial.image_size
    dataset, pixels = read_all(dataset)
    assert pixels is not None
    return Images(pixels, dataset.labels, torch.ones(len(pixels)))


def at_most(images: Images, count: int) -> Images:
    """Return at most ``count`` images of each identity, drawn once and for all."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(SPLIT))
    order = order[images.labels[order].argsort(stable=True)]
    owners = images.labels[order]
    first = torch.cat([owners.new_ones(1, dtype=torch.bool), owners[1:] != owners[:-1]]).nonzero().flatten()
    nth = torch.arange(len(order)) - first.repeat_interleave(torch.diff(first, append=torch.tensor([len(order)])))
    return images.of(order[nth < count].sort().values)


def damaged(images: Images, share: float) -> Images:
    """Damage a share of the images, the same ones every time; the quality of each says how much."""
    if share == 0:
        return images
    pixels, quality = degrade_share(images.pixels, share, seed=DAMAGE)
    return images._replace(pixels=pixels, quality=quality)
