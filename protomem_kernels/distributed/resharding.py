"""Rows that are spread over ranks, saved by any number of ranks and taken up by any other.

A module that is ``KeptInShards`` says which of its tensors are rows of larger ones, and makes its own out of what was
saved. Class weights lie in order: each rank reads its range. A memory's rows go to their identities' owners, in the
order in which they would be overwritten. What an optimiser keeps beside such rows goes with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels.distributed.owners import owners
from protomem_kernels.distributed.ranks import Ranks


class Shard(NamedTuple):
    """This rank's rows of a tensor that all ranks hold together.

    Attributes:
        rows: (n, ...), n >= 1.
        first: the place of the first of them in the whole.
        total: how many rows the whole has.
    """

    rows: Tensor
    first: int
    total: int


BESIDE = "@"  # prototypes@exp_avg is what an optimiser keeps beside the parameter ``prototypes``


class Saved(ABC):
    """Tensors that were saved, by the names that a module has for them, whole whoever saved them."""

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of all tensors."""

    @abstractmethod
    def within(self, prefix: str) -> Saved:
        """Return the same for a part of the module, whose names begin with ``prefix``."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""

    @abstractmethod
    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """Return ``rows`` rows from the ``first`` on, default all that follow, on the CPU.

        Raises:
            RuntimeError: they cannot be read.
        """


@dataclass(frozen=True)
class Plain(Saved):
    """The state of a module in one process, as its ``state_dict`` has it.

    Attributes:
        state: whole tensors by name.
        prefix: of the names that are asked for.
    """

    state: Mapping[str, Tensor]
    prefix: str = ""

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return {name.removeprefix(self.prefix) for name in self.state if name.startswith(self.prefix)}

    def within(self, prefix: str) -> Plain:
        """Return the same for a part of the module."""
        return replace(self, prefix=self.prefix + prefix)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self.state[self.prefix + name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.state[self.prefix + name].shape)

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """Return some rows of a tensor, on the CPU."""
        tensor = self.state[self.prefix + name].detach().cpu()
        return tensor if rows is None and not first else tensor[first:][:rows]


class KeptInShards:
    """Mixin of modules of which each rank keeps some rows.

    Attributes:
        ranks: who keeps the others.
    """

    ranks: Ranks

    def shards(self) -> dict[str, Shard]:
        """Return this rank's rows, by the names of the parameters and buffers that they are."""
        raise NotImplementedError

    def from_saved(self, saved: Saved, beside: Iterable[str] = ()) -> dict[str, Tensor]:
        """Return this rank's parameters and buffers of what any number of ranks saved: the same range of rows.

        Args:
            saved: by the names that this module has.
            beside: names of more tensors there, ``parameter@name``, whose rows go with those of the parameter.

        Raises:
            ValueError: what was saved is of another shape.
        """
        loaded, shards = {}, self.shards()
        for name, shard in shards.items():
            whole = (shard.total, *shard.rows.shape[1:])
            if saved.shape(name) != whole:
                raise ValueError(f"{name} must have shape {whole} over all ranks, got {saved.shape(name)}")
            loaded[name] = saved.read(name, shard.first, len(shard.rows))
        for name in beside:
            shard = shards[name.split(BESIDE)[0]]
            loaded[name] = saved.read(name, shard.first, len(shard.rows))
        return loaded


def oldest_first(cursors: Tensor, shard_size: int) -> Tensor:
    """Return the slots of some rings (R * S,) in the order in which they would be overwritten, all rings in step.

    A slot that is d slots behind its ring's cursor was taken d identities ago, the next victim being S behind. Equally
    old ones are in the order of their rings.

    Args:
        cursors: (R,) int64, the next slot of each ring of ``shard_size`` slots.
        shard_size: S.

    >>> oldest_first(torch.tensor([1, 0]), 3)  # slot 1 of the first ring and slot 0 of the second come next
    tensor([1, 3, 2, 4, 0, 5])
    """
    slots = torch.arange(shard_size)
    behind = torch.remainder(cursors[:, None] - 1 - slots, shard_size)
    return behind.flatten().argsort(descending=True, stable=True)


def laid(identities: Tensor, ranks: int, rank: int, slots: int) -> tuple[Tensor, int]:
    """Say which of some rows this rank takes, in their order: those that it owns, less the first that have no place.

    Args:
        identities: (N,) int64 >= 0, of the rows, the oldest first.
        ranks: how many take them.
        rank: this one.
        slots: how many have a place on each.

    Returns:
        the rows (n,), n <= ``slots``, ascending; and how many rows all ranks drop.

    >>> laid(torch.tensor([5, 3, 1, 0]), 2, 0, 2)  # rank 0 owns all four
    (tensor([2, 3]), 2)
    """
    owner = owners(identities, ranks)
    dropped = int((owner.bincount(minlength=ranks) - slots).clamp(min=0).sum())
    return (owner == rank).nonzero()[:, 0][-slots:], dropped
