"""Backward passes as forward was served: what ``use_backend`` and ``matmul_precision`` chose holds for both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from protomem_kernels.backends import precision
from protomem_kernels.backends.choice import in_force, use_backend_unless_in_force


def with_backend_of_forward(
    setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return autograd's two functions so that backward asks for the backend and the precision in force in forward.

    Backward may run after the block of ``use_backend``, and in another thread. A block that is in force where
    ``backward()`` is called goes first; the precision is always that of forward.
    """

    def noting(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, ctx.precision = in_force(), precision.in_force()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    @functools.wraps(backward)
    def served(ctx: Any, *grads: Any) -> Any:
        with contextlib.ExitStack() as as_in_forward:
            if ctx.backend is not None:
                as_in_forward.enter_context(use_backend_unless_in_force(ctx.backend))
            if ctx.precision != precision.in_force():
                as_in_forward.enter_context(precision.matmul_precision(ctx.precision))
            return backward(ctx, *grads)

    return noting, served
