"""``protomem embed``: the embeddings of a folder of images in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from protomem_kernels.cli.errors import errors_in_one_line
from protomem_kernels.training.embedded import check_embeddings_path, embed_folder, write_embeddings
from protomem_kernels.training.loop import pick_device

SHOWN = 3  # of what cannot be read


@errors_in_one_line
def embed(
    folder: Annotated[Path, typer.Argument(help="Images, in whatever folders below it.")],
    run: Annotated[Path, typer.Option(help="The run's folder, such as runs/orl.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, .parquet or .npy. Default: the folder's name, .parquet.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    workers: Annotated[int, typer.Option(min=0, max=256, help="Processes that read images.")] = 0,
) -> None:
    """Write the embedding of every image of a folder, beside the file's name.

    The embeddings have length 1: a dot product is a cosine.
    """
    out = Path(f"{folder.resolve().name}.parquet") if out is None else out
    check_embeddings_path(out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("embedding", total=None)
        embedded = embed_folder(
            folder,
            run,
            device=pick_device(device),
            workers=workers,
            watch=lambda done, total: bar.update(task, completed=done, total=total),
        )
    files = write_embeddings(out, embedded, run)
    count, size = embedded.rows.shape
    typer.echo(f"{' and '.join(map(str, files))}: {count} images, embeddings of {size} numbers")
    if embedded.unreadable:
        typer.echo(f"left out, images that cannot be read: {len(embedded.unreadable)}")
        for line in embedded.unreadable[:SHOWN]:
            typer.echo(f"  {line}")
