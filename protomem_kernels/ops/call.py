"""Calls of the operators, past PyTorch's dispatcher where nothing but autograd could tell the difference.

The dispatcher calls a Python implementation through two more Python frames and boxes every argument each way. Without
gradients that is half the time of a small call; with gradients going past it buys 2 to 5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._torch import count_modes, transform_level

# Operators by name: what serves a call, given its tensors and all its arguments; and the same as an autograd function
# if the operator can be differentiated.
DIRECT: dict[str, tuple[Callable[..., Any], type[torch.autograd.Function] | None]] = {}
# To look a type up is quicker than isinstance.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({type(None), bool, int, float})


def call(name: str, *args: Any) -> Any:
    """Call ``protomem::name``; a compiler, a mode or a tensor subclass still sees the operator."""
    if is_watched(args):
        return getattr(torch.ops.protomem, name).default(*args)
    tensors = [arg for arg in args if type(arg) in _TENSORS]
    serve, function = DIRECT[name]
    if function is not None and torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return function.apply(*args)
    if transform_level() is not None:
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
    return count_modes() > 0
