"""The wrappers that kernels are written with (csrc/cuda/base), run on the CPU against PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_host import build

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=range(3))
def kernels(mode: str, request: pytest.FixtureRequest) -> build.Kernels:
    library = build.load("wrappers.cpp", mode)
    library.seed(request.param)
    torch.manual_seed(request.param)
    return library


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_block_functions(kernels: build.Kernels, dtype: torch.dtype) -> None:
    x = torch.randint(-50, 50, (5, 128)).to(dtype)  # sums of integers are exact
    before, of_block = torch.empty_like(x), torch.empty(5, 4, dtype=dtype)
    kernels.call(f"block_functions_{str(dtype)[6:]}", x, 5, before, of_block)
    torch.testing.assert_close(before, (x.cumsum(1) - x).to(dtype), rtol=0, atol=0)
    expected = torch.stack([x.sum(1).to(dtype), x.sum(1).to(dtype), x.amax(1), x.amin(1)], 1)
    torch.testing.assert_close(of_block, expected, rtol=0, atol=0)


def test_warp_functions(kernels: build.Kernels) -> None:
    x = torch.randint(0, 1000, (32,), dtype=torch.int32)
    sums, maxima, before = (torch.empty_like(x) for _ in range(3))
    kernels.call("warp_functions_int32", x, sums, maxima, before)
    assert sums.tolist() == [sum(x[i // 8 * 8 : i // 8 * 8 + 8].tolist()) for i in range(32)]
    assert maxima.tolist() == x.cummax(0).values.tolist()
    assert before.tolist() == [-1, *x.cummax(0).values[:-1].tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_vectors_of_16_bytes(kernels: build.Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(16 * 60).to(dtype)
    y = torch.empty_like(x)
    if dtype == torch.float32:
        kernels.call("twice_float32", x, y, x.numel())
    else:
        kernels.call("twice_half", x, y, x.numel(), dtype == torch.float16)
    assert torch.equal(y, 2 * x)


def test_a_misaligned_vector_is_an_error(kernels: build.Kernels) -> None:
    x = torch.randn(128)
    with pytest.raises(
        build.KernelError, match=r"misaligned: a vector of 16 bytes(.|\n)*twice<float>(.|\n)*wrappers\.cpp"
    ):
        kernels.call("twice_float32", x[1:], torch.empty(128), 64)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("left_out", [0, 1, 5, 64])
def test_asynchronous_copies_fill_up_with_zeros(kernels: build.Kernels, size: int, left_out: int) -> None:
    x = torch.randint(1, 256, (64 * size - left_out,), dtype=torch.uint8)
    y = torch.empty(64 * size, dtype=torch.uint8)
    kernels.call("through_shared", x, y, x.numel(), size)
    assert torch.equal(y, torch.nn.functional.pad(x, (0, left_out)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_fragments_and_product(kernels: build.Kernels, dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = torch.empty(16, 8)
    kernels.call("product_half", a, b.t().contiguous() if transposed else b, d, transposed, dtype == torch.float16)
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_two_tiles_at_once(kernels: build.Kernels, dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    d = torch.empty(16, 16)
    kernels.call("wide_product_half", a, b.t().contiguous(), d, transposed, dtype == torch.float16)
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_product_in_tf32(kernels: build.Kernels) -> None:
    def rounded(x: torch.Tensor) -> torch.Tensor:  # to 10 bits of fraction, ties away from zero
        bits = x.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    a, b = torch.randn(16, 8), torch.randn(8, 8)
    d = torch.empty(16, 8)
    kernels.call("product_tf32_float32", a, b, d)
    torch.testing.assert_close(d.double(), rounded(a).double() @ rounded(b).double(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(d, a @ b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_pairs_of_halves_round_to_nearest_even(kernels: build.Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(64)
    x[:4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    y, back = torch.empty(64, dtype=dtype), torch.empty(64)
    kernels.call("pairs_half", x, y, back, dtype == torch.float16)
    assert torch.equal(y, x.to(dtype))
    assert torch.equal(back, x.to(dtype).float())
