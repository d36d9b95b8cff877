"""``protomem bench``: another name for ``python -m benchmarks``, the suite that comes with the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from protomem_kernels.cli.errors import CommandError, errors_in_one_line

SUITE = ("benchmarks/__main__.py", "benchmarks/quick.py")  # by these it is known
AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@errors_in_one_line
def bench(ctx: typer.Context) -> None:
    """Run the benchmark suite of the checkout in the current folder: the same as [bold]python -m benchmarks[/]."""
    if not all(Path(file).is_file() for file in SUITE):
        raise CommandError(
            f"no benchmark suite in {Path.cwd()}: it comes with the repository, not with the installed package; run "
            "protomem bench (it stands for python -m benchmarks) in a checkout, after pip install -e '.[train,bench]'"
        )
    raise typer.Exit(subprocess.run([sys.executable, "-m", "benchmarks", *ctx.args]).returncode)
