"""Heads under ``DistributedDataParallel``, which copies rank 0's buffers to all ranks and averages every gradient.

What belongs to one rank, a memory or a shard of class weights, has to be left out of both. DDP reads what to leave out
from the root module when it is built, so that a nested head cannot help itself: ``prepare_ddp`` does it before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from protomem_kernels._torch import active_ddp, ignored_by_ddp, leave_out_of_ddp
from protomem_kernels._warnings import warn_caller


class OwnedByRank:
    """Mixin of modules of which buffers and parameters differ from rank to rank."""

    def owned_by_rank(self) -> Iterator[str]:
        """Return the names, within the module, of the buffers and parameters that no other rank may overwrite."""
        raise NotImplementedError


def _names(model: nn.Module) -> Iterator[str]:
    for place, module in model.named_modules():
        if isinstance(module, OwnedByRank):
            for name in module.owned_by_rank():
                yield f"{place}.{name}" if place else name


def prepare_ddp(model: nn.Module) -> nn.Module:
    """Have ``DistributedDataParallel`` leave alone what belongs to one rank: call it before wrapping.

    In the forward pass of a wrapped module DDP overwrites every buffer by rank 0's, and it averages every parameter's
    gradient. A head *inside* the wrapped module would lose its memory that way. This excludes the memories' buffers,
    and all buffers and the sharded parameters of heads with a ``process_group``. A head outside the wrapped module
    needs nothing.

    Args:
        model: what will be wrapped, with heads anywhere in it.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module, or is wrapped already.
        ValueError: there is no head in it.

    Example:
        >>> import protomem_kernels as pmk
        >>> model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": pmk.PrototypeMemoryLoss(2, capacity=8)})
        >>> model = pmk.distributed.prepare_ddp(model)  # and then: DistributedDataParallel(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("model must be prepared before it is wrapped: DistributedDataParallel(prepare_ddp(model))")
    if not any(isinstance(module, OwnedByRank) for module in model.modules()):
        raise ValueError(f"model must hold a head of protomem_kernels, got {type(model).__name__} without one")
    leave_out_of_ddp(model, _names(model))
    return model


def refuse_unprepared(head: nn.Module) -> None:
    """Raise if ``head`` runs within a ``DistributedDataParallel`` that overwrites what belongs to its rank.

    Raises:
        RuntimeError: naming ``prepare_ddp``.
    """
    ddp = active_ddp()
    if ddp is None or not isinstance(head, OwnedByRank):
        return
    place = next((place for place, module in ddp.module.named_modules() if module is head), None)
    if place is None:
        return
    ignored = ignored_by_ddp(ddp)
    parameters = {name for name, _ in head.named_parameters()}
    touched = [name for name in head.owned_by_rank() if name in parameters or ddp.broadcast_buffers]
    taken = [name for name in (f"{place}.{name}" if place else name for name in touched) if name not in ignored]
    if taken:
        raise RuntimeError(
            f"{type(head).__name__} runs inside DistributedDataParallel, which overwrites {', '.join(taken)} by rank "
            "0's or averages its gradient: wrap the encoder alone, or call protomem_kernels.distributed.prepare_ddp"
            "(model) before DistributedDataParallel(model)"
        )


def warn_of_own_memory() -> None:
    """Warn, once in a process, that a memory without a process group is one of several that know nothing of another."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _warn_once(dist.get_world_size())


@functools.cache
def _warn_once(ranks: int) -> None:
    warn_caller(
        f"process_group is None in a process group of {ranks} ranks: every rank keeps a prototype memory of its own, "
        "of the identities in its own batches, and the loss is this rank's. One memory over all ranks: "
        "process_group=torch.distributed.group.WORLD (which is None before init_process_group)."
    )
