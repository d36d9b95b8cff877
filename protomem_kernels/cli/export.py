"""``protomem export``: the trained encoder for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protomem_kernels.cli.errors import errors_in_one_line
from protomem_kernels.training.export import FORMATS
from protomem_kernels.training.export import export as write


@errors_in_one_line
def export(
    run: Annotated[Path, typer.Option(help="The run's folder, such as runs/orl.")],
    form: Annotated[str, typer.Option("--format", metavar="NAME", help=f"One of {', '.join(FORMATS)}.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="File to write. Default: encoder.* in the run's folder.")] = None,
    views: Annotated[
        bool,
        typer.Option(
            "--views/--one-view",
            help="The mean over the ten views that the run verified, or one view at a tenth of the cost, for which the "
            "run has no thresholds.",
        ),
    ] = True,
) -> None:
    """Write a run's encoder for other programs, and beside it a JSON file that says how to use it.

    What was written is read back by its own runtime and compared with the run's encoder first. Batches may have any
    size.
    """
    file, beside, difference = write(run, form, out, all_views=views)
    typer.echo(f"{file}: read back and compared, off by {difference:.1g} at most")
    typer.echo(f"{beside}: what it takes and returns, preprocessing, thresholds")
