"""``HeadSchedule``: options of a training head as functions of the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from protomem_kernels._checks import check_int, check_number
from protomem_kernels.distributed.ranks import hand_ranks
from protomem_kernels.head import Head
from protomem_kernels.losses import PrototypeMemoryLoss
from protomem_kernels.margins import Margin
from protomem_kernels.mining import HardestNegatives
from protomem_kernels.objective import check_objective


class HeadSchedule:
    """Options of a head as functions of the step, in the manner of a learning rate's scheduler.

    The options of step 0 are set at once; ``step()`` after each optimiser step sets the next one's. Over several ranks
    every rank does the same.

    Args:
        head: ``PrototypeMemoryLoss``, ``MarginSoftmaxLoss``, ...
        margin: step -> a margin, or a number: the parameter ``m`` of the head's margin.
        scale: step -> s.
        k: step -> how many of the hardest negatives enter the sum (``HardestNegatives``).
        refresh_ratio: step -> the memory's.
        capacity: step -> how many slots the memory uses (``PrototypeMemory.use``); a change moves all rows and waits
            for the device, so let it change now and then.

    Raises:
        TypeError, ValueError: a function that is none, an option that the head does not have, a value that it does not
            take.

    ``state_dict()`` is the step alone: the functions are code. ``load_state_dict`` sets the options of the step that it
    gets; it may be called before or after the head's own, and training goes on bit for bit. On another number of ranks
    the head comes first.

    Example:
        >>> loss_fn = PrototypeMemoryLoss(embedding_dim=2, capacity=100)
        >>> schedule = HeadSchedule(loss_fn, margin=lambda step: min(0.5, 0.1 * step), refresh_ratio=lambda step: 0.2)
        >>> schedule.step()
        >>> loss_fn.margin
        ArcFace(m=0.1, straight_through=False)
    """

    def __init__(
        self,
        head: Head,
        *,
        margin: Callable[[int], Margin | float] | None = None,
        scale: Callable[[int], float] | None = None,
        k: Callable[[int], int] | None = None,
        refresh_ratio: Callable[[int], float] | None = None,
        capacity: Callable[[int], int] | None = None,
    ) -> None:
        if not isinstance(head, Head):
            raise TypeError(f"head must be a training head of this package, got {type(head).__name__}")
        given = {"margin": margin, "scale": scale, "k": k, "refresh_ratio": refresh_ratio, "capacity": capacity}
        self._functions = {name: function for name, function in given.items() if function is not None}
        for name, function in self._functions.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function of the step, got {type(function).__name__}")
            if name in ("refresh_ratio", "capacity") and not isinstance(head, PrototypeMemoryLoss):
                raise ValueError(f"{name} must be left out for {type(head).__name__}, which has no memory")
        self.head = head
        self._set(0)

    def step(self) -> None:
        """Set the options of the next step."""
        self._set(self.last_step + 1)

    def state_dict(self) -> dict[str, int]:
        """Return the step."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from what ``state_dict`` returned."""
        check_int("last_step", state_dict["last_step"], at_least=0)
        self._set(state_dict["last_step"])

    def _set(self, step: int) -> None:
        for name, function in self._functions.items():
            getattr(self, f"_set_{name}")(function(step))
        self.last_step = step

    def _set_margin(self, value: Any) -> None:
        margin = self.head.margin
        if callable(value):
            check_objective(value, self.head.scale, self.head.mining)
            hand_ranks(self.head.ranks, value)
            del self.head.margin  # a module's place takes modules alone
            self.head.margin = value
        elif not hasattr(margin, "m"):
            raise ValueError(f"margin must give a margin, not a number, for {type(margin).__name__}, which has no m")
        elif dataclasses.is_dataclass(margin) and not isinstance(margin, type):
            self.head.margin = dataclasses.replace(margin, m=float(value))
        else:
            check_number("m", value, low=0)
            margin.m = float(value)

    def _set_scale(self, value: float) -> None:
        check_number("scale", value, low=0, open_low=True)
        self.head.scale = float(value)

    def _set_k(self, value: int) -> None:
        if self.head.mining is not None and not isinstance(self.head.mining, HardestNegatives):
            raise ValueError(f"k must be left out for {type(self.head.mining).__name__}, the head's mining rule")
        self.head.mining = HardestNegatives(value)

    def _set_refresh_ratio(self, value: float) -> None:
        check_number("refresh_ratio", value, low=0, high=1)
        assert isinstance(self.head, PrototypeMemoryLoss)
        self.head.memory.refresh_ratio = float(value)

    def _set_capacity(self, value: int) -> None:
        assert isinstance(self.head, PrototypeMemoryLoss)
        self.head.memory.use(value)
