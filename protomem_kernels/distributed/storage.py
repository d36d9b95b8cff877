"""A checkpoint's folder: rows as raw bytes, and a manifest that is written last, in the hands of DCP.

``torch.distributed.checkpoint`` has the ranks plan, write and fail together, and works out which saved rows a range of
rows consists of. What lies on the disk is this file's:

- ``<save>-<rank>.rows``: the bytes of a rank's tensors, one after the other. Each save has names of its own.
- ``manifest.json``: of each tensor its dtype, shape and pieces (file, place, rows, SHA-256), with a checksum of itself.
  Rank 0 puts it in place of the last one when all ranks have written: only then does the checkpoint exist. It then
  removes the rows that this manifest does not name, those of the last save and of saves that were killed.

Nothing is pickled, so that nothing which is read is executed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from protomem_kernels._files import written_whole
from protomem_kernels.distributed.resharding import Saved, Shard

MANIFEST = "manifest.json"
FORMAT, VERSION = "protomem-rows", 1
_AT_A_TIME = 1 << 24  # bytes


class _Place(NamedTuple):
    """Where the bytes of some rows lie, and their SHA-256."""

    file: str
    offset: int
    size: int
    sha256: str


class RowPlanner(DefaultSavePlanner):
    """Has each rank write its shards, and rank 0 what is alike on all: whole tensors.

    Args:
        state: by name.
        rank: this one.
    """

    def __init__(self, state: Mapping[str, Tensor | Shard], rank: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state = {name: value for name, value in state.items() if rank == 0 or isinstance(value, Shard)}

    def create_local_plan(self) -> SavePlan:
        """Return what this rank writes."""
        self.plan = SavePlan([_write_item(name, value) for name, value in self.state.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the tensor of an item of the plan."""
        value = self.state[index.fqn]
        return value.rows if isinstance(value, Shard) else value


def _write_item(name: str, value: Tensor | Shard) -> WriteItem:
    rows, first, total = value if isinstance(value, Shard) else (value, 0, None)
    size = rows.shape if total is None else torch.Size([total, *rows.shape[1:]])
    chunk = _chunk(first, rows.shape)
    return WriteItem(
        MetadataIndex(name, chunk.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(rows.dtype), size),
    )


def _chunk(first: int, shape: torch.Size) -> ChunkStorageMetadata:
    """Return a piece of ``shape`` that begins in row ``first``; a number has no row."""
    return ChunkStorageMetadata(torch.Size([first, *[0] * len(shape)][: len(shape)]), shape)


def write(folder: Path, state: Mapping[str, Tensor | Shard], rank: int, group: Any) -> None:
    """Write a checkpoint, together with the other ranks of ``group``, or alone (None), and publish it.

    Raises:
        OSError, RuntimeError: it was not published.
    """
    writer, planner = FolderWriter(folder), RowPlanner(state, rank)
    if group is not None:
        try:
            save(dict(planner.state), storage_writer=writer, planner=planner, process_group=group)
        except CheckpointException as error:
            failed, (reason, _) = next(iter(error.failures.items()))
            raise RuntimeError(f"{reason} (rank {failed})") from error
        return
    # What DCP's save does, without the collectives and its warning that there are none.
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).value()])


class FolderWriter(StorageWriter):
    """Writes a checkpoint into a folder that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save: nothing is kept from one to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save; all that has to be known comes with the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the name of its file."""
        save = secrets.token_hex(8)
        return [replace(plan, storage_data=f"{save}-{rank}.rows") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's rows, down to the disk."""
        path, written = self.folder / plan.storage_data, []
        try:
            with path.open("wb") as file:
                for item in plan.items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)  # nothing else is planned
                    tensor = tensor.cpu().contiguous()
                    data = _bytes(tensor)
                    offset, digest = file.tell(), hashlib.sha256()
                    for start in range(0, len(data), _AT_A_TIME):
                        piece = data[start : start + _AT_A_TIME]
                        digest.update(piece)
                        file.write(piece)
                    place = _Place(path.name, offset, len(data), digest.hexdigest())
                    written.append(WriteResult(item.index, len(data), place))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the checkpoint; rank 0 alone is asked to, when all have written."""
        places = {result.index: result.storage_data for written in results for result in written}
        files = {place.file for place in places.values()}
        for file in files:
            end = max(place.offset + place.size for place in places.values() if place.file == file)
            if not (self.folder / file).is_file() or (self.folder / file).stat().st_size != end:
                raise RuntimeError(
                    f"rank 0 does not find {file} in {self.folder}: all ranks must write into one folder"
                )
        checkpoint = {
            "format": FORMAT,
            "version": VERSION,
            "torch": str(torch.__version__),
            "tensors": {
                name: _described(name, tensor, places) for name, tensor in metadata.state_dict_metadata.items()
            },
        }
        with written_whole(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({"sha256": _digest(checkpoint), "checkpoint": checkpoint}, indent=1))
        for path in self.folder.glob("*.rows"):
            if path.name not in files:
                path.unlink(missing_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether a folder may have this name."""
        return True

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: the manifest says it all."""
        return None


def _described(name: str, tensor: Any, places: Mapping[MetadataIndex, _Place]) -> dict[str, Any]:
    """Return a tensor's entry in the manifest."""
    return {
        "dtype": str(tensor.properties.dtype).removeprefix("torch."),
        "shape": list(tensor.size),
        "pieces": [
            {"first": [*chunk.offsets, 0][0], "shape": list(chunk.sizes)}
            | places[MetadataIndex(name, chunk.offsets)]._asdict()
            for chunk in tensor.chunks
        ],
    }


class Folder(Saved):
    """A checkpoint that was published in a folder.

    Args:
        folder: where.
        prefix: of the names that are asked for.

    Attributes:
        digest: of all that was saved.

    Raises:
        RuntimeError: there is none, or it cannot be read.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        try:
            written = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError as error:
            raise RuntimeError(
                f"{folder} holds no checkpoint: there is no {MANIFEST}, which a save writes last"
            ) from error
        except OSError as error:
            raise RuntimeError(f"{folder / MANIFEST} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise RuntimeError(f"{folder / MANIFEST} is damaged, or no manifest: {error}") from error
        try:
            checkpoint = written["checkpoint"]
            if checkpoint["format"] != FORMAT or checkpoint["version"] != VERSION:
                came = f"{checkpoint['format']} {checkpoint['version']}"
                raise RuntimeError(f"{folder / MANIFEST} must be of format {FORMAT} {VERSION}, got {came}")
            self.digest = _digest(checkpoint)
            if written["sha256"] != self.digest:
                raise RuntimeError(f"{folder / MANIFEST} is damaged: its checksum is not that of its content")
            self._tensors, self._places = _understood(checkpoint["tensors"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"{folder / MANIFEST} is no manifest of a checkpoint of protomem_kernels") from error

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return {name.removeprefix(self.prefix) for name in self._tensors if name.startswith(self.prefix)}

    def within(self, prefix: str) -> Folder:
        """Return the same with another prefix."""
        other = object.__new__(Folder)
        other.__dict__.update(self.__dict__, prefix=self.prefix + prefix)
        return other

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        dtype: torch.dtype = self._tensors[self.prefix + name].properties.dtype
        return dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, that of all ranks' rows together."""
        return tuple(self._tensors[self.prefix + name].size)

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """Return some rows of a tensor, on the CPU."""
        name = self.prefix + name
        saved = self._tensors[name]
        shape = saved.size
        if len(shape):
            shape = torch.Size([shape[0] - first if rows is None else rows, *shape[1:]])
        made = torch.empty(shape, dtype=saved.properties.dtype)
        for item in create_read_items_for_chunk_list(name, saved, [_chunk(first, shape)]):
            place = self._places[MetadataIndex(name, item.storage_index.offset)]
            into = made
            if len(shape):
                into = made.narrow(0, item.dest_offsets[0], item.lengths[0])
                row = made[:1].numel() * made.element_size()
                place = place._replace(offset=place.offset + item.storage_offsets[0] * row)
            self._read_into(_bytes(into), place)
        return made

    def verify(self, share: int, shares: int) -> None:
        """Read what was saved and hold it to its checksums: of ``shares`` shares, one.

        Raises:
            RuntimeError: naming what is not as it was saved.
        """
        buffer = memoryview(bytearray(_AT_A_TIME))
        for index, place in sorted(self._places.items(), key=lambda one: (one[1].file, one[1].offset))[share::shares]:
            digest = hashlib.sha256()
            for start in range(0, place.size, _AT_A_TIME):
                piece = buffer[: min(_AT_A_TIME, place.size - start)]
                self._read_into(piece, place._replace(offset=place.offset + start))
                digest.update(piece)
            if digest.hexdigest() != place.sha256:
                raise RuntimeError(
                    f"{self.folder / place.file} is not what was saved here: the checksum of {index.fqn} is another"
                )

    def _read_into(self, buffer: memoryview, place: _Place) -> None:
        path = self.folder / place.file
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                came = file.readinto(buffer)
        except OSError as error:
            raise RuntimeError(f"{path} cannot be read: {error.strerror or error}") from error
        if came != len(buffer):
            raise RuntimeError(
                f"{path} was cut off: at {place.offset} it must hold {len(buffer)} bytes more, got {came}"
            )


def _understood(tensors: Mapping[str, Any]) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, _Place]]:
    """Return what a manifest says of tensors as DCP says it, and where their pieces lie."""
    described, places = {}, {}
    for name, tensor in tensors.items():
        dtype, chunks = getattr(torch, tensor["dtype"]), []
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{tensor['dtype']} is no dtype")
        for piece in tensor["pieces"]:
            chunk = _chunk(piece["first"], torch.Size(piece["shape"]))
            place = _Place(**{field: piece[field] for field in _Place._fields})
            if Path(place.file).name != place.file:
                raise ValueError(f"{place.file} is not in the folder")
            chunks.append(chunk)
            places[MetadataIndex(name, chunk.offsets)] = place
        described[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(tensor["shape"]), chunks)
    return described, places


def _digest(checkpoint: Any) -> str:
    return hashlib.sha256(json.dumps(checkpoint, sort_keys=True).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, as long as that is kept: not a copy, and without NumPy."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())) if size else memoryview(bytearray())
