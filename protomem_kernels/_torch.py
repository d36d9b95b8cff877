"""What this package asks of PyTorch beyond its public interface, and of which PyTorch: nowhere else is it named.

All of it stands in every release from 2.10 on, the oldest one supported; the newest that it was tried with is 2.13. A
name that goes missing fails here, at import.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

OLDEST = (2, 10)  # whose stable ABI the compiled parts use (TORCH_TARGET_VERSION)

# Looked up once: calls of these are a good part of what a small call costs.
any_autocast = torch._C._is_any_autocast_enabled  # quick, where the question for one device reads its name
count_modes = torch._C._len_torch_dispatch_stack
transform_level = torch._C._functorch.maybe_current_level
current_graph_task = torch._C._current_graph_task_id
# Raises the version counters of a list of tensors, by which autograd knows that what it saved was written over.
raise_versions = torch._C._increment_version
# Objects by name that PyTorch takes along where another thread of its own goes on with this one's work.
has_stashed, stashed, stash = torch._C._is_key_in_tls, torch._C._get_obj_in_tls, torch._C._stash_obj_in_tls
# Says within a backward pass whether another one may follow (retain_graph); True outside of one.
graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


def too_old() -> str | None:
    """Return why this torch is too old for the compiled parts, or None."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= OLDEST:
        return None
    return f"it needs torch {'.'.join(map(str, OLDEST))} or newer, and this is torch {torch.__version__}"


def within_backward() -> bool:
    """Say whether this is called from a backward pass: by a hook, or by a forward pass that is computed again."""
    return bool(current_graph_task() != -1)


def library_of_process(namespace: str) -> SimpleNamespace:
    """Return the process's own library of operators in a namespace: ``library``, and by name what is ``defined`` there.

    PyTorch keeps operators for the process and lets nobody define one twice; a library that is garbage takes its
    operators away. So there is one for all copies of this package (a notebook's reload and a purge of ``sys.modules``
    make a second), kept where PyTorch keeps the namespace.
    """
    owner = getattr(torch.ops, namespace)
    kept: SimpleNamespace | None = vars(owner).get("_of_process")
    if kept is None:
        kept = SimpleNamespace(library=torch.library.Library(namespace, "FRAGMENT"), defined={})
        owner._of_process = kept
    return kept


def has_kernel(overload: Any, device: str) -> bool:
    """Say whether an operator was implemented for a device: "CPU" or "CUDA"."""
    return bool(overload.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, device)))


def unwrapped(overload: Any) -> Any:
    """Return the function within an operator's overload: one Python call less each time."""
    return getattr(overload, "_op", overload)


def written_arguments(overload: Any) -> tuple[int, ...]:
    """Return the places of the arguments that an operator writes: ``Tensor(a!)`` in its schema."""
    infos = [argument.alias_info for argument in overload._schema.arguments]
    return tuple(place for place, info in enumerate(infos) if info is not None and info.is_write)


def raise_versions_above(library: torch.library.Library, overload: Any, written: tuple[int, ...]) -> None:
    """Have the dispatcher raise the versions of what an operator writes before modes and subclasses unwrap it."""
    below = torch._C._after_ADInplaceOrView_keyset

    def raise_and_go_on(keys: Any, *args: Any) -> Any:
        raise_versions([args[place] for place in written if args[place] is not None])
        return overload.redispatch(keys & below, *args)

    library.impl(overload._schema.name, raise_and_go_on, "ADInplaceOrView", with_keyset=True)


_NOTHING = contextlib.nullcontext()
_has_autocast = functools.cache(torch.amp.is_autocast_available)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which products on the tensor's device keep their dtype."""
    device = tensor.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


# Collectives on one tensor: since 2.13 by another name, under which the earlier one warns.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def active_ddp() -> nn.parallel.DistributedDataParallel | None:
    """Return the ``DistributedDataParallel`` whose forward pass this is called from, or None."""
    return nn.parallel.DistributedDataParallel._active_ddp_module


def ignored_by_ddp(ddp: nn.parallel.DistributedDataParallel) -> frozenset[str]:
    """Return the names of the buffers and parameters that a ``DistributedDataParallel`` leaves alone."""
    return frozenset(ddp.parameters_to_ignore)


def leave_out_of_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Have a ``DistributedDataParallel`` built around ``model`` leave these alone, besides what it has to already."""
    names = {*names, *getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))
