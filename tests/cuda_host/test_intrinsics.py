"""CUDA's own functions as cuda_host.h defines them, against what the CUDA programming guide says of them."""

from __future__ import annotations

import functools
import operator

import pytest
import torch

from tests.cuda_host import build


@pytest.fixture(params=range(3))
def kernels(mode: str, request: pytest.FixtureRequest) -> build.Kernels:
    library = build.load("intrinsics.cpp", mode)
    library.seed(request.param)
    torch.manual_seed(request.param)
    return library


def signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("argument", [0, 1, 5])
@pytest.mark.parametrize("alike", [False, True])
def test_warp_operations(kernels: build.Kernels, width: int, argument: int, alike: bool) -> None:
    x = torch.full((32,), 7, dtype=torch.int32) if alike else torch.randint(-8, 8, (32,), dtype=torch.int32)
    y = torch.empty(16, 32, dtype=torch.int32)
    kernels.call("warp_operations_int32", x, argument, width, y)
    v = x.tolist()

    def within(lane: int, source: int) -> int:  # a lane of the same group, or the lane itself
        return v[source] if source // width == lane // width else v[lane]

    ballot = signed(sum(1 << i for i in range(32) if v[i] > argument))
    equal = len(set(v)) == 1
    expected = [
        [v[lane // width * width + argument % width] for lane in range(32)],
        [within(lane, lane - argument) for lane in range(32)],
        [within(lane, lane + argument) for lane in range(32)],
        [within(lane, lane ^ argument) for lane in range(32)],
        [ballot] * 32,
        [int(max(v) > argument)] * 32,
        [int(min(v) > argument)] * 32,
        [signed(sum(1 << i for i in range(32) if v[i] == v[lane])) for lane in range(32)],
        [-1 if equal else 0] * 32,
        [int(equal)] * 32,
        [sum(v)] * 32,
        [min(v)] * 32,
        [max(v)] * 32,
        [functools.reduce(operator.and_, v)] * 32,
        [functools.reduce(operator.or_, v)] * 32,
        [functools.reduce(operator.xor, v)] * 32,
    ]
    assert y.tolist() == expected


def test_groups_of_lanes_on_paths_of_their_own(kernels: build.Kernels) -> None:
    x = torch.randint(0, 40, (64,), dtype=torch.int32)
    y = torch.empty_like(x)
    kernels.call("divergent_groups_int32", x, y)
    warps = [x[:32].tolist(), x[32:].tolist()]
    assert y.tolist() == [sum(w for w in warp if w // 10 == v // 10) for warp in warps for v in warp]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_atomics(kernels: build.Kernels, dtype: torch.dtype) -> None:
    x = torch.randint(1, 1000, (5 * 96,), dtype=dtype)
    start = [0, 500, 500, 0, 1023, 0, 0, 0, 0, 0]
    y = torch.tensor(start, dtype=dtype)
    kernels.call(f"atomics_{str(dtype)[6:]}", x, y)
    v = x.tolist()
    total, result = sum(v), y.tolist()
    expected = [total, min(v), max(v), -total]
    expected += [functools.reduce(op, v, s) for op, s in ((operator.and_, 1023), (operator.or_, 0), (operator.xor, 0))]
    assert result[:7] == expected
    assert result[7] + result[8] == total
    assert result[8] in v
    assert result[9] == total


def test_float_atomics(kernels: build.Kernels) -> None:
    x = torch.randint(-50, 50, (5 * 96,)).float()
    y = torch.zeros(3)
    kernels.call("atomics_float32", x, y)
    assert y.tolist() == [x.sum().item(), x.min().item(), x.max().item()]


@pytest.mark.parametrize("positive", [0, 1, 77, 128])
def test_barriers_with_a_vote(kernels: build.Kernels, positive: int) -> None:
    x = (torch.randperm(128) < positive).to(torch.int32)
    y = torch.empty(3, 128, dtype=torch.int32)
    kernels.call("barrier_votes_int32", x, y)
    assert y.tolist() == [[positive] * 128, [int(positive > 0)] * 128, [int(positive == 128)] * 128]


@pytest.mark.parametrize(("grid", "block"), [((3, 1, 1), (50, 1, 1)), ((2, 3, 4), (3, 5, 2)), ((1, 1, 1), (4, 8, 32))])
def test_every_thread_of_every_block_runs_once(
    kernels: build.Kernels, grid: tuple[int, ...], block: tuple[int, ...]
) -> None:
    y = torch.zeros(*grid, *block, dtype=torch.int32)
    kernels.call("indices_int32", torch.tensor(grid, dtype=torch.int32), torch.tensor(block, dtype=torch.int32), y)
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((1, 1, 1), (1025, 1, 1), "a block has 1 to 1024 threads"),
        ((1, 1, 1), (1, 1, 65), "a block has 1 to 1024 threads"),
        ((1, 1, 1), (0, 1, 1), "a block has 1 to 1024 threads"),
        ((1, 65536, 1), (1, 1, 1), "a grid has at most"),
    ],
)
def test_limits_of_a_launch(
    kernels: build.Kernels, grid: tuple[int, ...], block: tuple[int, ...], message: str
) -> None:
    with pytest.raises(build.KernelError, match=message):
        kernels.call(
            "indices_int32", torch.tensor(grid, dtype=torch.int32), torch.tensor(block, dtype=torch.int32), None
        )


def test_a_grid_of_nothing_runs_nothing(kernels: build.Kernels) -> None:
    kernels.call("fresh_shared_int32", 0, None)


def arrivals(kernels: build.Kernels, seed: int) -> tuple[list[int], list[int]]:
    counter, blocks, threads = (torch.zeros(n, dtype=torch.int32) for n in (1, 12, 32))
    kernels.seed(seed)
    kernels.call("arrivals_int32", 12, counter, blocks, threads)
    return blocks.tolist(), threads.tolist()


def test_a_seed_shuffles_blocks_and_threads(mode: str) -> None:
    kernels = build.load("intrinsics.cpp", mode)
    assert arrivals(kernels, 0) == (list(range(12)), list(range(32)))
    orders = [arrivals(kernels, seed) for seed in (1, 2, 3)]
    assert orders[0] == arrivals(kernels, 1)  # the same seed, the same order
    for which, count in ((0, 12), (1, 32)):
        assert all(sorted(order[which]) == list(range(count)) for order in orders)
        assert len({tuple(order[which]) for order in orders} | {tuple(range(count))}) == 4


def test_shared_memory_is_fresh_in_every_block(kernels: build.Kernels) -> None:
    y = torch.zeros(4, 32, dtype=torch.int32)
    kernels.call("fresh_shared_int32", 4, y)
    assert torch.equal(y, torch.full_like(y, -1))


def test_shared_memory_has_an_end(kernels: build.Kernels) -> None:
    y = torch.empty(1, dtype=torch.uint8)
    kernels.call("much_shared", 226 * 1024, y)
    with pytest.raises(
        build.KernelError, match=r"232449 bytes of shared memory, the most is 232448\n  kernel much_shared"
    ):
        kernels.call("much_shared", 226 * 1024 + 1, y)


def test_a_launch_that_failed_leaves_nothing_behind(kernels: build.Kernels) -> None:
    y = torch.zeros(32, dtype=torch.int32)
    for _ in range(3):
        with pytest.raises(build.KernelError, match="thread \\(7, 0, 0\\) has returned"):
            kernels.call("may_fail_int32", 1, y)
        assert torch.equal(y, torch.zeros_like(y))
    kernels.call("may_fail_int32", 0, y)
    assert torch.equal(y, torch.full_like(y, 11))


def test_bits(mode: str) -> None:
    kernels = build.load("intrinsics.cpp", mode)
    values = [0, 1, 2, 3, 0x80000000, 0xFFFFFFFF, 0x00F0_1234, 0x7FFF_FFFF]
    y = torch.empty(len(values), 10, dtype=torch.int32)
    kernels.call("bits_int32", torch.tensor([signed(v) for v in values], dtype=torch.int32), len(values), y)
    for v, row in zip(values, y.tolist(), strict=True):
        lowest = (v & -v).bit_length()
        pair = v << 32 | (~v & 0xFFFFFFFF)
        expected = [
            v.bit_count(),
            lowest,
            32 - v.bit_length(),
            signed(int(f"{v:032b}"[::-1], 2)),
            signed((pair << 5 >> 32) % 2**32),
            signed((pair >> 5) % 2**32),
            2 * v.bit_count(),
            lowest + 20 if v else 0,
            64 - (v << 20).bit_length(),
            signed(v * v >> 32),
        ]
        assert row == expected, hex(v)
