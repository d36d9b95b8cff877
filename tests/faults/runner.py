"""One fault in a copy of the package, and its tests on it in a process of their own."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.warm_processes import warm_processes

ROOT = Path(__file__).resolve().parents[2]
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)  # the interpreter writes wherever a faulty Triton kernel points
IGNORE = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", "_C*")
# What the tests import on their way: each costs half a second, once instead of for every fault and each of its ranks.
PRELOADED = (
    "torch.testing",
    "torch.fx.experimental.symbolic_shapes",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "numpy",
    "pytest",
    "hypothesis.strategies",
)
ENVIRONMENT = (
    ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),  # nothing is measured, and no fixture of a plugin is used
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("PROTOMEM_MUTANT", "1"),
    ("PROTOMEM_DISABLE_COMPILED", "1"),  # the faults are in Python: the reference has to serve
)
BASE = 100  # of exit codes, as Python itself ends with 1 when something raises

# Whoever starts a process also looks whether others have ended. Two threads that ask at once read the same pipe, and
# the second one takes its end for the exit code 255.
_reading_exit_codes = threading.Lock()


def _run(fault: Fault, folder: Path) -> None:
    """In a process of its own: run the fault's tests on the copy in ``folder``, and exit with BASE + pytest's code."""
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    gc.freeze()  # what was imported before is no garbage to look through
    os.chdir(folder)
    os.environ["TRITON_INTERPRET"] = "1" if fault.in_triton else "0"  # before anything imports triton
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "protomem_kernels")]:
        del sys.modules[name]  # those of the checkout
    # Hypothesis has been imported before pytest could rewrite its assertions.
    known = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *known]
    code = pytest.main([*options, *(["-m", "triton"] if fault.in_triton else []), fault.tests])
    sys.exit(BASE + int(code))


def verdict_on(fault: Fault) -> str:
    """Return "killed", or what went wrong: the suite passed, or the fault no longer fits the code."""
    source = (ROOT / "protomem_kernels" / fault.file).read_text()
    if source.count(fault.before) != 1:
        return f"STALE: {fault.before!r} stands {source.count(fault.before)} times in {fault.file}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "protomem_kernels", folder / "protomem_kernels", ignore=IGNORE)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=IGNORE)
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "protomem_kernels" / fault.file).write_text(source.replace(fault.before, fault.after))
        with _reading_exit_codes:
            process = warm_processes(*PRELOADED, environment=ENVIRONMENT).Process(target=_run, args=(fault, folder))
            process.start()
        wait([process.sentinel])
        with _reading_exit_codes:
            process.join()
        output = (folder / "output").read_text(errors="replace")
    if process.exitcode in (BASE + pytest.ExitCode.TESTS_FAILED, *CRASHES):
        return "killed"
    return "SURVIVED" if process.exitcode == BASE else f"ended with {process.exitcode}: {output[-300:]}"
