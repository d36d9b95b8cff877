"""The operators' small problems run through a backend and no more: what the sanitizer and the profiler are put around.

``python -m protomem_kernels.gpu_check.problems BACKEND SIZE``: prints ``@ operator`` before each, SIZE being "small"
or "large".
"""

from __future__ import annotations

import sys

import torch

from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import PROBLEMS
from protomem_kernels.backends.self_check import outcome, placed
from protomem_kernels.gpu_check.device import found, stands_in, synchronize
from protomem_kernels.ops.problems import SIZES, drawn

MARK = "@ "
LARGE = [(512, 8192, 512)]  # enough to fill a GPU, little enough to make on a CPU and to replay
DTYPES = {"small": (torch.float32, torch.bfloat16), "large": (torch.bfloat16,)}


def command(backend: str, size: str) -> list[str]:
    """Return the command that runs the problems."""
    return [sys.executable, "-m", __name__, backend, size]


def main(backend: str, size: str) -> None:
    """Run every operator's problems."""
    device = torch.device(found() or "cpu")
    for operator, problems in PROBLEMS.items():
        kernel = BACKENDS[backend].kernel(operator)
        if kernel is None:
            continue
        print(MARK + operator, flush=True)
        with drawn(0, LARGE if size == "large" and not stands_in() else SIZES), torch.no_grad():
            for dtype in DTYPES[size]:
                for args in problems(dtype):
                    outcome(kernel, placed(args, device))
                    synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
