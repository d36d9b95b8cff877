"""What the figures take and compute with: embeddings and labels as NumPy arrays, checked; a matrix in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protomem_kernels._checks import way_to_integers, way_to_one_dimension

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
ArrayLike: TypeAlias = Tensor | npt.ArrayLike

CHUNK_BYTES = 2**26  # of temporary float64 cosines or gathered embeddings


def as_array(values: ArrayLike) -> npt.NDArray[Any]:
    """Return values as a NumPy array, tensors from any device, bfloat16 ones as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype is torch.bfloat16 else values).numpy()
    elif hasattr(values, "to_numpy"):  # of pandas: by position, whatever the index
        values = values.to_numpy()
    return np.asarray(values)


def checked_labels(labels: ArrayLike) -> Ints:
    """Check labels, and return their ranks among the distinct ones: that is all that counts, and holds uint64 too."""
    array = as_array(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        way = way_to_one_dimension("labels", array.shape) or way_to_integers("labels", array.dtype.kind)
        raise ValueError(f"labels must be integers of shape (N,), got {array.dtype} of shape {array.shape}{way}")
    if array.size and array.min() < 0:
        raise ValueError(f"labels must be identities, that is >= 0, got {array.min()}")
    identities, ranks, counts = np.unique(array, return_inverse=True, return_counts=True)
    if len(identities) < 2:
        raise ValueError(f"labels must hold at least two identities, got {len(identities)}")
    if counts.max() < 2:
        raise ValueError(f"labels must hold at least one identity twice (a genuine pair), got {len(array)} different")
    return ranks.astype(np.int64)


def unit_rows(embeddings: ArrayLike, count: int | None = None) -> Floats:
    """Check embeddings and scale their rows to length 1: (N, D). A zero row stays zero."""
    return scaled(checked_rows(embeddings, count))


def checked_rows(embeddings: ArrayLike, count: int | None = None) -> npt.NDArray[np.floating[Any]]:
    """Check embeddings, (N, D) and finite."""
    array = as_array(embeddings)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"embeddings must be floating of shape (N, D), got {array.dtype} of shape {array.shape}")
    if count is not None and len(array) != count:
        raise ValueError(f"embeddings must have shape ({count}, D) to match labels ({count},), got {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"embeddings must be finite, got {len(bad)} of {len(array)} rows that are not, row {bad[0]} first"
        )
    return array


def scaled(rows: npt.NDArray[np.floating[Any]]) -> Floats:
    """Scale rows to length 1, in float64. A zero row stays zero."""
    unit: Floats = rows.astype(np.float64)
    largest = np.abs(unit).max(axis=1, keepdims=True, initial=0)
    np.divide(unit, largest, out=unit, where=largest > 0)  # so that no square overflows or vanishes
    length = np.linalg.norm(unit, axis=1, keepdims=True)
    np.divide(unit, length, out=unit, where=length > 0)
    return unit


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Return slices of rows whose float64 matrix of so many columns stays within ``CHUNK_BYTES``."""
    step = max(1, CHUNK_BYTES // (8 * max(1, columns)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
