"""The contract suites of the operators that csrc/cuda has, on its kernels run on the CPU.

What its kernels refuse, float64 where they multiply matrices, is skipped with that reason (tests/conftest.py).
"""

from __future__ import annotations

import os
import subprocess

import pytest

from protomem_kernels.backends.operators import OPERATORS
from tests.cuda_host import build, suites

SUITES = {
    "aggregate_prototypes": "test_aggregate_prototypes.py",
    "enqueue_": "test_enqueue.py",
    "hardest_negatives": "test_hardest_negatives.py",
    "negative_logsumexp": "test_margin_softmax_loss.py",
    "margin_softmax_logits": "test_margin_softmax_logits.py",
    "negative_logsumexp_backward_": "test_versions.py",  # and all else that is written
}
LONG = "64x9001x8"  # 10^8 operations and more for a product


@pytest.mark.slow
@pytest.mark.skipif("PROTOMEM_CUDA_HOST" in os.environ, reason="the process under the sanitizers has enough to do")
def test_the_contract_holds() -> None:
    """In one process: it takes four seconds to import and collect."""
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    assert {*SUITES} <= {*OPERATORS}
    files = [f"tests/ops/{suite}" for suite in SUITES.values()]
    environment = {**os.environ, "PROTOMEM_CUDA_HOST_BACKEND": "plain", "OMP_NUM_THREADS": "1"}
    command = suites.command(files, f"cuda and not {LONG}")
    process = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert suites.with_a_pass(process.stdout) == {*files}
