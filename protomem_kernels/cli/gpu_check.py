"""``protomem gpu-check``: another name for ``python -m protomem_kernels gpu-check``, which needs nothing but torch."""

from __future__ import annotations

import typer

from protomem_kernels.gpu_check import main


def gpu_check(ctx: typer.Context) -> None:
    """Check everything that needs a GPU, within a budget of time, and write one JSON file to send back."""
    raise typer.Exit(main(ctx.args))
