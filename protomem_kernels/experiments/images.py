"""The images of a trial: identities that train, identities on which options are chosen, identities that are measured.

No identity is in two of the three sets, and all trials of a data set and of one number of identities share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels.data.degradations import degrade_share
from protomem_kernels.data.glyphs import GlyphSet, glyph_images
from protomem_kernels.data.images import orl_faces
from protomem_kernels.data.reading import read_all
from protomem_kernels.data.sources import labelled_images
from protomem_kernels.data.splits import split_by_identity
from protomem_kernels.data.synthetic_faces import FaceSet, synthetic_faces
from protomem_kernels.experiments.trial import HANGUL, SYNTHETIC, Trial
from protomem_kernels.training.errors import RunError

SPLIT, DAMAGE = 0, 1  # seeds
IMAGES_OF_A_FACE = 20  # that are drawn of each synthetic person


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
    steps = list[int]()

    def noted(done: int, total: int) -> None:
        steps.append(done)
        progress(done, total)

    made = _made(trial, noted)
    tally = map(str, made.tally) if steps and isinstance(made, GlyphSet) else ()
    return [] if made is None else [*made.notes, *tally]


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
    return Sets(damaged(seen, trial), validation=measured[1], test=measured[0])


def _made(trial: Trial, progress: Callable[[int, int], object] | None = None) -> GlyphSet | FaceSet | None:
    """Return images that are made on the machine that uses them, where a trial is on such."""
    size = trial.image_size[0]
    if trial.data == HANGUL:
        return glyph_images(trial.fonts or None, size=size, progress=progress)
    if trial.data == SYNTHETIC:
        people = trial.identities + trial.validation_identities + trial.test_identities
        return synthetic_faces(people, IMAGES_OF_A_FACE, size=size, progress=progress)
    return None


def _read(trial: Trial) -> Images:
    made = _made(trial)
    if made is not None:
        return Images(made.images, made.labels, torch.ones(len(made)))
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


def damaged(images: Images, trial: Trial) -> Images:
    """Damage the share of the images that a trial says, the same ones every time; the quality of each says how much."""
    if trial.degraded == 0:
        return images
    pixels, quality = degrade_share(images.pixels, trial.degraded, seed=DAMAGE, severity=trial.severity)
    return images._replace(pixels=pixels, quality=quality)
