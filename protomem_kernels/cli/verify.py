"""``protomem verify``: two images beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protomem_kernels.cli.errors import errors_in_one_line
from protomem_kernels.training.loop import pick_device
from protomem_kernels.training.verdict import compare


@errors_in_one_line
def verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="An image.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another image.")],
    run: Annotated[Path, typer.Option(help="The run's folder, such as runs/orl.")],
    far: Annotated[float, typer.Option(help="False accept rate to keep to, on the run's own validation set.")] = 1e-3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Say whether two images show one identity: their cosine, the threshold, the verdict."""
    verdict = compare(first, second, run, far=far, device=pick_device(device))
    point = verdict.point
    typer.echo(f"cosine     {verdict.cosine:+.4f}")
    typer.echo(
        f"threshold  {point.threshold:+.4f}  FAR {point.measured_far:.2g} and TAR {point.tar:.3f} on the run's own "
        f"validation ({verdict.impostor_pairs:,} impostor pairs)"
    )
    typer.echo(f"verdict    {'one identity' if verdict.same else 'two identities'} at FAR {point.far:g}")
    if verdict.doubt:
        typer.echo(f"beware     {verdict.doubt}")
