"""The product helper, and that every product goes through it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from protomem_kernels.backends import triton

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
]


def test_every_product_goes_through_one_helper() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 numbers; the helper converts them first."""
    folder = Path(triton.__file__).parent
    found = {
        (path.name, function.name)
        for path in folder.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if (isinstance(node, ast.Attribute) and node.attr in ("dot", "dot_scaled"))
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult))
    }
    assert found == {("tiles.py", "dot")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_product_helper(dtype: torch.dtype) -> None:
    import triton as upstream
    import triton.language as tl

    from protomem_kernels.backends.triton.tiles import dot

    @upstream.jit
    def multiply(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
        place = tl.arange(0, SIZE)
        offsets = place[:, None] * SIZE + place[None, :]
        c = tl.load(c_ptr + offsets)
        tl.store(c_ptr + offsets, dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), c))

    multiply.fn.__globals__.update(tl=tl, dot=dot)
    a, b = torch.randn(2, 16, 16, dtype=torch.float64).to(dtype)
    c = torch.randn(16, 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = c.double() + a.double() @ b.double()
    multiply[(1,)](a, b, c, SIZE=16)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrowing_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    import triton as upstream
    import triton.language as tl

    from protomem_kernels.backends.triton.tiles import narrow

    @upstream.jit
    def cast(x_ptr, y_ptr, SIZE: tl.constexpr):
        place = tl.arange(0, SIZE)
        tl.store(y_ptr + place, narrow(tl.load(x_ptr + place), y_ptr.dtype.element_ty))

    cast.fn.__globals__.update(tl=tl, narrow=narrow)
    ends = [0.0, -0.0, 1.0, 1 / 3, -2 / 3, 1 + 2.0**-8, 1 + 3 * 2.0**-8, float("inf"), -float("inf"), float("nan")]
    x = torch.tensor([*ends, *torch.randn(22).tolist()])
    y = torch.full((32,), 7, dtype=dtype)
    cast[(1,)](x, y, SIZE=32)
    expected = x.to(dtype)
    if dtype == torch.float16:  # the interpreter's own cast, half to even left out
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
