"""Test files in a process of their own, where the kernels are built or started otherwise than in this one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable


def command(files: Iterable[str], selected: str) -> list[str]:
    """Return how to run the tests of these files, from the root of the checkout, whose names hold ``selected``."""
    alone = ["-p", "no:cacheprovider", "-p", "no:xdist", "--no-cov"]
    return [sys.executable, "-m", "pytest", "-v", "-k", selected, *alone, *files]


def with_a_pass(output: str) -> set[str]:
    """Return the files of which a test passed, by what pytest has said."""
    return set(re.findall(r"^(\S+\.py)::.* PASSED", output, re.MULTILINE))
