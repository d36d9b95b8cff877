"""The typer application; every command lives in a file of its own name and is registered here."""

from __future__ import annotations

from typing import Annotated

import typer

from protomem_kernels import __version__
from protomem_kernels.cli.bench import AS_THEY_ARE, bench
from protomem_kernels.cli.compare import compare_
from protomem_kernels.cli.embed import embed
from protomem_kernels.cli.env import env
from protomem_kernels.cli.export import export
from protomem_kernels.cli.gpu_check import gpu_check
from protomem_kernels.cli.train import train
from protomem_kernels.cli.verify import verify

app = typer.Typer(
    name="protomem",
    help="Prototype Memory for PyTorch: train embedding models on any number of identities.",
    epilog="[bold]Example:[/] protomem train --data photos --name mine",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.command(epilog="[bold]Example:[/] protomem train --data photos --margin magface:u-m=0.7 --steps 2000")(train)
app.command(epilog="[bold]Example:[/] protomem verify ann.jpg bob.jpg --run runs/mine --far 1e-2")(verify)
app.command(epilog="[bold]Example:[/] protomem embed photos --run runs/mine --out photos.npy")(embed)
app.command(epilog="[bold]Example:[/] protomem export --run runs/mine --format onnx")(export)
app.command("compare", epilog="[bold]Example:[/] protomem compare refresh --jobs 2")(compare_)
app.command(context_settings=AS_THEY_ARE)(bench)
app.command(context_settings=AS_THEY_ARE)(gpu_check)


@app.command("env", epilog="[bold]Example:[/] protomem env --json > env.json")
def _env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    env(as_json=as_json)  # which itself knows no typer


_env.__doc__ = env.__doc__


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"protomem_kernels {__version__}")
        raise typer.Exit


@app.callback()
def protomem(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Prototype Memory for PyTorch: train embedding models on any number of identities."""
