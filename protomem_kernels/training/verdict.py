"""Two images beside each other: one identity, or two?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.preprocessing import Source
from protomem_kernels.training.thresholds import OperatingPoint, read_thresholds
from protomem_kernels.training.trained import load_encoder


class Verdict(NamedTuple):
    """What a run says of two images.

    Attributes:
        cosine: of their embeddings, in [-1, 1].
        same: whether they are taken for one identity.
        point: the threshold that decided, and what it does on the run's validation set.
        impostor_pairs: of that validation set.
        doubt: why that set says too little of so small a FAR; empty: it says enough.
    """

    cosine: float
    same: bool
    point: OperatingPoint
    impostor_pairs: int
    doubt: str


def compare(
    first: Source, second: Source, run: str | Path, *, far: float = 1e-3, device: str | torch.device = "cpu"
) -> Verdict:
    """Compare two images with a run's encoder, as the run compared its own.

    Args:
        first: an image, as ``Transform`` takes it.
        second: another.
        run: the run's folder.
        far: the false accept rate that the threshold keeps to on the run's own validation set.
        device: where to compute.

    Raises:
        RunError: the run has no encoder or no thresholds that can be used; no threshold for ``far``.
        DatasetError: an image that cannot be read.

    """
    encoder, transform = load_encoder(run, device)
    thresholds = read_thresholds(Path(run))
    point = thresholds.at(far)
    with torch.inference_mode():
        one, other = VerifiedEncoder(encoder).eval()(transform.pixels([first, second]).to(device)).double()
    cosine = float(one @ other)
    assert point.threshold is not None
    return Verdict(cosine, cosine >= point.threshold, point, thresholds.impostor_pairs, thresholds.doubt(far))
