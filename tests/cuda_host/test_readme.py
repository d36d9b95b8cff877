"""The example in csrc/cuda_host/README.md, as it stands there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_host import build


def test_the_example_runs_in_all_three_builds(tmp_path: Path) -> None:
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    page = (build.RUNTIME_SOURCES / "README.md").read_text()
    (source,) = re.findall(r"```cpp\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "row_sums.cpp").write_text(source)
    (tmp_path / "csrc").symlink_to(build.ROOT / "csrc")
    printed = ""
    for commands in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL):
        printed += subprocess.run(
            ["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
    assert printed == "64 64 64\n" * 3
