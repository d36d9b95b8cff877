"""What the compile tests and the static report ask of every kernel: how it would be launched on an architecture.

A kernel module describes its kernels with ``specimens(arch, dtype, dim)``; nothing is launched, and no GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        matrix_bound: whether its time goes into matrix products: such a kernel must use the tensor cores.
        bytes_per_tile: bytes that one tile moves between the GPU's memory and the chip.
        operations_per_tile: floating point operations of one tile's matrix products.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    warps: int
    stages: int
    matrix_bound: bool = False
    bytes_per_tile: int = 0
    operations_per_tile: int = 0
