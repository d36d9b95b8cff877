"""Registration of an operator with PyTorch, once: schema, dispatching implementation, fake kernel, autograd.

Everything else finds the operator by its name. Others register operators of their own the same way, with kernels for
whichever backends they like (see CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._switches import is_on
from protomem_kernels._torch import (
    any_autocast,
    library_of_process,
    raise_versions,
    raise_versions_above,
    within_backward,
    without_autocast,
    written_arguments,
)
from protomem_kernels.backends.choice import BACKENDS, select
from protomem_kernels.backends.operators import FUNCTIONS, MEMORY, OPERATORS, PROBLEMS
from protomem_kernels.ops.call import DIRECT
from protomem_kernels.ops.once import once_differentiable
from protomem_kernels.ops.same_backend import with_backend_of_forward
from protomem_kernels.ops.schemas import SCHEMAS

WITHIN_BACKWARD = (
    "{name} was called within a backward pass. If torch.utils.checkpoint runs a forward pass again there, the state "
    "would move twice: checkpoint the encoder alone, and keep what writes the memory outside, if it is compiled too."
)
LIBRARY = library_of_process("protomem")


def values_can_be_read(tensor: Tensor) -> bool:
    """Say whether a check may look at values: always on the CPU, elsewhere only under ``PROTOMEM_DEBUG=1``."""
    return tensor.is_cpu or is_on("PROTOMEM_DEBUG")


def register(
    name: str,
    schema: str | None = None,
    *,
    fake: Callable[..., Any],
    works_through: str = MEMORY,
    check_values: Callable[..., None] | None = None,
    once_per_step: bool = False,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    kernels: Mapping[str, Callable[..., Any]] | None = None,
    problems: Callable[[torch.dtype], Iterable[Sequence[Any]]] | None = None,
) -> None:
    """Register ``protomem::name`` with PyTorch; again, by another copy of this package in the process, anew.

    Autocast is switched off inside: the accumulation dtype is part of the contract. The version counters of what the
    schema says is written (``Tensor(a!)``) are raised on every way to a kernel: kernels write through pointers, which
    autograd does not see.

    Args:
        name: of the operator, and of its kernels in every backend.
        schema: its arguments and results, as PyTorch spells them. Default: the one of this name in ``ops.schemas``.
        fake: the fake kernel, which never reads data.
        works_through: "batch", "chosen" or "memory" (``backends.operators``): which backends are asked first.
        check_values: sees the arguments before any kernel does and raises on values that must not occur.
        once_per_step: the operator moves a state on, so that a forward pass that is computed again must not call it:
            within a backward pass it raises. (Modules replay such a step: ``recomputation``.)
        setup_context: of autograd, as ``torch.library.register_autograd`` takes it.
        backward: likewise; its results can be differentiated no further.
        kernels: by backend, kernels that its own files do not have.
        problems: the arguments of small fixed problems, for a dtype (of the memory, or of the embeddings where there is
            none). A GPU's kernels have to solve them as the reference does before they serve there; without problems
            they are trusted.

    Raises:
        RuntimeError: the process has it with another schema.
    """
    schema = schema or SCHEMAS[name]
    known = LIBRARY.defined.get(name)
    if known is not None and (known.schema, known.backward is None) != (schema, backward is None):
        raise RuntimeError(
            f"protomem::{name} is {known.schema} in this process and cannot become {schema}: restart the process to "
            "use another version of protomem_kernels"
        )
    OPERATORS[name] = works_through
    if problems is not None:
        PROBLEMS[name] = problems
    for backend, kernel in (kernels or {}).items():
        BACKENDS[backend].add(name, kernel)

    def serve(tensors: Sequence[Tensor], args: Sequence[Any]) -> Any:
        if check_values is not None and values_can_be_read(tensors[0]):
            check_values(*args)
        if once_per_step and within_backward():
            raise RuntimeError(WITHIN_BACKWARD.format(name=name))
        kernel = select(name, tensors, args)
        if written:  # before the kernel: one that fails half-way has written too
            raise_versions([args[place] for place in written if args[place] is not None])
        if not any_autocast():
            return kernel(*args)
        with without_autocast(tensors[0]):
            return kernel(*args)

    def implementation(*args: Any) -> Any:
        return serve([arg for arg in args if isinstance(arg, Tensor)], args)

    if backward is not None:
        setup_context, backward = with_backend_of_forward(setup_context, once_differentiable(name, backward))
    current = {"implementation": implementation, "fake": fake, "setup_context": setup_context, "backward": backward}
    if known is None:
        LIBRARY.defined[name] = _define(name, schema, SimpleNamespace(schema=schema, **current))
    else:
        vars(known).update(current)
    written = written_arguments(getattr(torch.ops.protomem, name).default)
    function = None
    if backward is not None:
        assert setup_context is not None
        function = _autograd_function(name, implementation, setup_context, backward)
    DIRECT[name] = serve, function


def _define(name: str, schema: str, current: SimpleNamespace) -> SimpleNamespace:
    """Define ``protomem::name`` in PyTorch by what is ``current`` in each call, and return that."""
    library: torch.library.Library = LIBRARY.library
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.protomem, name).default
    written = written_arguments(overload)
    if written:
        raise_versions_above(library, overload, written)
    library.impl(name, lambda *args: current.implementation(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"protomem::{name}", lambda *args: current.fake(*args), lib=library)
    if current.backward is not None:
        torch.library.register_autograd(
            f"protomem::{name}",
            lambda ctx, *grads: current.backward(ctx, *grads),
            setup_context=lambda ctx, inputs, output: current.setup_context(ctx, inputs, output),
            lib=library,
        )
    return current


def register_function(name: str, around: str) -> None:
    """Let ``explain`` know a public function that is a few vector operations around one operator."""
    FUNCTIONS[name] = around


def _autograd_function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    members = {
        "forward": staticmethod(implementation),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    return type(name, (torch.autograd.Function,), members)
