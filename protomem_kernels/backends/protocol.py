"""What a backend is: a name, kernels found by the names of operators, and reasons why it does not serve.

A new one derives from ``Backend``, says what is not the default, and is entered in ``choice.BACKENDS``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from protomem_kernels.backends.operators import OPERATORS, file_of
from protomem_kernels.backends.rates import Products

Kernel: TypeAlias = Callable[..., Any]


class Backend:
    """A set of kernels, one per operator, that take the operator's arguments and return its results.

    Args:
        name: what ``use_backend`` and ``explain`` call it.
        kernels: by operator, kernels that are given and need not be found.
    """

    def __init__(self, name: str, kernels: Mapping[str, Kernel] | None = None) -> None:
        self.name = name
        self._kernels: dict[str, Kernel | None] = dict(kernels or {})

    def kernel(self, operator: str) -> Kernel | None:
        """Return the kernel for an operator, or None if there is none; it is looked for once."""
        if operator not in self._kernels:
            self._kernels[operator] = self.find(operator)
        return self._kernels[operator]

    @property
    def kernels(self) -> dict[str, Kernel]:
        """The kernels for all registered operators that this backend has one for."""
        found = {operator: self.kernel(operator) for operator in OPERATORS}
        return {operator: kernel for operator, kernel in found.items() if kernel is not None}

    def add(self, operator: str, kernel: Kernel) -> None:
        """Enter a kernel from outside."""
        self._kernels[operator] = kernel

    def find(self, operator: str) -> Kernel | None:
        """Look for the kernel by the operator's name. Default: there is none."""
        return None

    def unavailable(self) -> str | None:
        """Return why no call at all can be served here, or None if some can. Default: some can."""
        return None

    def refuses(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
        """Return why these tensors cannot be served, or None if they can. Default: all can."""
        return None

    def needs_check(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether kernels have to be checked on these tensors' device before they serve. Default: no.

        What was tested on the very processors that it serves need not be; a GPU is another one on each machine.
        """
        return False

    def on_gpu(self, operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
        """Return why such tensors on a GPU of this compute capability, 90 for 9.0, could not be served, or None.

        With what is installed here, wherever the tensors are and whatever GPU there is at hand. Default: they could.
        """
        return None if self.kernel(operator) else f"has no kernel for {operator}"

    def products(self, operator: str, dtype: torch.dtype, dim: int, architecture: int) -> Products | None:
        """Return the products of matrices that a call forms on a GPU, or None if it is not known. Default: it is not.

        Args:
            operator: one that works through the whole memory.
            dtype: the narrowest of the call's tensors.
            dim: D.
            architecture: compute capability, 90 for 9.0.
        """
        return None

    def built(self) -> str | None:
        """Return how what is compiled of it was built, whether or not that can be used here. Default: None is."""
        return None

    def passed_over(self, tensors: Sequence[Tensor]) -> None:
        """Take note of a call that is left to the next backend because this one is not available. Default: nothing."""

    def reason_against(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
        """Return why this backend cannot serve the call, or None if it can."""
        reason = self.unavailable()
        if reason is None and self.kernel(operator) is None:
            reason = f"has no kernel for {operator}"
        return reason or self.refuses(operator, tensors)


class FolderBackend(Backend):
    """A backend whose kernels are functions in the modules of one folder: the folder is its table.

    Args:
        name: of the backend.
        package: of the folder; the kernel for ``enqueue_`` is its ``enqueue.enqueue_``.
    """

    def __init__(self, name: str, package: str) -> None:
        super().__init__(name)
        self.package = package

    def has_file(self, operator: str) -> bool:
        """Say whether the folder has the operator's file, without importing it."""
        return importlib.util.find_spec(f"{self.package}.{file_of(operator)}") is not None

    def load(self, operator: str) -> Kernel:
        """Import the operator's file and return the function of its name."""
        kernel: Kernel = getattr(importlib.import_module(f"{self.package}.{file_of(operator)}"), operator)
        return kernel

    def find(self, operator: str) -> Kernel | None:
        """Return the function of the operator's name, if its file is there."""
        return self.load(operator) if self.has_file(operator) else None
