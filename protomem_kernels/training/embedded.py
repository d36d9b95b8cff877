"""The embeddings of a folder of images, and the file that they are written to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protomem_kernels.data.decoding import image_suffixes
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.extras import needed
from protomem_kernels.training.files import written_whole
from protomem_kernels.training.preprocessing import Transform
from protomem_kernels.training.trained import load_encoder

BATCH = 64  # images; the encoder sees ten views of each at once
PARQUET, NUMPY = ".parquet", ".npy"


class Embedded(NamedTuple):
    """The embeddings of the images of a folder.

    Attributes:
        names: of the images' files within the folder, N of them, with "/" between folders.
        rows: (N, D) float32, of length 1, so that a dot product is a cosine.
        unreadable: an error's line for each file that was left out.
    """

    names: list[str]
    rows: Tensor
    unreadable: list[str]


def embed_folder(
    folder: Path,
    run: Path,
    *,
    device: str | torch.device = "cpu",
    workers: int = 0,
    watch: Callable[[int, int], object] = lambda done, total: None,
) -> Embedded:
    """Embed all images of a folder and of the folders in it, as the run verified its own.

    Args:
        folder: the images, however they are sorted into folders.
        run: the folder of the run.
        device: where to compute.
        workers: processes that read images; 0: this one.
        watch: is told how many of how many files are done.

    Raises:
        RunError: the run's encoder cannot be used; there is no image that can be read.

    """
    encoder, transform = load_encoder(run, device)
    embedder = VerifiedEncoder(encoder).eval()
    files = _images_in(folder)
    if not files:
        raise RunError(f"{folder}: expected images in the folder, got none ({' '.join(sorted(image_suffixes()))})")
    names, rows, unreadable = [], [], []
    loader = DataLoader(_Pixels(files, transform), batch_size=BATCH, num_workers=workers, collate_fn=list)
    places = iter(files)
    for batch in loader:
        read = [(next(places), pixels) for pixels in batch]
        images = [pixels for _, pixels in read if isinstance(pixels, Tensor)]
        names += [_name(path, folder) for path, pixels in read if isinstance(pixels, Tensor)]
        unreadable += [pixels for _, pixels in read if isinstance(pixels, str)]
        if images:
            with torch.inference_mode():
                rows.append(embedder(torch.stack(images).to(device)).cpu())
        watch(len(names) + len(unreadable), len(files))
    if not rows:
        raise RunError(f"{folder}: none of {len(files)} images can be read, the first: {unreadable[0]}")
    return Embedded(names, torch.cat(rows), unreadable)


def write_embeddings(out: Path, embedded: Embedded, run: Path) -> list[Path]:
    """Write the embeddings; return the files that hold them.

    ``.parquet``: a column ``file`` of strings and a column ``embedding`` of lists of D float32. ``.npy``: the (N, D)
    array, and beside it ``<out>.json``, the list of N names.

    Raises:
        RunError: another suffix, pyarrow is not installed, or it cannot be written.
    """
    check_embeddings_path(out)
    if out.suffix == PARQUET:
        pa = needed("pyarrow", what="Parquet", extra="export")
        parquet = needed("pyarrow.parquet", what="Parquet", extra="export")
        values = pa.array(embedded.rows.reshape(-1).numpy())
        columns = {
            "file": pa.array(embedded.names, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, embedded.rows.shape[1]),
        }
        with written_whole(out) as temporary:
            parquet.write_table(pa.table(columns, metadata={"protomem_run": str(run)}), temporary)
        return [out]
    names = out.with_name(out.name + ".json")
    with written_whole(names) as temporary:
        temporary.write_text(json.dumps(embedded.names, indent=0) + "\n", encoding="utf-8")
    with written_whole(out) as temporary, temporary.open("wb") as file:
        np.save(file, embedded.rows.numpy())
    return [out, names]


def check_embeddings_path(out: Path) -> None:
    """Check, before anything is computed, that ``write_embeddings`` can write there.

    Raises:
        RunError: as ``write_embeddings``.
    """
    if out.suffix not in (PARQUET, NUMPY):
        raise RunError(f"out must end in {PARQUET} or {NUMPY}, got {out}")
    if not out.parent.is_dir():
        raise RunError(f"out must be in a folder that is there, got {out}")
    if out.suffix == PARQUET:
        needed("pyarrow.parquet", what="Parquet", extra="export")


class _Pixels(Dataset["Tensor | str"]):
    """What the transform makes of each file, or the line that says why it cannot be read."""

    def __init__(self, files: Sequence[Path], transform: Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        path = self.files[index]
        if path.exists() and not path.is_file():  # a pipe would be waited for, for ever
            return f"{path}: expected a readable image, got a pipe, a socket or a device"
        try:
            return self.transform.pixels(path)
        except DatasetError as error:
            return " ".join(str(error).split())


def _images_in(folder: Path) -> list[Path]:
    """Return the files with a suffix of an image's, in whatever folder below, in the order of their names."""

    def refuse(error: OSError) -> None:
        raise RunError(f"{folder}: expected a readable folder, got {error.strerror or error}") from error

    def walk() -> Iterator[Path]:
        for where, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            shown = (name for name in names if not name.startswith("."))
            yield from (Path(where, name) for name in shown if Path(name).suffix.lower() in image_suffixes())

    return sorted(walk())


def _name(path: Path, folder: Path) -> str:
    """Return a file's name within the folder; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
