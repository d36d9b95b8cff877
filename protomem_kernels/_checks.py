"""The one place where arguments are checked. Messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    """Return the shape as text: ``(512, 256)``."""
    return str(tuple(tensor.shape))


def check_tensor(name: str, value: Any, ndim: int, what: str, *, floating: bool) -> None:
    """Check type, rank and kind of dtype; ``what`` spells the shape out, such as ``(B, D)``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {what}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have shape {what}, got {shape_of(value)}")
    if floating and not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if not floating and value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")


_INTEGERS = frozenset({torch.int64, torch.int32})  # what the operators take as it is
_SMALL_INTEGERS = frozenset({torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32})


def as_labels(name: str, value: Any, what: str, like: Tensor | None = None) -> Tensor:
    """Return labels, slots or identities as a tensor of int64 or int32; ``what`` spells the shape out: ``(B,)``.

    Tensors of other integers, NumPy arrays, pandas Series (by position), and lists of integers become int64; what is no
    tensor goes to the device of ``like``. uint64 is taken where int64 holds it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came, and the call that mends it.
    """
    labels = tensor_of(name, value, what)
    if labels is not value and like is not None:
        labels = labels.to(like.device)
    if labels.ndim != 1:
        way = way_to_one_dimension(name, labels.shape)
        raise ValueError(f"{name} must have shape {what}, got {shape_of(labels)}{way}")
    if labels.dtype in _INTEGERS:
        return labels
    if labels.dtype in _SMALL_INTEGERS:
        return labels.long()
    if labels.dtype == torch.uint64 and labels.is_cpu:
        return _signed(name, labels)
    raise TypeError(f"{name} must be int64 or int32, got {labels.dtype}; {name}.long() makes it so")


def _signed(name: str, labels: Tensor) -> Tensor:
    signed = labels.view(torch.int64)
    if bool((signed < 0).any()):
        raise ValueError(
            f"{name} must be below 2**63 to be int64, got {labels[signed < 0][0].item()}; of 64-bit hashes drop a bit: "
            f"{name}.view(torch.int64) & (2**63 - 1)"
        )
    return signed


def tensor_of(name: str, value: Any, what: str) -> Tensor:
    """Return numbers in whatever form they come (a tensor, an array, a Series by position, a list) as a tensor."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    dtype: Any = getattr(value, "dtype", None)
    kind = getattr(dtype, "kind", None)
    if kind is not None and kind in "iuf":
        return torch.from_numpy(value.astype(dtype.newbyteorder("="), order="C"))
    if kind is not None and kind not in "bO":
        raise TypeError(f"{name} must be integers of shape {what}, got {dtype}{way_to_integers(name, dtype.kind)}")
    if kind is None and not isinstance(value, (list, tuple, range)):
        came = type(value).__name__
        raise TypeError(f"{name} must be a tensor of shape {what}, or integers that make one, got {came}")
    values = list(value)
    try:
        return torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError, OverflowError):  # beyond int64, or no numbers at all
        return _unsigned(name, values, what)


def _unsigned(name: str, values: list[Any], what: str) -> Tensor:
    for place, value in enumerate(values):
        try:
            number = operator.index(value)
        except TypeError as error:
            came = f"{value!r:.40} ({type(value).__name__}) at index {place}{way_to_integers(name, 'O')}"
            raise TypeError(f"{name} must be integers of shape {what}, got {came}") from error
        if not 0 <= number < 2**64:
            raise ValueError(f"{name} must be integers of at most 64 bits, got {number} at index {place}")
    return torch.tensor(values, dtype=torch.uint64)


def way_to_one_dimension(name: str, shape: tuple[int, ...]) -> str:
    """Return the end of a message: the call that makes labels (B,) of (B, 1)."""
    return f"; {name}.squeeze(1) makes it so" if len(shape) == 2 and shape[1] == 1 else ""


def way_to_integers(name: str, kind: str) -> str:
    """Return the end of a message: the call that makes integers of an array whose NumPy dtype is of this kind."""
    if kind in "fb":
        return f"; {name}.astype('int64') makes it so"
    return f"; number them: numpy.unique({name}, return_inverse=True)[1]"


def check_matches(name: str, value: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """Check the exact shape, and that the tensor lies on the device of ``other``."""
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match {other_name} {shape_of(other)}, got {shape_of(value)}"
        )
    if not (value.is_cpu and other.is_cpu):  # two flags are quicker than two devices
        check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that the tensor lies on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {value.device}")


def check_batch(embeddings: Any, labels: Any, name: str = "labels") -> Tensor:
    """Check ``embeddings`` (B, D) floating and ``labels`` (B,) integers; return the labels as ``as_labels`` does."""
    check_tensor("embeddings", embeddings, 2, "(B, D)", floating=True)
    batch, columns = embeddings.shape
    if columns == 0:
        raise ValueError(f"embeddings must have at least one column, got {shape_of(embeddings)}")
    checked = as_labels(name, labels, "(B,)", embeddings)
    check_matches(name, checked, (batch,), "embeddings", embeddings)
    return checked


def check_weights(weights: Any, embeddings: Tensor) -> None:
    """Check ``weights`` (B,) floating or None."""
    if weights is not None:
        check_tensor("weights", weights, 1, "(B,)", floating=True)
        check_matches("weights", weights, (embeddings.shape[0],), "embeddings", embeddings)


def check_prototypes(prototypes: Any, embeddings: Tensor) -> None:
    """Check ``prototypes`` (M, D) against ``embeddings`` (B, D)."""
    check_tensor("prototypes", prototypes, 2, "(M, D)", floating=True)
    if prototypes.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"prototypes must have shape (M, {embeddings.shape[1]}) to match embeddings {shape_of(embeddings)}, "
            f"got {shape_of(prototypes)}"
        )
    check_device("prototypes", prototypes, "embeddings", embeddings)


def check_occupied(occupied: Any, prototypes: Tensor) -> None:
    """Check ``occupied`` (M,) bool or None."""
    if occupied is None:
        return
    if not isinstance(occupied, Tensor) or occupied.dtype != torch.bool:
        came = occupied.dtype if isinstance(occupied, Tensor) else type(occupied).__name__
        raise TypeError(f"occupied must be a bool tensor of shape (M,), got {came}")
    check_matches("occupied", occupied, (prototypes.shape[0],), "prototypes", prototypes)


def check_int(name: str, value: Any, *, at_least: int) -> None:
    """Check a Python int (not a bool) with a lower bound."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Check a finite Python number in ``[low, high]``, or ``(low, high]`` if ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    inside = low < value <= high if open_low else low <= value <= high
    if not inside or not math.isfinite(value):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{name} must be in {bounds}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def refuse_targets_past_the_end(targets: Tensor, slots: int, name: str = "targets") -> None:
    """Raise if a target lies past the last slot; reads values."""
    if targets.numel() and int(targets.max()) >= slots:
        raise ValueError(f"{name} must be below {slots}, the number of prototypes, got {int(targets.max())}")


def refuse_bad_weights(weights: Tensor) -> None:
    """Raise if a weight is negative or not finite; reads values."""
    if weights.numel() == 0:
        return
    lowest, highest = (value.item() for value in weights.aminmax())
    if not (lowest >= 0 and highest < math.inf):  # NaN comes through aminmax, and fails both
        at = int((~(torch.isfinite(weights) & (weights >= 0))).int().argmax())
        raise ValueError(f"weights must be finite and not negative, got {weights[at].item()} at index {at}")
