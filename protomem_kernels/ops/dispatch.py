"""Which backend serves a call, and why the others do not.

Every operator is registered with PyTorch once (``register``); its implementation looks up the backend at run time, so
that ``use_backend`` also reaches into compiled graphs. A backend is a name, a table of kernels, a reason why it is not
available here (or None) and a reason why it refuses given tensors (or None).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels import compiled, cuda, reference, triton

LIBRARY = torch.library.Library("protomem", "DEF")


@dataclass(frozen=True)
class Backend:
    """A set of kernels: ``kernels`` maps an operator's name to its function.

    ``unavailable()`` and ``refuses(operator, tensors)`` return the reason, or None. ``passed_over(tensors)``, if there
    is one, hears of every call that is left to the next backend because this one is not available. ``on_gpu(operator,
    tensors, architecture)`` is the reason why such tensors on a GPU of that compute capability could not be served,
    whatever there is at hand.
    """

    name: str
    kernels: dict[str, Callable[..., Any]] = field(default_factory=dict)
    unavailable: Callable[[], str | None] = lambda: None
    refuses: Callable[[str, Sequence[Tensor]], str | None] = lambda operator, tensors: None
    passed_over: Callable[[Sequence[Tensor]], None] | None = None
    on_gpu: Callable[[str, Sequence[Tensor], int], str | None] = lambda operator, tensors, architecture: None

    def reason_against(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
        """Return why this backend cannot serve the call, or None if it can."""
        reason = self.unavailable()
        if reason is None and operator not in self.kernels:
            reason = f"has no kernel for {operator}"
        return reason or self.refuses(operator, tensors)


# In the order of preference; the reference serves every device and comes last.
BACKENDS: dict[str, Backend] = {
    "cuda": Backend("cuda", cuda.KERNELS, cuda.unavailable, cuda.refuses, on_gpu=cuda.on_gpu),
    "triton": Backend("triton", triton.KERNELS, triton.unavailable, triton.refuses, on_gpu=triton.on_gpu),
    "cpu": Backend(
        "cpu", compiled.CPU_KERNELS, compiled.unavailable, compiled.refuses, compiled.warn_once, compiled.on_gpu
    ),
    "reference": Backend("reference", reference.KERNELS),
}

# Small operators want a quick launch, which CUDA C++ has; the others want the newest tensor cores, which Triton uses.
SMALL = ("aggregate_prototypes", "aggregate_prototypes_backward", "enqueue_")
_IN_ORDER = tuple(BACKENDS)
_TRITON_FIRST = tuple(sorted(BACKENDS, key=lambda name: name != "triton"))


def preference(operator: str) -> tuple[str, ...]:
    """Return the backends' names in the order in which they are asked to serve the operator."""
    return _IN_ORDER if operator in SMALL else _TRITON_FIRST


# The losses are a few vector operations around the one heavy operator.
SERVED_BY = {"margin_softmax_loss": "negative_logsumexp"}

_wanted: ContextVar[str | None] = ContextVar("protomem_backend", default=None)


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

    >>> with use_backend("reference"):
    ...     print(explain("aggregate_prototypes", torch.zeros(2, 3))[-1])
    reference  chosen
    """
    operator = SERVED_BY.get(operator, operator)
    if operator not in reference.KERNELS:
        names = ", ".join(sorted({*reference.KERNELS, *SERVED_BY}))
        raise ValueError(f"operator must be one of {names}, got {operator!r}")
    chosen, wanted, choices = False, _wanted.get(), []
    for name in preference(operator):
        backend = BACKENDS[name]
        if architecture is None:
            reason = backend.reason_against(operator, tensors)
        else:
            reason = backend.on_gpu(operator, tensors, architecture)
        if reason is None and wanted is not None and backend.name != wanted:
            reason = f"use_backend({wanted!r}) is in force"
        choices.append(Choice(backend.name, reason is None and not chosen, reason))
        chosen = chosen or reason is None
    return choices


def select(operator: str, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """Return the kernel that serves the call.

    Raises:
        RuntimeError: the backend asked for by ``use_backend`` cannot; the message lists every backend's reason.
    """
    wanted = _wanted.get()
    for name in preference(operator) if wanted is None else (wanted,):
        backend = BACKENDS[name]
        if backend.unavailable() is not None:
            if wanted is None and backend.passed_over is not None:
                backend.passed_over(tensors)
        elif operator in backend.kernels and backend.refuses(operator, tensors) is None:
            return backend.kernels[operator]
    listing = "\n  ".join(
        f"{name:<10} {b.reason_against(operator, tensors) or 'could'}" for name, b in BACKENDS.items()
    )
    raise RuntimeError(f"backend {wanted!r} cannot serve {operator}:\n  {listing}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, have every operator served by one backend, or raise the list of reasons why it cannot.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

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
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def values_can_be_read(tensor: Tensor) -> bool:
    """Say whether a check may look at values: always on the CPU, elsewhere only under ``PROTOMEM_DEBUG=1``."""
    return tensor.is_cpu or os.environ.get("PROTOMEM_DEBUG") == "1"


_NOTHING = contextlib.nullcontext()
_has_autocast = functools.cache(torch.amp.is_autocast_available)
_any_autocast = torch._C._is_any_autocast_enabled  # quick, where the question for one device reads its name


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which products on the tensor's device keep their dtype."""
    device = tensor.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    check_values: Callable[..., None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register ``protomem::name`` with PyTorch: schema, dispatching implementation, fake kernel and autograd.

    ``check_values`` sees the arguments before any kernel does and raises on values that must not occur. Autocast is
    switched off inside: the accumulation dtype is part of the contract.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def serve(tensors: Sequence[Tensor], args: Sequence[Any]) -> Any:
        if check_values is not None and values_can_be_read(tensors[0]):
            check_values(*args)
        kernel = select(name, tensors)
        if not _any_autocast():
            return kernel(*args)
        with without_autocast(tensors[0]):
            return kernel(*args)

    def implementation(*args: Any) -> Any:
        return serve([arg for arg in args if isinstance(arg, Tensor)], args)

    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"protomem::{name}", fake, lib=LIBRARY)
    function = None
    if backward is not None:
        backward = _once(name, backward)
        torch.library.register_autograd(f"protomem::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        function = _autograd_function(name, implementation, setup_context, backward)
    _DIRECT[name] = serve, function


# Operators by name: what serves a call, given its tensors and all its arguments; and the same as an autograd function
# if the operator can be differentiated.
_DIRECT: dict[str, tuple[Callable[..., Any], type[torch.autograd.Function] | None]] = {}
# Looked up once: calls of these are a good part of what a small call costs.
_count_modes = torch._C._len_torch_dispatch_stack
_transform_level = torch._C._functorch.maybe_current_level
# To look a type up is quicker than isinstance.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({type(None), bool, int, float})


def call(name: str, *args: Any) -> Any:
    """Call ``protomem::name``; past PyTorch's dispatcher where nothing but autograd could tell the difference.

    The dispatcher calls a Python implementation through two more Python frames and boxes every argument each way,
    which costs small calls more than the work itself. A compiler, a mode or a tensor subclass still sees the operator.
    """
    if is_watched(args):
        return getattr(torch.ops.protomem, name).default(*args)
    tensors = [arg for arg in args if type(arg) in _TENSORS]
    serve, function = _DIRECT[name]
    if function is not None and torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return function.apply(*args)
    if _transform_level() is not None:
        # Within a function transform tensors are wrapped and own no memory: the dispatcher unwraps them.
        return getattr(torch.ops.protomem, name).default(*args)
    return serve(tensors, args)


def is_watched(args: Sequence[Any]) -> bool:
    """Say whether a compiler, a mode or a tensor subclass among the arguments wants to see operators."""
    if torch.compiler.is_dynamo_compiling():  # other compilers come as modes or subclasses
        return True
    for arg in args:
        kind = type(arg)
        if kind not in _TENSORS and kind not in _NUMBERS and isinstance(arg, Tensor):
            return True
    return _count_modes() > 0


def _autograd_function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    members = {
        "forward": staticmethod(implementation),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
    }
    return type(name, (torch.autograd.Function,), members)


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``backward`` with results that raise where somebody differentiates them again.

    They are computed outside autograd; what autograd could follow of them would be a part of the second derivative.
    They depend on ``grads`` and on what was saved, which has to hold every argument that can require a gradient.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # the usual case: no create_graph
            return results
        results = results if isinstance(results, tuple) else (results,)
        made = [result for result in results if result is not None]
        final = iter(_Final.apply(name, len(made), *made, *grads, *ctx.saved_tensors))  # type: ignore[no-untyped-call]
        return tuple(None if result is None else next(final) for result in results)

    return guarded


class _Final(torch.autograd.Function):
    """The first ``count`` of the tensors as they are, as functions of all of them whose gradient is an error."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} can be differentiated once: its backward pass has no gradient of its own (double backward, "
            "create_graph=True, torch.func.hessian). Form the logits in plain PyTorch instead."
        )
