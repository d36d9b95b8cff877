"""``Health``: whether a prototype memory and the loss over it are well, in a few numbers for a person to look at."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels.memory import PrototypeMemory

AGES = 40  # bins of the histogram: ages up to 2**39 steps


class Watched(NamedTuple):
    """What a watched step saw of this rank's samples and of the rows that it refreshed.

    Attributes:
        counts: (B,) bool, which samples have a label.
        target_cosine: (B,) cosine to the sample's own prototype.
        hardest_cosine: (B,) cosine to the nearest other prototype, -inf if there is none.
        embedding_norm: (B,).
        refreshed: (P,) bool, which of the step's prototypes refreshed a row.
        drift: (P,) 1 - cosine between the row before and after.
    """

    counts: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    embedding_norm: Tensor
    refreshed: Tensor
    drift: Tensor


class Health(NamedTuple):
    """The state of a memory now, and what the last watched step saw; NaN where there is nothing to tell.

    Attributes:
        occupancy: share of the slots in use that hold an identity, in [0, 1].
        identities: how many there are.
        mean_age: of the rows, in steps since they were last written.
        largest_age: likewise.
        age_histogram: how many rows are of age 0, 1, 2 to 3, 4 to 7, ...; up to the last that is not 0.
        refresh_drift: mean of 1 - cosine between a row before and after its refresh. Near 0: the encoder stands still,
            or the refresh ratio is small; of the order of 1: rows say little about where their identity is now.
        target_cosine: mean cosine of the samples to their own prototypes.
        hardest_cosine: mean cosine to the nearest other prototype.
        hard_negatives: share of the samples to which another prototype is nearer than their own.
        embedding_norm: mean length of the embeddings.
        embedding_norm_std: its standard deviation.
    """

    occupancy: float
    identities: int
    mean_age: float
    largest_age: int
    age_histogram: tuple[int, ...]
    refresh_drift: float
    target_cosine: float
    hardest_cosine: float
    hard_negatives: float
    embedding_norm: float
    embedding_norm_std: float

    def figures(self) -> dict[str, float]:
        """Return what is one number and known, by name: for a logger."""
        numbers = {name: value for name, value in self._asdict().items() if not isinstance(value, tuple)}
        return {name: float(value) for name, value in numbers.items() if not math.isnan(value)}

    def write(self, writer: Any, step: int, prefix: str = "health") -> None:
        """Write the figures and the histogram of ages to TensorBoard.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``.
            step: that they are of.
            prefix: of their names.
        """
        for name, value in self.figures().items():
            writer.add_scalar(f"{prefix}/{name}", value, step)
        if self.identities:
            ages = [0, *(2**place - 1 for place in range(1, len(self.age_histogram)))]  # the largest of each bin
            writer.add_histogram_raw(
                f"{prefix}/age",
                min=0,
                max=self.largest_age,
                num=self.identities,
                sum=self.mean_age * self.identities,
                sum_squares=sum(age * age * count for age, count in zip(ages, self.age_histogram, strict=True)),
                bucket_limits=ages,
                bucket_counts=list(self.age_histogram),
                global_step=step,
            )


@torch.no_grad()
def health_of(memory: PrototypeMemory, watched: Watched | None) -> Health:
    """Return the health of a memory; over several ranks of all of it, and every rank calls."""
    ages = (memory.clock - memory.stamps)[memory.occupied]
    bins = ages.double().frexp().exponent  # 0 of 0, 1 of 1, 2 of 2 and 3, 3 of 4 to 7, ...
    slots = torch.tensor([memory.slots_in_use], device=ages.device)
    of_memory = torch.cat([slots, ages.sum()[None], bins.bincount(minlength=AGES)])
    largest = ages.max() if len(ages) else ages.new_zeros(())
    told = memory.ranks.sum_(torch.cat([of_memory.double(), _sums(watched, ages.device)])).tolist()
    largest_age = int(memory.ranks.max_(largest.clone()))
    slots_in_use, age, *rest = told
    histogram, sums = [int(count) for count in rest[:AGES]], rest[AGES:]
    identities = sum(histogram)
    refreshed, drift, samples, target, hard, compared, hardest, norm, norm_squared = sums
    mean_norm = _ratio(norm, samples)
    return Health(
        occupancy=identities / slots_in_use,
        identities=identities,
        mean_age=_ratio(age, identities),
        largest_age=largest_age,
        age_histogram=tuple(histogram[: max((at + 1 for at, count in enumerate(histogram) if count), default=0)]),
        refresh_drift=_ratio(drift, refreshed),
        target_cosine=_ratio(target, samples),
        hardest_cosine=_ratio(hardest, compared),
        hard_negatives=_ratio(hard, compared),
        embedding_norm=mean_norm,
        embedding_norm_std=math.sqrt(max(_ratio(norm_squared, samples) - mean_norm**2, 0.0)) if samples else math.nan,
    )


def refresh_drift(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cosine between rows (P, D), in at least float32."""
    wide = torch.promote_types(after.dtype, torch.float32)
    return 1 - torch.cosine_similarity(before.to(wide), after.to(wide), dim=1)


def _sums(watched: Watched | None, device: torch.device) -> Tensor:
    """Return nine sums over a watched step, float64: zeros if there was none."""
    if watched is None:
        return torch.zeros(9, dtype=torch.float64, device=device)
    counts, cosine, hardest = watched.counts, watched.target_cosine.double(), watched.hardest_cosine.double()
    compared = counts & torch.isfinite(hardest)
    norm = watched.embedding_norm.double()
    return torch.stack(
        [
            watched.refreshed.sum().double(),
            torch.where(watched.refreshed, watched.drift.double(), 0).sum(),
            counts.sum().double(),
            torch.where(counts, cosine, 0).sum(),
            (compared & (hardest > cosine)).sum().double(),
            compared.sum().double(),
            torch.where(compared, hardest, 0).sum(),
            torch.where(counts, norm, 0).sum(),
            torch.where(counts, norm * norm, 0).sum(),
        ]
    )


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
