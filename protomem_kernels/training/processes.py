"""The processes of a run: this one, or those that ``torchrun`` has started with it.

All of them do the same, each on its share of every batch; what they say and write comes from the first one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from protomem_kernels.distributed.ranks import ALONE, Ranks, ranks_of
from protomem_kernels.training.errors import RunError

Done = TypeVar("Done")
TOLD_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
# Seconds in which gloo's threads let go of the tensors of the last collective. They need Python for that, and where it
# ends before, the process is aborted (PyTorch 2.13).
LETTING_GO = 0.1
# How gloo and NCCL say, by a RuntimeError, that another process is gone or does not answer.
LOST = ("gloo", "nccl", "connection", "timed out", "waited in vain")


class ToldElsewhereError(Exception):
    """The run ends, and another process says why.

    Attributes:
        exit_code: of this process, as the other one has it.
    """

    def __init__(self, exit_code: int = 2) -> None:
        super().__init__("the run has ended; another of its processes says why")
        self.exit_code = exit_code


@contextmanager
def joined(device: torch.device, seconds: int) -> Iterator[Ranks]:
    """Join the processes that a launcher has started, within the block; a group that there is already stays.

    Args:
        device: where this process trains.
        seconds: how long one waits for another before it gives up.

    Yields:
        the ranks, one alone where there is no launcher.
    """
    if dist.is_available() and dist.is_initialized():
        yield ranks_of(dist.group.WORLD)
    elif all(name in os.environ for name in TOLD_BY_LAUNCHERS) and os.environ["WORLD_SIZE"] != "1":
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=seconds))
        try:
            yield ranks_of(dist.group.WORLD)
        finally:
            dist.destroy_process_group()
            time.sleep(LETTING_GO)
    else:
        yield ALONE


def _join(backend: str, timeout: timedelta) -> None:
    """Make the process group that the launcher describes.

    torchrun keeps one store of addresses for all its starts of the processes on a machine, and those of the last start
    lead nowhere: each start gets names of its own. Over several machines the starts are not counted together;
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's own environment has it make a store for each there.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = PrefixStore(f"start {os.environ.get(RESTARTS, 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def started_by() -> str | None:
    """Return what tells this start by torchrun from every other, and is the same when torchrun starts it anew."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    chosen = os.environ["TORCHELASTIC_RUN_ID"]
    return chosen if chosen != "none" else f"{socket.gethostname()}:{os.getppid()}"


def started_anew() -> bool:
    """Say whether torchrun has started these processes before; over several machines, where that is not known, True."""
    return os.environ.get(RESTARTS, "0") != "0" or os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


def together(ranks: Ranks, do: Callable[[], Done]) -> Done:
    """Return what ``do`` returned here, if it raised in no process.

    Raises:
        Exception: what ``do`` raised here; ToldElsewhereError if it raised in another process alone, or the same in one
            before this.
    """
    if ranks.alone:
        return do()
    refused: Exception | None = None
    try:
        done = do()
    except Exception as error:
        refused = error
    reasons = ranks.objects(None if refused is None else f"{type(refused).__name__}: {refused}")
    if refused is not None and reasons[ranks.rank] not in reasons[: ranks.rank]:
        raise refused
    if any(reason is not None for reason in reasons):
        raise ToldElsewhereError
    return done


def told_by_first(ranks: Ranks, do: Callable[[], Done]) -> Done:
    """Return in every process what ``do`` returned in the first, which alone does it.

    Raises:
        Exception: what it raised there; ToldElsewhereError in the others.
    """
    own = together(ranks, lambda: do() if ranks.rank == 0 else None)
    told: Done = ranks.objects(own)[0]
    return told


def any_of(ranks: Ranks, device: torch.device, *numbers: int) -> list[int]:
    """Return of each number the largest that a process has."""
    if ranks.alone:
        return [*numbers]
    return [int(n) for n in ranks.max_(torch.tensor(numbers, device=device)).tolist()]


def first_tells(ranks: Ranks, error: BaseException, exit_code: int = 2) -> BaseException:
    """Return what to raise where all processes end for one reason: the error in the first, silence in the others."""
    return error if ranks.rank == 0 else ToldElsewhereError(exit_code)


def check_alike(ranks: Ranks, options: Mapping[str, Any]) -> None:
    """Check that all processes were started with the same options.

    Raises:
        RunError: naming the first that differs; ToldElsewhereError in all processes but the first.
    """
    first, *others = ranks.objects(options)
    for theirs in others:
        for key, value in first.items():
            if theirs[key] != value:
                error = RunError(f"{key} must be the same in all processes, got {value!r} and {theirs[key]!r}")
                raise first_tells(ranks, error)


def share(batch: Sequence[int], images_per_identity: int, ranks: Ranks) -> list[int]:
    """Return this process's part of a batch: whole identities, in turn, one more for the first ones where it must be.

    Args:
        batch: positions of images, those of an identity side by side.
        images_per_identity: how many those are.
        ranks: among whom.

    Raises:
        RunError: a process would have no identity.

    >>> share([7, 8, 1, 2, 4, 5], 2, ALONE)
    [7, 8, 1, 2, 4, 5]
    """
    identities = len(batch) // images_per_identity
    if identities < ranks.size:
        raise RunError(
            f"identities_per_batch must leave each of {ranks.size} processes an identity of each batch, got a batch of "
            f"{identities}"
        )
    own = range(ranks.rank, identities, ranks.size)
    return [image for one in own for image in batch[one * images_per_identity : (one + 1) * images_per_identity]]


def is_lost(error: Exception) -> bool:
    """Say whether an error tells that another process is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
