"""What ranks tell each other before anything moves: whether a call is refused, how many rows come, and with what.

One small all-gather of two numbers per rank. What one rank refuses, all refuse with the same error, before any of
them has written; options that differ are named. Texts travel only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from protomem_kernels.distributed.ranks import Ranks

Checked = TypeVar("Checked")
ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


class Agreement:
    """The agreement of all ranks on a call.

    Args:
        ranks: who takes part.
        equal_sizes: every rank promises to come with as many rows as the others, and with what it may come: each
            size is looked at once, and then no call waits for numbers of others.
    """

    def __init__(self, ranks: Ranks, equal_sizes: bool = False) -> None:
        self.ranks, self.equal_sizes = ranks, equal_sizes
        self._agreed: set[tuple[int, int]] = set()

    def __call__(
        self,
        device: torch.device,
        check: Callable[[], Checked],
        size: Callable[[Checked], int],
        options: Callable[[Checked], Mapping[str, object]],
    ) -> tuple[Checked, tuple[int, ...]]:
        """Return what ``check`` returned here, and how many rows each rank comes with.

        Args:
            device: where the numbers travel: the memory's or the weights'.
            check: checks this rank's arguments and raises on what must not be.
            size: of what ``check`` returned, this rank's number of rows.
            options: of the same, what has to be alike on all ranks, by name.

        Raises:
            TypeError, ValueError, RuntimeError: what a rank refused, on every rank alike; or options that differ.
        """
        ranks, refused, given, key = self.ranks, None, {}, (0, -1)
        try:
            checked = check()
            rows = size(checked)
            given = {name: str(value) for name, value in options(checked).items()}
        except Exception as error:
            if self.equal_sizes and self._agreed:  # nobody listens
                raise
            refused = error
        else:
            if self.equal_sizes:
                given["the number of rows (equal_batches=True)"] = str(rows)
            key = _fingerprint(given), rows
            if self.equal_sizes and key in self._agreed:
                return checked, (rows,) * ranks.size
        told = ranks.all_gather(torch.tensor(key, dtype=torch.int64, device=device)).tolist()
        if any(rows < 0 for _, rows in told):
            _raise_what_was_refused(ranks, refused)
        if any(fingerprint != told[0][0] for fingerprint, _ in told):
            _raise_what_differs(ranks, given)
        if self.equal_sizes:
            self._agreed.add(key)
        return checked, tuple(rows for _, rows in told)


def _fingerprint(options: Mapping[str, str]) -> int:
    digest = hashlib.blake2b(repr(sorted(options.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _raise_what_was_refused(ranks: Ranks, refused: Exception | None) -> None:
    told = ranks.objects(None if refused is None else (type(refused).__name__, str(refused)))
    rank, (kind, message) = next((rank, one) for rank, one in enumerate(told) if one is not None)
    raise ERRORS.get(kind, RuntimeError)(f"{message} (rank {rank} of {ranks.size})") from refused


def _raise_what_differs(ranks: Ranks, options: Mapping[str, str]) -> None:
    told: list[dict[str, str]] = ranks.objects(dict(options))
    for rank, theirs in enumerate(told):
        for name, value in told[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {value} on rank 0 and {theirs.get(name)} on rank {rank}"
                )


def described(value: Any) -> str:
    """Return an option as text that is the same in every process: no addresses, functions by their name."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in text else text
