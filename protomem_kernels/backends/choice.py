"""Which backend serves a call, and why the others do not.

``BACKENDS`` is the one list of backends. An operator's implementation asks ``select`` at run time, so that
``use_backend`` also reaches into compiled graphs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels._switches import is_on
from protomem_kernels._torch import has_stashed, stash, stashed
from protomem_kernels.backends import chunked, cpu, cuda, precision, rates, reference, trial, triton
from protomem_kernels.backends.operators import BATCH, FUNCTIONS, MEMORY, OPERATORS
from protomem_kernels.backends.protocol import Backend, Kernel
from protomem_kernels.backends.self_check import capturing, known_objection, narrowest, objection

# In the order of preference; the reference serves every device and comes last.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cuda.BACKEND, triton.BACKEND, chunked.BACKEND, cpu.BACKEND, reference.BACKEND)
}

_IN_ORDER = tuple(BACKENDS)
_TRITON_FIRST = tuple(sorted(BACKENDS, key=lambda name: name != "triton"))


def preference(operator: str, tensors: Sequence[Tensor] = (), architecture: int | None = None) -> tuple[str, ...]:
    """Return the backends' names in the order in which they are asked to serve the operator.

    Small operators want a quick launch, which CUDA C++ has. For the others it is the predicted time of their products
    on the tensors' GPU, or on one of this architecture (``rates``); where neither is known, Triton comes first.
    """
    works_through = OPERATORS.get(operator)
    if works_through == BATCH:
        return _IN_ORDER
    if architecture is None and tensors and tensors[0].is_cuda:
        architecture = _architecture(tensors[0].device)
    if architecture is None or works_through != MEMORY:
        return _TRITON_FIRST
    matrices = [tensor for tensor in tensors if tensor.ndim == 2 and tensor.dtype.is_floating_point]
    if not matrices:
        return _TRITON_FIRST
    return _by_time(operator, narrowest(tensors), matrices[-1].shape[1], architecture, precision.in_force())


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=1024)
def _by_time(operator: str, dtype: torch.dtype, dim: int, architecture: int, held: str) -> tuple[str, ...]:
    """Return the backends in the order of predicted times, equal ones and those without one as ever.

    The precision ``held`` is in force; it is a part of the key.
    """
    times = {
        name: rates.predicted(name, backend.products(operator, dtype, dim, architecture), dim, architecture)
        for name, backend in BACKENDS.items()
    }
    return tuple(sorted(_TRITON_FIRST, key=lambda name: times[name]))


_wanted: ContextVar[str | None] = ContextVar("protomem_backend", default=None)
# The same for threads of autograd's, which have no context of ours: (thread, backend), taken along from where
# backward() was called.
_HANDED_ON = "protomem_backend"
_ever_wanted = False  # spares the usual call a look


def in_force() -> str | None:
    """Return the backend that ``use_backend`` asks for here, or None."""
    wanted = _wanted.get()
    if wanted is None and _ever_wanted and has_stashed(_HANDED_ON):
        thread, handed_on = stashed(_HANDED_ON)
        if thread != threading.get_ident():  # in that thread itself the context knows better
            return handed_on  # type: ignore[no-any-return]
    return wanted


def launches_are_dear(tensor: Tensor) -> bool:
    """Say whether operations on the tensor are launches, of which operators that fuse many had better take few.

    On a GPU, or where Triton's interpreter stands in for one; not where a compiler fuses them itself, or a backend is
    asked for that has no such operators.
    """
    if torch.compiler.is_compiling():
        return False
    wanted = in_force()
    if tensor.is_cuda:
        return wanted is None or BACKENDS[wanted].kernel("reduce_losses") is not None
    return wanted in ("triton", "chunked") and triton.interpreted()


class Choice(NamedTuple):
    """One line of ``explain``: a backend, whether it would serve the call, and why it would not (None: it could)."""

    backend: str
    chosen: bool
    reason: str | None

    def __str__(self) -> str:
        return f"{self.backend:<10} {'chosen' if self.chosen else self.reason or 'available'}"


def explain(operator: str, *tensors: Tensor, architecture: int | None = None) -> list[Choice]:
    """Say which backend would serve ``operator`` for ``tensors``, and for each other one why it would not.

    Args:
        operator: the name of a public operator such as ``"margin_softmax_loss"``.
        tensors: the call's tensors; without any, only the installation is looked at.
        architecture: a compute capability such as 90 for 9.0: what would serve tensors like these on such a GPU with
            what is installed here, wherever they are and whether or not this machine has one.

    Returns:
        One ``Choice(backend, chosen, reason)`` per backend, in the order of preference for this operator.

    Raises:
        ValueError: there is no such operator.

    >>> import torch
    >>> with use_backend("reference"):
    ...     print(explain("aggregate_prototypes", torch.zeros(2, 3))[-1])
    reference  chosen
    """
    operator = FUNCTIONS.get(operator, operator)
    if operator not in OPERATORS:
        names = ", ".join(sorted({*OPERATORS, *FUNCTIONS}))
        raise ValueError(f"operator must be one of {names}, got {operator!r}")
    chosen, wanted, choices = False, in_force(), []
    for name in preference(operator, tensors, architecture):
        backend = BACKENDS[name]
        if architecture is None:
            reason = _reason(backend, operator, tensors)
        else:
            reason = backend.on_gpu(operator, tensors, architecture)
        if reason is None and wanted is not None and backend.name != wanted:
            reason = f"use_backend({wanted!r}) is in force"
        choices.append(Choice(backend.name, reason is None and not chosen, reason))
        chosen = chosen or reason is None
    return choices


def select(operator: str, tensors: Sequence[Tensor], args: Sequence[Any] | None = None) -> Kernel:
    """Return the kernel that serves the call; its arguments are needed to find the fastest by trial.

    Raises:
        RuntimeError: the backend asked for by ``use_backend`` cannot; the message lists every backend's reason.
    """
    wanted = in_force()
    if wanted is None and args is not None and may_be_tried(operator, tensors):
        names: Sequence[str] = _by_trial(operator, tensors, args)
    else:
        names = preference(operator, tensors) if wanted is None else (wanted,)
    for name in names:
        backend = BACKENDS[name]
        if backend.unavailable() is not None:
            if wanted is None:
                backend.passed_over(tensors)
            continue
        kernel = backend.kernel(operator)
        if kernel is None or backend.refuses(operator, tensors) is not None:
            continue
        if not backend.needs_check(tensors) or _objection(backend, operator, kernel, tensors) is None:
            return kernel
    listing = "\n  ".join(f"{name:<10} {_reason(b, operator, tensors) or 'could'}" for name, b in BACKENDS.items())
    raise RuntimeError(f"backend {wanted!r} cannot serve {operator}:\n  {listing}")


def may_be_tried(operator: str, tensors: Sequence[Tensor]) -> bool:
    """Say whether the engines are to be timed: on a GPU, outside capture, if PROTOMEM_AUTOTUNE=1 asks for it."""
    on_a_gpu = bool(tensors) and tensors[0].is_cuda and OPERATORS.get(operator) == MEMORY
    return on_a_gpu and is_on("PROTOMEM_AUTOTUNE") and not capturing(tensors[0].device)


def _by_trial(operator: str, tensors: Sequence[Tensor], args: Sequence[Any]) -> tuple[str, ...]:
    """Return the backends, those that could serve in the order of measured times, the reference and others after."""
    predicted = preference(operator, tensors)
    engines = {}
    for name in predicted:
        backend = BACKENDS[name]
        kernel = backend.kernel(operator) if backend.unavailable() is None else None
        if name == "reference" or kernel is None or backend.refuses(operator, tensors) is not None:
            continue
        if not backend.needs_check(tensors) or _objection(backend, operator, kernel, tensors) is None:
            engines[name] = functools.partial(kernel, *args)
    fastest = trial.order(operator, narrowest(tensors), tensors, engines) if len(engines) > 1 else list(engines)
    return (*fastest, *(name for name in predicted if name not in fastest))


def _objection(backend: Backend, operator: str, kernel: Kernel, tensors: Sequence[Tensor]) -> str | None:
    definition = BACKENDS["reference"].kernel(operator)
    return None if definition is None else objection(backend, operator, kernel, definition, tensors)


def _reason(backend: Backend, operator: str, tensors: Sequence[Tensor]) -> str | None:
    return backend.reason_against(operator, tensors) or known_objection(backend, operator, tensors)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, have every operator served by one backend, or raise the list of reasons why it cannot.

    It holds for what this thread calls within the block (and for asyncio tasks made there), and for the backward passes
    of that: those called within the block, in whichever threads autograd runs them (on a GPU in its own), and those
    called later of what was computed within the block, unless another block is in force there. The backward pass of a
    compiled function is served as its caller's block says.

    It does not hold in other threads that are started within the block, ``DataParallel``'s replicas included, so that
    each may have its own: enter it there, or start them with ``contextvars.copy_context().run``.

    Args:
        name: "reference", "cpu", "chunked", "triton" or "cuda".

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend is not available here; raised on entry, or by the call that it cannot serve.

    >>> with use_backend("reference"):
    ...     pass
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if BACKENDS[name].unavailable() is not None:
        listing = "\n  ".join(f"{other:<10} {b.unavailable() or 'available'}" for other, b in BACKENDS.items())
        raise RuntimeError(f"backend {name!r} is not available:\n  {listing}")
    global _ever_wanted
    _ever_wanted = True
    token = _wanted.set(name)
    outside = stashed(_HANDED_ON) if has_stashed(_HANDED_ON) else (threading.get_ident(), None)
    stash(_HANDED_ON, (threading.get_ident(), name))
    try:
        yield
    finally:
        stash(_HANDED_ON, outside)
        _wanted.reset(token)


def use_backend_unless_in_force(name: str) -> contextlib.AbstractContextManager[None]:
    """Do what ``use_backend`` does where no block is in force, else leave that one in force."""
    return use_backend(name) if in_force() is None else contextlib.nullcontext()
