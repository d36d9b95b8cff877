"""The typer application; every command lives in a file of its own name and is registered here."""

from __future__ import annotations

import typer

from protomem_kernels.cli.bench import AS_THEY_ARE, bench
from protomem_kernels.cli.env import env
from protomem_kernels.cli.gpu_check import gpu_check
from protomem_kernels.cli.train import train

app = typer.Typer(
    name="protomem",
    help="Prototype Memory for PyTorch: train embedding models on any number of identities.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.command()(train)
app.command(context_settings=AS_THEY_ARE)(bench)
app.command()(env)
app.command(context_settings=AS_THEY_ARE)(gpu_check)


@app.callback()
def protomem() -> None:
    """Prototype Memory for PyTorch: train embedding models on any number of identities."""
