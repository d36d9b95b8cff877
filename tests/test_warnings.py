"""A warning points at the line of whoever called the package, however deep inside it or PyTorch it comes from."""

from __future__ import annotations

from collections.abc import Callable
from inspect import currentframe
from pathlib import Path
from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels._warnings import warn_caller
from protomem_kernels.backends import reference
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.protocol import Backend

OURS, THEIRS = (str(Path(package.__file__).parent / "somewhere" / "inside.py") for package in (pmk, torch))
CALL = "def call(*args):\n    return function(*args)"
KERNEL = "def call(*args):\n    warn_caller('it rains')\n    return function(*args)"


def inside(file: str, function: Callable[..., Any], code: str = CALL) -> Callable[..., Any]:
    """Return a function that calls another one, and that stands in this file."""
    scope: dict[str, Any] = {"function": function, "warn_caller": warn_caller}
    exec(compile(code, file, "exec"), scope)
    return scope["call"]


def line() -> int:
    """Return the number of the line that asks."""
    return currentframe().f_back.f_lineno


@pytest.mark.parametrize("files", [[], [OURS], [OURS, THEIRS], [OURS, THEIRS, OURS]], ids=len)
def test_lines_of_the_package_and_of_torch_are_passed_over(files: list[str]) -> None:
    warn: Callable[[str], None] = warn_caller
    for file in files:
        warn = inside(file, warn)
    with pytest.warns(UserWarning, match="it rains") as caught:
        here = [warn("it rains"), line()][1]
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, here)]


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize(
    "operator",
    [pmk.aggregate_prototypes, lambda *args: torch.ops.protomem.aggregate_prototypes(*args, None, True, None)],
)
def test_from_a_kernel_it_is_the_line_that_calls_the_operator(
    operator: Callable[..., Any], differentiated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = dict(reference.BACKEND.kernels)
    kernels["aggregate_prototypes"] = inside(OURS, kernels["aggregate_prototypes"], KERNEL)
    monkeypatch.setitem(BACKENDS, "reference", Backend("reference", kernels))
    embeddings, labels = torch.eye(3, requires_grad=differentiated), torch.arange(3)
    with pmk.use_backend("reference"), pytest.warns(UserWarning, match="it rains") as caught:
        operator(embeddings, labels)
    assert [warning.filename for warning in caught] == [__file__]
