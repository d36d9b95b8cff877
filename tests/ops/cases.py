"""What the contract suites run over: backends, dtypes and ragged shapes; and the tolerance that truth sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from protomem_kernels.backends import triton
from protomem_kernels.backends.choice import BACKENDS, use_backend

# The CUDA kernels can be built so that they run on the CPU, in one of the modes of tests/cuda_host.
if "PROTOMEM_CUDA_HOST_BACKEND" in os.environ:
    from tests.backends.cuda import operators

    operators.install(os.environ["PROTOMEM_CUDA_HOST_BACKEND"])

# The backends that serve CPU tensors here: Triton does in its interpreter alone (TRITON_INTERPRET=1), GPU or not.
AVAILABLE = [
    name
    for name, backend in BACKENDS.items()
    if backend.unavailable() is None and backend.refuses("", [torch.zeros(1)]) is None
]

# Where there is a GPU the contract suites run on it too, once per backend that serves its tensors. Elsewhere the CPU
# can stand in for it (PROTOMEM_GPU_STAND_IN=cpu): that runs all of the suite but what CUDA alone can do.
STAND_IN = os.environ.get("PROTOMEM_GPU_STAND_IN")
GPU = "cuda" if torch.cuda.is_available() and not triton.interpreted() else STAND_IN
ON_GPU = [name for name in BACKENDS if GPU and name != "cpu" and BACKENDS[name].unavailable() is None]


IN_TRITON = ("triton", "chunked")  # backends whose kernels, or some of them, are Triton's


def interpreted(backend: str) -> bool:
    """Say whether the backend is interpreted here, so that a test had better be small."""
    return backend in IN_TRITON and triton.interpreted()


def marks_of(backend: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test on that backend: ``-m triton`` selects what the interpreter has to run."""
    return [pytest.mark.triton] if backend in IN_TRITON else []


# What a test is called -> (backend, marks). With the mark "gpu", tensors are made on the GPU (tests/conftest.py).
PLACES: dict[str, tuple[str, list[pytest.MarkDecorator]]] = {
    **{name: (name, marks_of(name)) for name in AVAILABLE},
    **{f"{name}_on_gpu": (name, [pytest.mark.gpu]) for name in ON_GPU},
}


def over(places: dict[str, tuple[str, list[pytest.MarkDecorator]]]) -> pytest.MarkDecorator:
    """Run a test on each of these."""
    params = [pytest.param(backend, marks=marks, id=name) for name, (backend, marks) in places.items()]
    return pytest.mark.parametrize("backend", params)


each_backend = over(PLACES)
# For an operator on a batch alone, for which "chunked" has the kernels of "triton".
PLACES_OF_BATCHES = {name: place for name, place in PLACES.items() if place[0] != "chunked"}
each_backend_of_batches = over(PLACES_OF_BATCHES)
# For the operators that fuse what samples need, of which the compiled objects have none.
each_fusing_backend = over({name: place for name, place in PLACES.items() if place[0] in ("reference", "triton")})
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# (B, M, D): one sample, one slot, nothing, sizes that are no multiple of a tile, and more than one tile of memory.
SHAPES = [(1, 1, 1), (0, 5, 3), (3, 0, 4), (7, 1, 5), (5, 130, 33), (33, 257, 17), (64, 9001, 8)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


class MakingTensorsOn(TorchFunctionMode):
    """Has every tensor that is made without a device made on this one, from the values that the CPU would give it."""

    MAKERS = frozenset(
        {torch.tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange, torch.linspace}
        | {torch.rand, torch.randn, torch.randint, torch.randperm}
    )

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.MAKERS or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        leaf = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(leaf)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def strided(x: Tensor) -> Tensor:
    """Return the same values in a tensor that is contiguous in neither dimension."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan") if x.is_floating_point() else -7)
    wide[..., ::2] = x
    return wide[..., ::2]


def far_apart(x: Tensor) -> Tensor:
    """Return the same rows (M, D) so far apart in memory that the last begins past element 2**31.

    What lies between is never touched, so the system never has to provide it. Offsets of 32 bits miss the last row.
    """
    step = 2**31 // (x.shape[0] - 1) + x.shape[1]
    wide = x.new_empty(step * (x.shape[0] - 1) + x.shape[1])
    return wide.as_strided(x.shape, (step, 1)).copy_(x)


def assert_as_close_as(ours: Tensor, peer: Tensor, truth: Tensor, tiny: float = 1e-6) -> None:
    """Hold the error of ``ours`` against float64 ``truth`` to twice that of ``peer``: PyTorch in the same dtype."""
    assert ours.shape == truth.shape
    same = ours.double() == truth  # infinities
    error = torch.where(same, 0, (ours.double() - truth).abs()).max() if truth.numel() else torch.zeros(())
    allowed = torch.where(peer.double() == truth, 0, (peer.double() - truth).abs()).max() if truth.numel() else 0.0
    scale = torch.where(torch.isfinite(truth), truth.abs(), 0).max().item() if truth.numel() else 0.0
    assert float(error) <= 2 * float(allowed) + tiny * (1 + scale), f"error {float(error)}, peer {float(allowed)}"


def assert_gradients_hold(backend: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Hold the gradients on a backend to differences of the values, entry by entry.

    In an interpreter that takes long: there it is done along random directions, and entry by entry the gradients are
    held to those of the reference.
    """

    def gradients(name: str) -> list[Tensor]:
        with use_backend(name):
            made = function(*inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]
        return [*torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)]

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=interpreted(backend))
    if interpreted(backend):
        torch.testing.assert_close(gradients(backend), gradients("reference"))
