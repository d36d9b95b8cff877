"""Installs what lies in dist/ into empty environments, and sees that it works there: ``make install-check``.

    python -m release.environments python3.10=2.10.0 python3.13=2.14.1

Each environment is a Python and a torch, which pip installs (some builds of torch take gigabytes). Into it go the pure
wheel, the native one, and with --source the sdist, which compiles; release/smoke.py runs on each. The seconds are
pip's, beside a torch that is there already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from release.checks import files
from release.running import ROOT, say

SMOKE = ROOT / "release" / "smoke.py"


def main() -> int:
    """Check every environment; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", default=[f"{sys.executable}=2.13.0"], metavar="PYTHON=TORCH")
    parser.add_argument("--source", action="store_true", help="the sdist too")
    parser.add_argument("--folder", type=Path, help="keep the environments there, and what an earlier call installed")
    asked = parser.parse_args()
    sdist, pure, native = files(ROOT / "dist")
    packages = {"pure wheel": (pure, "pure"), "native wheel": (native, "native")}
    if asked.source:
        packages["sdist"] = (sdist, "native")
    failed = 0
    for number, environment in enumerate(asked.environments):
        python, _, torch = environment.rpartition("=")
        with tempfile.TemporaryDirectory() as temporary:
            folder = (asked.folder or Path(temporary)) / f"{number}-{Path(python).name}-torch{torch}"
            for name, (package, kind) in packages.items():
                try:
                    say(f"{name:<13} {check(folder, python, torch, package, kind)}")
                except subprocess.CalledProcessError as problem:
                    failed += 1
                    say(f"{name:<13} FAIL {environment}: {problem.stdout[-3000:]}")
    return 1 if failed else 0


def check(folder: Path, python: str, torch: str, package: Path, kind: str) -> str:
    """Install a package into the environment and run the smoke test; return what it said and how long pip took."""
    installed = folder / "bin" / "python"
    if not installed.exists():
        run(python, "-m", "venv", folder)
        run(installed, "-m", "pip", "install", "--quiet", f"torch=={torch}")
    pip = [installed, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    begin = time.monotonic()
    run(*pip, "--no-cache-dir", package, PROTOMEM_BUILD_CPU="1" if kind == "native" else "0", PROTOMEM_BUILD_CUDA="0")
    seconds = time.monotonic() - begin
    shutil.copy2(SMOKE, folder / "smoke.py")
    return f"{run(installed, '-I', folder / 'smoke.py', kind).splitlines()[-1]} (installed in {seconds:.1f} s)"


def run(*command: str | Path, **environment: str) -> str:
    """Run a program away from the checkout and its switches; return what it printed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PROTOMEM", "PYTHON"))}
    process = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return process.stdout


if __name__ == "__main__":
    sys.exit(main())
