"""Cosines from which two images are taken for one identity, as a run's own validation measured them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from protomem_kernels.training import runs
from protomem_kernels.training.config import NOBODY
from protomem_kernels.training.errors import RunError

if TYPE_CHECKING:
    from protomem_kernels.data.evaluation import RocCurve

FARS = tuple(float(f"{digit}e-{power}") for power in range(1, 7) for digit in (5, 2, 1))  # 0.5, 0.2, 0.1, 0.05 ... 1e-6
ENOUGH = 30  # false accepts, below which a measured rate may well be off by a third and more ("rule of 30")


class OperatingPoint(NamedTuple):
    """A threshold and what it does on the validation set of a run.

    Attributes:
        far: the false accept rate that it keeps to.
        threshold: a pair is accepted if its cosine is at least that; None: no cosine keeps to ``far`` and accepts
            anybody.
        measured_far: the part of the impostor pairs that it accepts, at most ``far``.
        tar: the part of the genuine pairs that it accepts.
    """

    far: float
    threshold: float | None
    measured_far: float
    tar: float


class Thresholds(NamedTuple):
    """What a run's ``metrics.json`` knows of thresholds."""

    points: list[OperatingPoint]  # by falling FAR
    impostor_pairs: int  # that they were measured on

    def at(self, far: float) -> OperatingPoint:
        """Return the point of the largest FAR that is not above ``far``.

        Raises:
            RunError: ``far`` is none that was measured, or nobody is accepted there.
        """
        if not self.points[-1].far <= far <= self.points[0].far:
            raise RunError(f"far must be between {self.points[-1].far:g} and {self.points[0].far:g}, got {far:g}")
        point = next(point for point in self.points if point.far <= far)
        if point.threshold is None:
            raise RunError(
                f"far must be larger than {far:g} for this run: of its {self.impostor_pairs:,} impostor pairs the most "
                "alike are more alike than any genuine pair, so that no threshold accepts anybody"
            )
        return point

    def doubt(self, far: float) -> str:
        """Say that the validation set was too small for ``far``; empty: it was not."""
        passing = math.floor(far * self.impostor_pairs * (1 + 1e-9))
        if passing >= ENOUGH:
            return ""
        return (
            f"the validation set was too small for FAR {far:g}: of its {self.impostor_pairs:,} impostor pairs that is "
            f"{passing or 'none'}, and {ENOUGH} or more would be needed"
        )


def operating_points(roc: RocCurve) -> list[dict[str, float | None]]:
    """Return the point of each of ``FARS`` on a curve, as ``metrics.json`` holds it."""
    found = []
    for far in FARS:
        place = int((roc.far <= far).sum()) - 1
        threshold = float(roc.thresholds[place])
        point = OperatingPoint(
            far, threshold if math.isfinite(threshold) else None, float(roc.far[place]), float(roc.tar[place])
        )
        found.append(point._asdict())
    return found


def read_thresholds(run: Path) -> Thresholds:
    """Return what a run has measured.

    Raises:
        RunError: it has not come to its end, or comes from before thresholds were kept.
    """
    file = run / runs.METRICS
    try:
        metrics: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if metrics.get("validation") == NOBODY:
            raise RunError(f"{run} was trained on everybody: nothing verified it, and it has no thresholds")
        points = metrics["operating_points"]
        return Thresholds([OperatingPoint(**point) for point in points], metrics["impostor_pairs"])
    except FileNotFoundError:
        why = f"{run} has no {runs.METRICS}: it has not come to its end"
    except KeyError:
        why = f"{file} has no thresholds: it comes from before they were kept"
    except (OSError, TypeError, ValueError) as error:
        raise RunError(f"cannot read {file}: {error}") from error
    raise RunError(f"{why}; they are measured by: {runs.way_on(run)}")
