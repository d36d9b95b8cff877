"""Part 5, first half: ``compute-sanitizer`` around the small problems, for wrong addresses and races."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from protomem_kernels.gpu_check import problems
from protomem_kernels.gpu_check.device import backends
from protomem_kernels.gpu_check.processes import Task, started
from protomem_kernels.gpu_check.records import Record

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
# The first line of a finding, as compute-sanitizer indents it: "========= Invalid __global__ write of size 4 bytes".
_FINDING = re.compile(r"^=+ (Error|Warning|Invalid|Race|Potential|Program hit|Leaked|Uninitialized|Out-of-range)")
_SUMMARY = re.compile(r"^=+ (ERROR SUMMARY|RACECHECK SUMMARY)")
LONGEST = 40  # lines kept of what was found


def program(name: str) -> str | None:
    """Return where a program of the CUDA toolkit is, or None."""
    folders = [os.path.join(os.environ[home], "bin") for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([*folders, *PLACES]))


def absent(checkout: Path) -> str | None:
    """Return why this part is left out, or None."""
    return "compute-sanitizer is not here: no memcheck, no racecheck" if program("compute-sanitizer") is None else None


def tasks(checkout: Path) -> list[Task]:
    """Return a task per tool and backend that has kernels of its own."""
    own = [name for name in backends() if name != "reference"]
    return [Task("sanitizer", f"{tool} {backend}", silence=150) for tool in TOOLS for backend in own]


def run(record: Record, name: str, first: int, checkout: Path) -> None:
    """Run the problems under a tool, and write what it says of each operator."""
    tool, backend = name.split()
    # One allocation each, so that an address past a tensor's end is past what may be touched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # What PyTorch's calls of CUDA return, it handles itself.
    options = ["--tool", tool, *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    command = [program("compute-sanitizer") or "", *options, *problems.command(backend, "small")]
    operator, findings, printed, ended = "", 0, list[str](), False

    def tell() -> None:
        if operator:
            said = f"{findings} findings" if findings else "nothing found"
            record.write(f"{name} {operator}", findings == 0, said, printed=printed[:LONGEST])

    with started(command, environment) as lines:
        for line in lines:
            if line.startswith(problems.MARK):
                tell()
                operator, findings, printed = line.removeprefix(problems.MARK).strip(), 0, []
                record.begin(f"{name} {operator}")
                continue
            findings += bool(_FINDING.match(line))
            ended = ended or bool(_SUMMARY.match(line))
            printed.append(line.rstrip())
    if not ended:  # what it printed last says why
        return record.write(name, None, f"did not end well at {operator or 'the start'}", printed=printed[-LONGEST:])
    tell()
