"""Defects planted in kernels are found by the build that is meant to find them; without them the kernels are clean.

The programs run alone, without Python, in all three modes: specimens.cpp.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_host import build

pytestmark = pytest.mark.skipif("PROTOMEM_CUDA_HOST" in os.environ, reason="runs its own processes")

SEEDS = [0, 1, 2, 3]
EVERY_MODE = tuple(build.MODES)
RACE, WRONG = r"\d+ races\ndata race on 0x", "^wrong result"
IN_RACE = {"race": RACE}


def everywhere(pattern: str) -> dict[str, str]:
    return dict.fromkeys(EVERY_MODE, pattern)


# What each build says, where it is meant to see the defect.
OUTSIDE_MASK = everywhere(r"^__shfl_\w+: shuffle from a lane outside the mask")
DEFECTS = {
    "shuffle_sum mask_without_lane": everywhere(
        r"^__any_sync: the mask 0x7fffffff lacks lane 31, which takes part\n  kernel shuffle_sum<DEFECT>, "
        r"block \(\d, 0, 0\), thread \((31|63), 0, 0\)\n(.|\n)*specimens\.cpp:\d+"
    ),
    "shuffle_sum lane_outside_mask": OUTSIDE_MASK,
    "shuffle_sum mask_with_absent_lane": everywhere(
        r"^deadlock\n(.|\n)*waits in __shfl_xor_sync with mask 0xffffffff \(lane 31 has returned\) at "
    ),
    "shuffle_sum different_operations": everywhere(r"^deadlock\n(.|\n)*__shfl_xor_sync(.|\n)*__shfl_down_sync"),
    "block_reduction missing_barrier": IN_RACE,
    "block_reduction skipped_barrier": everywhere(
        r"^__syncthreads that not every thread reaches: thread \(200, 0, 0\) has returned(.|\n)*specimens\.cpp:\d+"
    ),
    "block_reduction different_barriers": everywhere("^threads wait at different __syncthreads"),
    "block_reduction plain_instead_of_atomic": IN_RACE,
    "block_reduction atomic_and_plain": IN_RACE,
    "block_reduction uninitialised_shared": everywhere(WRONG),
    "hash_insert missing_barrier": IN_RACE,
    "hash_insert plain_instead_of_atomic": IN_RACE,
    "segment_sum past_global": {
        "sanitized": r"heap-buffer-overflow(.|\n)*AddressSanitizer's report is of\n  kernel segm"
    },
    "segment_sum before_global": {"sanitized": "heap-buffer-overflow"},
    "segment_sum misaligned": {"sanitized": r"misaligned address 0x\w+ for type 'const struct float4'"},
    "compaction missing_barrier": IN_RACE,
    "compaction missing_syncwarp": IN_RACE,
    "compaction past_shared": {"sanitized": "heap-buffer-overflow|index 32 out of bounds"},
    "matrix_product missing_barrier": IN_RACE,
    "matrix_product missing_second_barrier": IN_RACE,
    "matrix_product missing_wait": {**everywhere(WRONG), "race": r"cp\.async that was not waited for by block"},
    "matrix_product wait_for_too_few": {**everywhere(WRONG), "race": r"cp\.async that was not waited for by block"},
    "matrix_product missing_commit": everywhere(r"^a thread returns while its cp\.async is under way"),
    "matrix_product copy_from_outside": {"sanitized": r"^cp\.async of 16 bytes from 0x\w+, out of bounds"},
    "bytes missing_barrier": IN_RACE,
    "half_warps lane_outside_mask": IN_RACE,
    "half_warps missing_syncwarp": IN_RACE,
    "write_after_reads missing_barrier": IN_RACE,
    "blocks_apart plain_instead_of_atomic": IN_RACE,
    "ticket_one missing_release_fence": IN_RACE,
    "ticket_one missing_acquire_fence": IN_RACE,
    "ticket_one fence_after_ticket": IN_RACE,
    "ticket_one every_block_is_last": {**everywhere(WRONG), **IN_RACE},
    "ticket_one other_counter": IN_RACE,
    "ticket_all missing_release_fence": IN_RACE,
    "ticket_all missing_acquire_fence": IN_RACE,
    "ticket_all fence_after_ticket": IN_RACE,
    "ticket_all missing_barrier": IN_RACE,
    "ticket_all release_of_others": IN_RACE,
    "ticket_all acquire_of_others": IN_RACE,
}


def program(mode: str) -> Path:
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return build.build("specimens.cpp", mode, program=True)


def execute(mode: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(mode), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_clean(mode: str, seed: int) -> None:
    process = execute(mode, seed)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert all(line.startswith("ok: ") for line in process.stdout.splitlines())
    assert len(process.stdout.splitlines()) == len({line.split()[0] for line in DEFECTS})


@pytest.mark.parametrize(("specimen", "mode"), [(name, mode) for name, found in DEFECTS.items() for mode in found])
def test_a_defect_is_found(specimen: str, mode: str) -> None:
    for seed in SEEDS:  # whatever the order of blocks and threads
        process = execute(mode, seed, *specimen.split())
        output = process.stdout + process.stderr
        assert process.returncode != 0
        assert re.search(DEFECTS[specimen][mode], output), f"seed {seed}: {output}"


def test_every_defect_has_its_line_here() -> None:
    listed = execute("plain").stdout.splitlines()
    assert {line for line in listed if not line.endswith(" none")} == set(DEFECTS)


def test_a_race_is_reported_with_both_sides() -> None:
    output = execute("race", 0, "bytes", "missing_barrier").stdout
    lines = (build.HERE / "specimens.cpp").read_text().splitlines()
    (write,) = (i for i, line in enumerate(lines, 1) if line.strip() == "of_thread[thread] += 1;")
    (read,) = (i for i, line in enumerate(lines, 1) if line.strip() == "y_ptr[thread] = of_thread[thread ^ 1];")
    assert re.search(
        r"kernel bytes<DEFECT>: \d+ races\ndata race on 0x\w+ \(access of 1 bytes\)\n"
        rf"  (read|write) by block \(0, 0, 0\), thread \(\d+, 0, 0\)\n    at .*/specimens\.cpp:({read}|{write})( .*)?\n"
        rf"  (read|write) by block \(0, 0, 0\), thread \(\d+, 0, 0\)\n    at .*/specimens\.cpp:({read}|{write})",
        output,
    ), output
