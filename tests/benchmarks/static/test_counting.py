"""The compile harness finds what was planted, and nothing where nothing is."""

from __future__ import annotations

import re

import pytest

from benchmarks.static import counting, gpus
from benchmarks.static.counting import Count, Job
from tests.benchmarks.static.counting import counted

pytest.importorskip("triton")
INSTRUCTION = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module", params=INSTRUCTION)
def planted(request: pytest.FixtureRequest) -> dict[str, Count]:
    counts = counted("tests.benchmarks.static.planted", (request.param, "bfloat16", 64))
    return {count.name: count for count in counts}


def test_a_kernel_that_spills_is_seen(planted: dict[str, Count]) -> None:
    assert planted["spills"].spills > 100
    assert planted["spills"].stack > 100
    assert planted["does not spill"].spills == planted["does not spill"].stack == 0


def test_tensor_cores_are_seen_where_there_is_a_product(planted: dict[str, Count]) -> None:
    for name, count in planted.items():
        assert bool(count.tensor_cores) is (name == "multiplies"), name
    count = planted["multiplies"]
    assert any(code.startswith(INSTRUCTION[count.arch]) for code in count.tensor_cores)
    assert bool(count.tensor_columns) is (count.arch == 100)
    assert (
        count.shared >= (2 if count.arch >= 90 else 1) * 64 * 64 * 2
    )  # wgmma and tcgen05 take both factors from there
    assert count.matrix_bound


def test_narrow_offsets_are_seen(planted: dict[str, Count]) -> None:
    narrow = {name for name, count in planted.items() if not count.wide_offsets}
    assert narrow == {"narrow", "narrow columns", "narrow size", "narrow tile"}


def test_what_ptxas_warns_of_is_seen(planted: dict[str, Count]) -> None:
    loud = {name: count.warnings for name, count in planted.items() if count.warnings}
    (line,) = loud.pop("spills")
    assert re.fullmatch(r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads", line)
    assert not loud


def test_of_what_ptxas_says_only_figures_are_no_warning() -> None:
    serialized = (
        "ptxas-blackwell info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    )
    figures = [
        "ptxas info    : 11 bytes gmem",
        "ptxas-blackwell info    : Compiling entry function 'stream_kernel' for 'sm_90a'",
        "ptxas info    : Function properties for stream_kernel",
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "ptxas info    : Used 211 registers, used 1 barriers",
        "ptxas-blackwell info    : Compile time = 2125.289 ms",
        "",
    ]
    assert counting.warnings("\n".join([*figures, serialized, *figures])) == [serialized]
    assert counting.warnings("\n".join(figures)) == []
    assert counting.warnings("ptxas warning : Value of threads per SM is out of range") != []


def test_a_place_loaded_and_stored_with_no_barrier_between_is_seen(planted: dict[str, Count]) -> None:
    found = {name: count.unordered for name, count in planted.items() if count.unordered}
    stored, loaded = "stored after it was loaded", "loaded after it was stored"
    assert found == {
        "stores among loads": [f"x_ptr is {stored}, with no barrier between"],
        "a way around": [f"x_ptr is {stored}, with no barrier between"],
        "loads among stores": [
            f"x_ptr is {loaded}, with no barrier between",
            f"y_ptr is {stored}, with no barrier between",
        ],
    }


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="cannot compile"):
        counting.count_job(Job("tests.benchmarks.static.planted", 80, "float32", 64))


def test_occupancy_is_what_the_limits_allow() -> None:
    few = {"registers": 32, "shared": 0}
    assert gpus.occupancy(80, **few, warps=4) == 1.0
    assert gpus.occupancy(80, **few, warps=1) == 0.5  # 32 blocks
    assert gpus.occupancy(86, **few, warps=4) == 1.0  # 12 of 16 blocks
    assert gpus.occupancy(86, **few, warps=32) == 32 / 48
    assert gpus.occupancy(90, registers=255, shared=0, warps=8) == 8 / 64
    assert gpus.occupancy(90, registers=168, shared=0, warps=4) == 12 / 64  # 5376 registers a warp, 3 in each file
    assert gpus.occupancy(90, registers=32, shared=(113 << 10), warps=4) == 8 / 64
    assert gpus.occupancy(90, registers=32, shared=(113 << 10) + 1, warps=4) == 4 / 64  # rounded up, and 1 KiB each
    assert gpus.occupancy(100, **few, warps=4, tensor_columns=256) == 8 / 64
    assert gpus.occupancy(80, registers=32, shared=164 << 10, warps=4) == 0


def test_the_slowest_of_three_sets_the_time() -> None:
    gpu = gpus.GPUS[90]
    nothing = {"operations": 0.0, "rate": gpu.half, "exponentials": 0.0, "moved": 0.0}
    assert gpus.seconds(gpu, **nothing | {"operations": 2 * gpu.half, "moved": gpu.bytes}) == (2.0, "products")
    assert gpus.seconds(gpu, **nothing | {"moved": 3 * gpu.bytes}) == (3.0, "memory")
    # At D = 128 a logit's exponential takes as long as its product.
    D, logits = 128, 1e9
    time, _ = gpus.seconds(gpu, operations=2 * D * logits, rate=gpu.half, exponentials=logits, moved=0)
    assert time == pytest.approx(logits / gpu.exponentials) == pytest.approx(2 * D * logits / gpu.half)
