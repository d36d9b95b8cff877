"""Checkpoints of what is spread over ranks: saved by any number of them, loaded by any other.

Collective, as a step is: every rank calls, and what one rank refuses all refuse. Saves go through
``torch.distributed.checkpoint``, those in the background in a thread of their own, one after the other, and over a gloo
group of their own, so that they never meet a step's collectives; ``storage`` has what lies on the disk. Loads read on
their own, and agree before anything is changed.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from protomem_kernels.distributed.agreement import Agreement
from protomem_kernels.distributed.ranks import ALONE, Group, Ranks
from protomem_kernels.distributed.resharding import BESIDE, KeptInShards, Plain, Saved, Shard
from protomem_kernels.state import check_parts

_LOG = logging.getLogger(__name__)
Done = TypeVar("Done")


def save(path: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Save the state of a head, or of a model with heads in it, as a checkpoint that any number of ranks can load.

    What is spread over ranks is saved by all of them; everything else must be alike on all and is saved by rank 0. The
    folder holds one checkpoint, at any moment the last one that was published: files of a new one lie beside it until
    all ranks have written, and one that was not published does not exist. Saved are parameters and persistent buffers,
    as in ``state_dict()``, and what an optimiser keeps beside the module's parameters.

    Args:
        path: a folder that all ranks see; it is made.
        module: its heads have one ``process_group``, of which every rank calls. Without one, this process alone saves.
        optimizer: of the module's parameters, and maybe of others, which are left out; None: of none. Its options
            (``param_groups``) are the program's own, and not saved.

    Raises:
        TypeError: ``module`` is no module, or has state other than plain tensors; ``optimizer`` is none, or keeps
            beside rows that are spread over ranks what is neither a row for each nor one number (8-bit states).
        ValueError: heads with different process groups, or ranks with different paths or tensors.
        RuntimeError: it could not be written, on some rank; the folder keeps the last checkpoint that was published.

    Example:
        >>> import protomem_kernels as pmk, tempfile, torch
        >>> head = pmk.PrototypeMemoryLoss(embedding_dim=2, capacity=8)
        >>> _ = head.memory.update(torch.eye(2), torch.tensor([12, 7]))
        >>> other = pmk.PrototypeMemoryLoss(embedding_dim=2, capacity=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pmk.distributed.save(folder, head)
        ...     pmk.distributed.load(folder, other)
        >>> other.memory.identities
        tensor([ 7, 12, -1, -1])

    Source: of saving through ``torch.distributed.checkpoint``, its documentation; of the order of rows,
    docs/distributed.md.
    """
    folder, ranks, state = _agreed_state(path, module, optimizer, lambda tensor: tensor.detach())
    _writer().submit(lambda: None).result()  # what was begun in the background comes first
    _write(folder, state, ranks, ranks.group if isinstance(ranks, Group) else None)


def save_async(path: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None) -> Future[None]:
    """Do what ``save`` does, in the background: return when the state was copied to the CPU, and training may go on.

    Saves are written in the order of the calls. At its end the process waits for them; wait for the last one before
    ``destroy_process_group``.

    Returns:
        a future; ``result()`` waits until the checkpoint is published, or raises what kept it from being, which is
        logged as well.

    Raises:
        TypeError, ValueError, RuntimeError: as ``save`` does; what comes while writing out of the future.
        ValueError: also a ``process_group`` of some of the world's ranks.
    """
    folder, ranks, state = _agreed_state(path, module, optimizer, lambda tensor: tensor.detach().to("cpu", copy=True))
    saved = _writer().submit(_write, folder, state, ranks, ranks.aside() if isinstance(ranks, Group) else None)
    saved.add_done_callback(_tell)
    return saved


def load(
    path: str | os.PathLike[str] | Mapping[str, Tensor], module: nn.Module, optimizer: Optimizer | None = None
) -> None:
    """Load what ``save`` has saved, from however many ranks, into a module of however many.

    - By as many ranks with as many slots each, a memory is exactly what it was.
    - Otherwise each rank takes the rows that it owns, in the order in which they would be overwritten: "fifo" by how
      far behind the cursor of their shard they are, "lru" by their stamps. Where that is more than it has slots, the
      first of them are dropped, and the log says how many. Capacities may differ. What an optimiser kept beside a row
      goes with it.
    - Class weights and all else must be of the same shapes.

    Args:
        path: the folder; or the ``state_dict()`` of such a module in one process, the same on all ranks.
        module: its heads have one ``process_group``, of which every rank calls; or none.
        optimizer: takes what was saved beside the module's parameters; of other parameters it keeps what it has. None:
            that is left where it is.

    Raises:
        TypeError: ``module`` is no module, or has state other than plain tensors; ``optimizer`` is none.
        ValueError: other names, shapes or dtypes than were saved, heads with different process groups, or an
            ``optimizer`` without a parameter beside which something was saved.
        RuntimeError: there is no checkpoint, or a file of it is missing, cut off, or not what was saved. Whatever is
            raised is raised on every rank, and no module was changed.
    """
    ranks = _ranks(module)

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
        saved, digest = _opened(path, module, ranks)
        state, kept = _loaded(module, optimizer, saved)
        check_parts(module, state, "")
        return state, kept, digest

    state, kept, _ = _agreed(ranks, module, read, lambda read: {"the call": "load", "the checkpoint": read[2]})
    module.load_state_dict(state)
    if optimizer is not None:
        _give(optimizer, module, kept)


def _opened(path: str | os.PathLike[str] | Mapping[str, Tensor], module: nn.Module, ranks: Ranks) -> tuple[Saved, str]:
    """Return what is to be loaded, held to its checksums, and what is alike on all ranks if it is the same."""
    if isinstance(path, Mapping):
        shards = _shards(module)
        rows = {name: value.reshape(1) if name in shards and not value.dim() else value for name, value in path.items()}
        return Plain(rows), ", ".join(f"{name} {_whole(value)}" for name, value in sorted(rows.items()))
    from protomem_kernels.distributed.storage import Folder

    folder = Folder(Path(path))
    folder.verify(ranks.rank, ranks.size)
    return folder, folder.digest


def _agreed_state(
    path: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None, staged: Callable[[Tensor], Tensor]
) -> tuple[Path, Ranks, Mapping[str, Tensor | Shard]]:
    """Return the folder, who saves, and what: as all ranks have agreed on it, each tensor ``staged``."""
    folder = Path(path)
    ranks = _ranks(module)

    def given() -> dict[str, Tensor | Shard]:
        shards = _shards(module)
        state: dict[str, Tensor | Shard] = {**_state(module), **shards}
        for name, value in _kept(module, optimizer).items():
            beside = shards.get(_parameter(name))
            state[name] = _beside(beside, name, value) if beside and value.dim() else value
        return {
            name: value._replace(rows=staged(value.rows)) if isinstance(value, Shard) else staged(value)
            for name, value in state.items()
        }

    def alike(state: Mapping[str, Tensor | Shard]) -> dict[str, object]:
        tensors = {name: _whole(value) for name, value in state.items()}
        return {"the call": "save", "path": folder, **tensors}

    return folder, ranks, _agreed(ranks, module, given, alike)


@functools.cache
def _writer() -> ThreadPoolExecutor:
    """The thread of saves in the background, so that they come one after the other, as on every other rank."""
    return ThreadPoolExecutor(1, thread_name_prefix="protomem-save")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_writer.cache_clear)  # threads stay with the parent


def _tell(saved: Future[None]) -> None:
    """Log what kept a save from being, should nobody ask the future."""
    if (error := saved.exception()) is not None:
        _LOG.error("%s", error)


def _write(folder: Path, state: Mapping[str, Tensor | Shard], ranks: Ranks, group: object) -> None:
    from protomem_kernels.distributed.storage import write

    try:
        write(folder, state, ranks.rank, group)
    except (OSError, RuntimeError) as error:
        who = f"rank {ranks.rank} of {ranks.size}"
        raise RuntimeError(
            f"{who} could not save {folder}, which keeps the last checkpoint published: {error}"
        ) from error


def _ranks(module: nn.Module) -> Ranks:
    """Return who shares the heads of a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    found = [part.ranks for part in module.modules() if isinstance(part, KeptInShards)] or [ALONE]
    groups = {ranks.group if isinstance(ranks, Group) else None for ranks in found}
    if len(groups) > 1:
        raise ValueError(f"module must hold heads of one process_group, got {len(groups)} (None is one)")
    return found[0]


def _agreed(
    ranks: Ranks, module: nn.Module, check: Callable[[], Done], options: Callable[[Done], Mapping[str, object]]
) -> Done:
    """Return what ``check`` returned here, if no rank refused."""
    if ranks.alone:
        return check()
    device = next(shard.rows.device for shard in _shards(module).values())
    checked, _ = Agreement(ranks)(device, check, lambda _: 0, options)
    return checked


def _parts(module: nn.Module) -> list[tuple[str, KeptInShards]]:
    """Return what is kept in shards, with the prefix of its names."""
    named = module.named_modules()
    return [(f"{place}." if place else "", part) for place, part in named if isinstance(part, KeptInShards)]


def _shards(module: nn.Module) -> dict[str, Shard]:
    return {prefix + name: shard for prefix, part in _parts(module) for name, shard in part.shards().items()}


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's ``state_dict``, which must be plain tensors."""
    state: dict[str, Tensor] = module.state_dict()
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"module's state must be plain tensors, got {type(value).__name__} for {name}: save what is spread "
                "over ranks by others (FSDP) by torch.distributed.checkpoint itself, and here the head"
            )
    return state


def _whole(value: Tensor | Shard) -> str:
    """Describe a tensor as all ranks have it."""
    tensor, rows = (value.rows, (value.total,)) if isinstance(value, Shard) else (value, tuple(value.shape[:1]))
    return f"{(*rows, *tensor.shape[1:])} of {tensor.dtype}"


def _kept(module: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return what an optimiser keeps beside the parameters of a module, by ``parameter@name``."""
    if optimizer is None:
        return {}
    _check_optimizer(optimizer)
    kept = {
        f"{name}{BESIDE}{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    for name, value in kept.items():
        if type(value) is not Tensor:
            raise TypeError(f"optimizer's state must be plain tensors, got {type(value).__name__} for {name}")
    return kept


def _beside(shard: Shard, name: str, value: Tensor) -> Shard:
    if value.shape[:1] != shard.rows.shape[:1]:
        raise TypeError(
            f"optimizer must keep a row for each of {len(shard.rows)} rows that are spread over ranks, or one number, "
            f"got {tuple(value.shape)} for {name}: its state is of this rank's rows together"
        )
    return shard._replace(rows=value)


def _loaded(
    module: nn.Module, optimizer: Optimizer | None, saved: Saved
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the module's state made of what was saved, and what an optimiser keeps beside its parameters."""
    beside = {name for name in saved.names() if BESIDE in name}
    own, names = _state(module), saved.names() - beside
    if names != set(own):
        lack, more = sorted(set(own) - names)[:5], sorted(names - set(own))[:5]
        raise ValueError(
            "module must have the names that were saved: "
            f"not saved were {', '.join(lack) or 'none'}, and not in module are {', '.join(more) or 'none'}"
        )
    for name, value in own.items():
        if saved.dtype(name) != value.dtype:
            raise ValueError(f"{name} must be {value.dtype} in what was saved, got {saved.dtype(name)}")
    beside = _asked_for(beside, module, optimizer)
    state, kept = dict[str, Tensor](), dict[str, Tensor]()
    for prefix, part in _parts(module):
        rows = {prefix + name for name in part.shards()}
        with_rows = [name.removeprefix(prefix) for name in beside if _parameter(name) in rows and saved.shape(name)]
        for name, tensor in part.from_saved(saved.within(prefix), with_rows).items():
            (kept if BESIDE in name else state)[prefix + name] = tensor
    for name in own.keys() - state.keys():
        if saved.shape(name) != tuple(own[name].shape):
            raise ValueError(f"{name} must have shape {tuple(own[name].shape)}, got {saved.shape(name)}")
        state[name] = saved.read(name)
    return state, kept | {name: saved.read(name) for name in beside - kept.keys()}


def _asked_for(beside: set[str], module: nn.Module, optimizer: Optimizer | None) -> set[str]:
    """Return the names of what an optimiser is to take; none without one."""
    if optimizer is None:
        return set()
    _check_optimizer(optimizer)
    has = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name for name, parameter in module.named_parameters() if id(parameter) in has}
    if strange := sorted(name for name in beside if _parameter(name) not in parameters):
        raise ValueError(f"optimizer must have the parameters that were saved with one, got none of {strange[0]}")
    return beside


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


def _parameter(name: str) -> str:
    """Return which parameter something lies beside."""
    return name.split(BESIDE)[0]


def _give(optimizer: Optimizer, module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give an optimiser what it is to keep beside the module's parameters."""
    place = {id(p): number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    given = optimizer.state_dict()
    for parameter in module.parameters():
        given["state"].pop(place.get(id(parameter)), None)
    for full, value in kept.items():
        name, key = full.split(BESIDE)
        given["state"].setdefault(place[id(module.get_parameter(name))], {})[key] = value
    optimizer.load_state_dict(given)
