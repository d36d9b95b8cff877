"""A callback for Lightning that logs a head's health. Lightning is imported when one is made, and not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from protomem_kernels._checks import check_int
from protomem_kernels.losses import PrototypeMemoryLoss


def health_callback(every: int = 100, *, prefix: str = "health") -> Any:
    """Return a callback that logs the health of the module's ``PrototypeMemoryLoss`` every so many batches.

    Of several heads in one module each has its name in the figures' names. With several processes every one of them
    has the callback; the figures are of the whole memory.

    Args:
        every: batches between two looks, >= 1; the batch that is looked at takes one more pass over the memory.
        prefix: of the figures' names, ``health/occupancy`` and so on.

    Returns:
        A ``Callback`` of ``lightning.pytorch``, or of ``pytorch_lightning`` where that is what is installed.

    Raises:
        ImportError: neither is installed.
        TypeError, ValueError: ``every`` is no number of batches; at the start of training, the module has no such head.
    """
    check_int("every", every, at_least=1)
    return _callback_class()(every, prefix)


def _callback_class() -> Any:
    try:
        base = import_module("lightning.pytorch").Callback
    except ImportError:
        try:
            base = import_module("pytorch_lightning").Callback
        except ImportError as error:
            raise ImportError("health_callback is for Lightning, which is not there: pip install lightning") from error

    class HealthCallback(base):  # type: ignore[misc,valid-type]
        """Has every so many batches watched, and logs what came of it."""

        def __init__(self, every: int, prefix: str) -> None:
            self.every, self.prefix = every, prefix

        def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
            if not _heads(pl_module, self.prefix):
                raise ValueError(f"the module must have a PrototypeMemoryLoss for its health, got {type(pl_module)}")

        def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
            if batch_idx % self.every == 0:
                for head in _heads(pl_module, self.prefix).values():
                    head.watch()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % self.every == 0:
                for prefix, head in _heads(pl_module, self.prefix).items():
                    pl_module.log_dict({f"{prefix}/{name}": value for name, value in head.health().figures().items()})

    return HealthCallback


def _heads(module: nn.Module, prefix: str) -> dict[str, PrototypeMemoryLoss]:
    """Return the heads in a module by the prefix of their figures: one by itself has no name in it."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, PrototypeMemoryLoss)}
    return {prefix: next(iter(found.values()))} if len(found) == 1 else {f"{prefix}/{n}": h for n, h in found.items()}
