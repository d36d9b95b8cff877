"""What the compile tests and the static report ask of every kernel: how it would be launched on an architecture.

A module of this folder describes the kernels of the operator, or the shared ones of the file, of its name with
``specimens(arch, dtype, dim)``; nothing is launched, and no GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CENTRE = (512, 100_000)  # samples and slots of the problem that the static report predicts times for


@dataclass(frozen=True)
class Specimen:
    """One kernel as shipped for one architecture, dtype and embedding size.

    Attributes:
        name: the kernel's name, with the variant where there are several.
        kernel: the ``triton.jit`` function.
        signature: the type of every argument as Triton spells it (``"*fp32"``, ``"i64"``, ``"constexpr"``).
        constexprs: the values of the compile-time arguments.
        warps: warps per block.
        stages: pipeline stages.
        aligned: the arguments that are multiples of 16 when inputs are (pointers, the row strides of even matrices).
        matrix_bound: whether its time goes into matrix products: such a kernel must use the tensor cores.
        bytes_per_tile: bytes that one tile moves between the GPU's memory and the chip.
        operations_per_tile: floating point operations of one tile's matrix products.
        tiles: how many tiles ``CENTRE`` takes: 0 where the kernel does not belong to that problem.
        least_bytes: bytes of what that problem reads and writes, each counted once.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()
    matrix_bound: bool = False
    bytes_per_tile: int = 0
    operations_per_tile: int = 0
    tiles: int = 0
    least_bytes: int = 0


def arguments(kernel: Any, types: dict[str, str], fixed: dict[str, Any]) -> dict[str, Any]:
    """Return ``kernel``, ``signature`` and ``constexprs`` of a specimen.

    Args:
        kernel: the ``triton.jit`` function.
        types: types of arguments, also of those that this kernel does not have.
        fixed: values of compile-time arguments, likewise. They go before ``types``, and a stride in neither is 1.
    """
    strides = dict.fromkeys((name for name in kernel.arg_names if name.startswith("stride") and name not in types), 1)
    given = strides | fixed
    return {
        "kernel": kernel,
        "signature": {name: types[name] for name in kernel.arg_names if name not in given},
        "constexprs": {name: given[name] for name in kernel.arg_names if name in given},
    }
