"""The ranks that share a memory or class weights, and every collective between them.

``Ranks`` is one rank alone, for whom each collective is the identity, so that the code above is written once; ``Group``
is several, on ``torch.distributed``. Whatever goes from rank to rank goes through here and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from protomem_kernels._torch import all_gather, reduce_scatter


class Ranks:
    """One rank, alone: every collective is the identity.

    Attributes:
        size: W, how many ranks there are.
        rank: this one, from 0.
        alone: whether it is the only one.
    """

    size: int = 1
    rank: int = 0
    alone: ClassVar[bool] = True

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, of one shape and dtype; the argument may be overwritten."""
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Return the maximum of the ranks' tensors, likewise."""
        return tensor

    def first_(self, tensor: Tensor) -> Tensor:
        """Return the tensor of rank 0, likewise."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors (W, ...), of one shape and dtype."""
        return tensor[None]

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Return, of the ranks' tensors (W, ...), the sum of those at this rank's place (...)."""
        return tensor[0]

    def objects(self, value: Any) -> list[Any]:
        """Return the ranks' objects, by pickle: for messages of errors."""
        return [value]


ALONE = Ranks()


class Group(Ranks):
    """The ranks of a process group.

    Args:
        group: of ``torch.distributed``; this rank is in it.

    Attributes:
        calls: how often each collective was called, by its name.
        bytes: what was handed to each collective, padding included: of an all-gather what came from others, of a
            reduce-scatter what went to others, of a reduction the tensor.
    """

    alone = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._aside: dist.ProcessGroup | None = None

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def __deepcopy__(self, memo: Any) -> Group:
        """Copies of a module stay with the same ranks."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a module with a process_group cannot be pickled, since a process group cannot: save its state_dict()"
        )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks: one all-reduce, in place."""
        self._call("all_reduce", _size(tensor), lambda: dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group))
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Return the maximum over the ranks: one all-reduce, in place."""
        self._call("all_reduce", _size(tensor), lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group))
        return tensor

    def first_(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor: one broadcast, in place."""
        self._call("broadcast", _size(tensor), lambda: dist.broadcast(tensor, group=self.group, group_src=0))
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors (W, ...): one all-gather."""
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.size, *tensor.shape)
        into = gathered.view(-1)
        self._call(
            "all_gather", (self.size - 1) * _size(tensor), lambda: all_gather(into, tensor.view(-1), group=self.group)
        )
        return gathered

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Return this rank's place (...) of the sum of (W, ...): one reduce-scatter."""
        tensor = tensor.contiguous()
        own = tensor.new_empty(tensor.shape[1:])
        self._call(
            "reduce_scatter",
            (self.size - 1) * _size(own),
            lambda: reduce_scatter(own.view(-1), tensor.view(-1), group=self.group),
        )
        return own

    def objects(self, value: Any) -> list[Any]:
        """Return the ranks' objects: two all-gathers of bytes."""
        values: list[Any] = [None] * self.size
        self._call("all_gather_object", 0, lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def aside(self) -> dist.ProcessGroup:
        """Return a gloo group of the same ranks, for another thread's collectives; made by the first call, of all.

        Raises:
            ValueError: these ranks are some of the world: PyTorch has all ranks make a group, whoever is in it.
        """
        if self.size != dist.get_world_size():
            raise ValueError(
                f"process_group must be all {dist.get_world_size()} ranks for this, got {self.size} of them"
            )
        if self._aside is None:
            self._aside = dist.new_group(backend="gloo")
        return self._aside

    def _call(self, name: str, size: int, collective: Callable[[], Any]) -> None:
        self.calls[name] += 1
        self.bytes[name] += size
        try:
            collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} waited in vain for the others in {name}: every rank of process_group "
                "has to make the same calls (forward, backward, update, lookup, doppelgangers), with an empty batch if "
                f"it has no sample, and none may have ended. torch.distributed says: {error}"
            ) from error


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def ranks_of(process_group: Any) -> Ranks:
    """Return the ranks of a process group; None, and a group of one, is one rank alone.

    Raises:
        TypeError: no process group.
        ValueError: one that is not initialised (any more), or that this process is no rank of.
    """
    if process_group is None:
        return ALONE
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be a group that this process is a rank of, got one of other ranks")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a process group of torch.distributed, such as dist.group.WORLD, or None, "
            f"got {type(process_group).__name__}"
        )
    if not dist.is_initialized():
        raise ValueError(
            "process_group must be initialised: call torch.distributed.init_process_group before, "
            "and destroy_process_group after what uses it"
        )
    try:
        group = Group(process_group)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"process_group must be a group of this torch.distributed: {error}") from error
    return ALONE if group.size == 1 else group


class SeesAllRanks:
    """Mixin of a head's parts that look at a batch by themselves; the head hands them the ranks that it shares."""

    ranks: Ranks = ALONE


def hand_ranks(ranks: Ranks, *parts: object) -> None:
    """Give the ranks to each part, and the parts within it, that looks at a batch by itself."""
    if ranks.alone:
        return
    for part in parts:
        for module in part.modules() if isinstance(part, torch.nn.Module) else [part]:
            if isinstance(module, SeesAllRanks):
                module.ranks = ranks
