"""The report says what was counted, the same way every time, and calls nothing measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.static import report
from benchmarks.static.counting import Count
from benchmarks.static.gpus import GPUS

OURS = Count(
    module="protomem_kernels.backends.triton.specimens.negative_logsumexp",
    name="forward",
    arch=90,
    dtype="bfloat16",
    dim=512,
    warps=8,
    stages=2,
    registers=168,
    stack=0,
    spills=0,
    shared=128 << 10,
    tensor_columns=0,
    tensor_cores={"HGMMA.64x64x16.F32.BF16": 12},
    exponentials=8,
    instructions=1000,
    wide_offsets=True,
    warnings=[],
    unordered=[],
    matrix_bound=True,
    bytes_per_tile=64 << 10,
    operations_per_tile=4 * 64 * 64 * 512,
    tiles=8 * 1563,
    least_bytes=512 * 100_512 * 2,
)
PEER = replace(OURS, module="benchmarks.static.cut_cross_entropy", spills=24, stack=48, wide_offsets=False)
COUNTS = [OURS, PEER, replace(OURS, dim=128), replace(OURS, arch=80, tensor_cores={})]


def test_the_table_holds_every_figure(tmp_path: Path) -> None:
    report.write(tmp_path, COUNTS, ["liger-kernel: not installed (pip install)"], "triton 9.9")
    text = (tmp_path / "static.md").read_text()
    assert "triton 9.9" in text
    assert "- liger-kernel: not installed (pip install)" in text
    assert "## sm_90 (H100), D = 512" in text
    rows = [line for line in text.splitlines() if "forward | bf16 | 8" in line]
    assert len(rows) == 3
    (ours,) = [row for row in rows if "ours" in row and "HGMMA" in row]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[:9] == [
        *("ours: forward", "bf16", "8", "168", "0", "128.0", "12 %"),
        *("12 HGMMA.64x64x16.F32.BF16", "64 bits"),
    ]
    assert cells[9:] == ["64", "8.4", "7.96", "106.0 us (products)", "244.6 us (memory)"]
    assert "cut-cross-entropy: forward | bf16 | 8 | 168 | **24** (48 B) |" in text
    assert "| **32 bits** |" in text
    assert "168 / 0 / 128 / 12 %" in text  # at D = 128
    assert "**Nothing here was measured**" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


def test_the_same_counts_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written.append([path.read_bytes() for path in report.write(tmp_path / name, COUNTS, [], "triton 9.9")])
    assert written[0] == written[1]
    assert written[0][1].startswith(b"\x89PNG")


def test_predicted_times() -> None:
    assert report.predicted(OURS, OURS.least_bytes) == pytest.approx(
        (4 * 512 * 100_032 * 512 / GPUS[90].half, "products")
    )
    single = replace(OURS, dtype="float32", tensor_cores={})
    assert report.predicted(single, 0)[0] == pytest.approx(4 * 512 * 100_032 * 512 / GPUS[90].float32)
    assert report.predicted(replace(single, operations_per_tile=0), 0)[1] == "exponentials"
    assert report.predicted(replace(single, operations_per_tile=0, exponentials=0), 10**9)[1] == "memory"
