"""What a call of somebody else's Triton kernel would compile: its arguments, specialised as Triton's launcher does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint32: "*u32",
}
CONFIG = {"num_warps": ("warps", 4), "num_stages": ("stages", 3)}  # Triton's name -> ours, and its default


class Blank(NamedTuple):
    """A tensor of which only the dtype and the number of elements are asked for."""

    dtype: torch.dtype
    elements: int = 2

    def numel(self) -> int:
        return self.elements


def launched(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``Specimen`` that say what is compiled.

    Heuristics around the function are asked for what they decide; an argument that is None or 1 is a constant.
    """
    arguments = dict(arguments)
    while hasattr(kernel, "values"):
        arguments |= {name: decide(arguments) for name, decide in kernel.values.items()}
        kernel = kernel.fn
    config = {ours: arguments.pop(theirs, default) for theirs, (ours, default) in CONFIG.items()}
    fixed = {kernel.arg_names[place] for place in kernel.constexprs}
    signature, constexprs, aligned = {}, {}, []
    for name in kernel.arg_names:
        value = arguments[name]
        if name in fixed or value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Blank):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(name)
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "aligned": tuple(aligned),
        **config,
    }
