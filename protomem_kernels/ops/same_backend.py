"""Backward passes by the backend that served forward: what ``use_backend`` chose holds for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from protomem_kernels.backends.choice import in_force, use_backend_unless_in_force


def with_backend_of_forward(
    setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return autograd's two functions so that backward asks for the backend that was in force in forward.

    Backward may run after the block of ``use_backend``, and in another thread. A block that is in force where
    ``backward()`` is called goes first.
    """

    def noting(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = in_force()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    @functools.wraps(backward)
    def served(ctx: Any, *grads: Any) -> Any:
        if ctx.backend is None:
            return backward(ctx, *grads)
        with use_backend_unless_in_force(ctx.backend):
            return backward(ctx, *grads)

    return noting, served
