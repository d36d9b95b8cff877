"""Activation checkpointing runs a forward pass again within the backward pass: what it must not do twice.

A memory that is written again, or statistics that move again, would give the gradient of another loss than the one
returned. ``Replay`` hands a recomputation what the step itself got, and refuses where that step is not the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from protomem_kernels._torch import within_backward

Result = TypeVar("Result")
# How far a recomputed row may lie from the step's own, relative to its length: kernels that add up in no fixed order
# move it by less, another batch by far more.
SAME = 1e-2
WAY_OUT = (
    "Checkpoint the encoder alone, and call the loss outside torch.utils.checkpoint, or run backward before the next "
    "forward pass."
)


class Replay(Generic[Result]):
    """Moves a module's state once per step, however often the step's forward pass is computed.

    Args:
        what: the state, for the message of the error.

    The last step's inputs are kept, without their graph, until the next one.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._inputs: list[Tensor] | None = None
        self._versions: list[int] = []
        self._result: Result

    def __call__(self, move: Callable[[], Result], inputs: Sequence[Tensor], state: Sequence[Tensor]) -> Result:
        """Return ``move()``, or within a backward pass what it returned in the step that is recomputed.

        Args:
            move: moves the state.
            inputs: tensors of any shapes that tell one step from another.
            state: tensors that ``move`` writes and the rest of the step reads.

        Raises:
            RuntimeError: within a backward pass, if ``inputs`` are not those of the last step, or the state has been
                written since.
        """
        if torch.compiler.is_compiling():
            return move()
        if within_backward():
            written_since = self._versions != [version(tensor) for tensor in state]
            if self._inputs is None or written_since or not _same(self._inputs, inputs):
                raise RuntimeError(
                    f"{self.what} is recomputed within a backward pass (torch.utils.checkpoint), but has moved on "
                    f"since the step that is recomputed. {WAY_OUT}"
                )
            return self._result
        self._result = move()
        self._inputs = [tensor.detach() for tensor in inputs]
        self._versions = [version(tensor) for tensor in state]
        return self._result

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin without a last step."""
        return Replay, (self.what,)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written; -1 for one of inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _same(kept: Sequence[Tensor], again: Sequence[Tensor]) -> bool:
    """Say whether tensors equal those kept: integers exactly, floating rows to ``SAME`` of their length."""
    for a, b in zip(kept, again, strict=True):
        if a.shape != b.shape:
            return False
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return False
        elif a.numel():
            a, b = (torch.atleast_2d(t.detach().float()) for t in (a, b))
            apart = torch.linalg.vector_norm(torch.nan_to_num(a) - torch.nan_to_num(b), dim=1)
            if bool((apart > SAME * torch.linalg.vector_norm(torch.nan_to_num(a), dim=1)).any()):
                return False
    return True
