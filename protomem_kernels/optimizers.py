"""The optimiser's memory of a prototype: what has to go when another identity takes the slot.

Optimisers keep tensors beside each parameter: momentum, squared gradients. A row of them that speaks of the identity
that left would move the one that came. Each optimiser has its own zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What a row begins with where that is not zero: the name of the state -> the option of its parameter group.
BEGINS_WITH = {"sum": "initial_accumulator_value", "step_size": "lr"}  # Adagrad, Rprop


def clear_rows(optimizer: torch.optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Give rows of an optimiser's state the values of a new parameter's.

    State of the parameter's own shape is cleared, several such tensors in one (N, M, D), and state with one number per
    row (M, 1). 8-bit state (bitsandbytes: codes in ``stateN``, what they mean in ``qmapN``) gets the code of zero.

    Args:
        optimizer: holds ``parameter``.
        parameter: (M, D).
        mask: (M,) bool, the rows.

    Raises:
        TypeError: state of the parameter's shape whose zero is not known; nothing is cleared.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if not state:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    begins = {
        name: _beginning(name, value, state, group)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape[-2:] in (parameter.shape, (parameter.shape[0], 1))
    }
    for name, value in begins.items():
        state[name].masked_fill_(mask[:, None], value)


def _beginning(name: str, value: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> float | Tensor:
    """Return what the entries of a new parameter's state are."""
    if type(value) is Tensor and value.dtype.is_floating_point:
        begins = group.get(BEGINS_WITH.get(name, ""), 0.0)
        return begins if isinstance(begins, Tensor) else float(begins)
    meanings = state.get(name.replace("state", "qmap"))
    if type(value) is Tensor and value.dtype == torch.uint8 and isinstance(meanings, Tensor):
        code = meanings.abs().argmin()
        return code.to(value.dtype)
    raise TypeError(
        f"optimizer must keep state whose zero is known for memory.prototypes (floating point, or bitsandbytes' 8 bits "
        f"with a qmap), got {type(value).__name__} of {value.dtype} as {name!r}: step the prototypes with an optimizer "
        "of 32-bit state"
    )
