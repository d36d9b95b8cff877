"""What every module with a state of its own keeps to: its dtypes, and what it takes for a state.

A base class for the memory, margins, mining rules and quality estimators whose buffers are written in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class StatefulModule(nn.Module):
    """A module whose buffers training writes.

    - Buffers listed in ``KEEPS_DTYPE`` keep theirs, whatever ``module.to(dtype)``, ``.half()`` or ``.bfloat16()`` says:
      a running mean in bfloat16 stands still, since what a step adds is less than its rounding.
    - ``load_state_dict`` refuses what cannot be a state, and leaves the module as it was.
    - ``reset_parameters`` starts over, after ``to_empty`` for instance.
    """

    KEEPS_DTYPE: ClassVar[tuple[str, ...]] = ()

    def reset_parameters(self) -> None:
        """Start over: the state of a new module."""
        raise NotImplementedError

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise if these tensors, by the names of buffers and parameters, cannot be a state. Default: all can.

        Raises:
            ValueError: naming the tensor and the rule that it breaks.
        """

    def check_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raise if the module's part of a ``state_dict`` cannot be a state; tensors that lack are not looked for.

        Raises:
            RuntimeError: as ``load_state_dict`` raises it, naming the tensor and the rule that it breaks.
        """
        names = [*self._parameters, *self._buffers]
        state = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        where = f" in {prefix!r}" if prefix else ""
        for name, value in state.items():
            if not isinstance(value, Tensor):
                came = type(value).__name__
                raise RuntimeError(
                    f"state_dict{where} holds no state of {type(self).__name__}: {name} is a {came}, no tensor"
                )
        # What holds no values here (on the meta device, or spread over ranks) cannot be read.
        if all(type(value) in (Tensor, nn.Parameter) and not value.is_meta for value in state.values()):
            try:
                self.check_state({name: value.detach() for name, value in state.items()})
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"state_dict{where} holds no state of {type(self).__name__}: {error}") from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_state_dict(state_dict, prefix)
        for name in self.KEEPS_DTYPE:  # with assign=True what is loaded takes the buffer's place
            own, value = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != own.dtype:
                state_dict[prefix + name] = value.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {id(self._buffers[name]) for name in self.KEEPS_DTYPE}

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]


def check_parts(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Check the states of all of a module's parts, before the first of them is loaded.

    Raises:
        RuntimeError: as ``StatefulModule.check_state_dict`` does.
    """
    for name, part in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(part, StatefulModule):
            part.check_state_dict(state_dict, f"{name}." if name else "")


def check_statistic(name: str, value: Tensor, *, low: float = -torch.inf, high: float = torch.inf) -> None:
    """Check a running statistic: finite, each number in ``[low, high]``; reads values.

    Raises:
        ValueError: naming the statistic, what was expected and what came.
    """
    if not bool((torch.isfinite(value) & (value >= low) & (value <= high)).all()):
        came = value.item() if value.ndim == 0 else "others"
        raise ValueError(f"{name} must be finite and in [{low:g}, {high:g}], got {came}")
