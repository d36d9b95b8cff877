"""No value depends on which thread of a program, or which program of a launch, comes first.

What a launch both loads and stores has to have a barrier between (benchmarks/static/ordering.py says why). Every
compile test asks it of the kernels as shipped; here it is asked for the smallest rows too, of which many threads hold
each entry and for which reductions need no barrier of their own. In the interpreter it is seen that arguments are what
they seem: no launch is given one place under two names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from benchmarks.static.counting import any_strides, compile_for, kernel_modules, pointers
from benchmarks.static.ordering import both_ways, unordered
from protomem_kernels.backends import triton
from protomem_kernels.backends.triton.specimens import Specimen

pytest.importorskip("triton")
compiles = pytest.mark.skipif(triton.interpreted(), reason="compiles: not with TRITON_INTERPRET=1")
interprets = pytest.mark.skipif(not triton.interpreted(), reason="runs in Triton's interpreter (TRITON_INTERPRET=1)")
CHANGED = {  # in place: the clock and the memory by enqueue_, gradients as they are added up
    ("order_kernel", "clock_ptr"),
    ("write_kernel", "memory_ptr"),
    ("write_kernel", "memory_identities_ptr"),
    ("_embeddings_gradient_kernel", "partial_ptr"),
    ("_normalisation_kernel", "grad_w_ptr"),
}


def changing(dtype: torch.dtype, dim: int) -> list[tuple[Specimen, list[str]]]:
    """Return the kernels that load and store one argument, and which."""
    found = []
    for module in kernel_modules():
        for specimen in importlib.import_module(module).specimens(90, dtype, dim):
            if names := both_ways(any_strides(specimen, 90)):
                found.append((specimen, names))
    return found


@compiles
@pytest.mark.no_cover
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 3), (torch.bfloat16, 64)], ids=str)
def test_a_barrier_stands_between_all_loads_and_stores_of_one_place(dtype: torch.dtype, dim: int) -> None:
    found = changing(dtype, dim)
    changed = {(specimen.kernel.__name__, name) for specimen, names in found for name in names}
    assert changed <= CHANGED
    assert changed == CHANGED or dtype == torch.bfloat16  # whose gradients are finished in scratch memory
    for specimen, _ in found:
        for arch in (80, 90):
            assert not unordered(compile_for(specimen, arch, dim).asm["ptx"], pointers(specimen)), (specimen.name, arch)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where the tensor's bytes begin and end."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def calls() -> list[Callable[[], Any]]:
    """Return calls of every operator, forward and backward, in the forms that share memory where any do."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(40, 8, generator=g).requires_grad_()
    x = torch.nn.functional.normalize(torch.randn(12, 8, generator=g)).requires_grad_()
    targets = torch.randint(0, 40, (12,), generator=g)
    state = pmk.MemoryState.empty(40, 8)

    def enqueue(policy: str) -> None:
        for step in range(3):
            identities = torch.arange(step, step + 12)
            triton.BACKEND.kernels["enqueue_"](*state, x.detach(), identities, 0.2, policy, True)
        own = state.prototypes[:12], state.identities[:12]
        triton.BACKEND.kernels["enqueue_"](*state, *own, 0.2, policy, True)

    def backward(made: Any) -> None:
        outputs = [made] if isinstance(made, torch.Tensor) else made
        sum((out * out.detach().cos()).sum() for out in outputs if out.requires_grad).backward()

    return [
        lambda: enqueue("fifo"),
        lambda: enqueue("lru"),
        lambda: backward(pmk.aggregate_prototypes(x, targets)),
        lambda: backward(pmk.hardest_negatives(x, w, targets, k=3, normalize_prototypes=True)),
        lambda: backward(pmk.margin_softmax_logits(x, w, targets, scale=8.0, normalize_prototypes=True)),
    ]


@interprets
@pytest.mark.triton
def test_no_launch_is_given_one_place_under_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    seen: set[str] = set()
    shared: set[tuple[str, str, str]] = set()

    def looked_at(executor, *args, **kwargs):
        name = executor.fn.__name__
        seen.add(name)
        given = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        places = {key: extent(of) for key, of in given.items() if isinstance(of, torch.Tensor) and of.numel()}
        for key, (begin, end) in places.items():
            for other, (start, stop) in places.items():
                if key < other and begin < stop and start < end:
                    shared.add((name, key, other))
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", looked_at)
    with pmk.use_backend("triton"):
        for call in calls():
            call()
    assert len(seen) > 10
    assert not shared
