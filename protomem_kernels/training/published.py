"""The checkpoint of a run: ``checkpoint.pt``, and beside it the head where several processes have it together.

One process writes one file. Of several, each writes what it has of the head into a folder, as
``protomem_kernels.distributed.save`` does, and then the first one writes the file, which names that folder and its
checksum. The folder that the last file names stays until the next file is whole. Any number of processes goes on with
either.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from protomem_kernels.distributed.checkpoints import load, save
from protomem_kernels.distributed.resharding import BESIDE
from protomem_kernels.training import checkpoints
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.processes import together, told_by_first
from protomem_kernels.training.runs import CHECKPOINT, way_on
from protomem_kernels.training.steps import Training

HEADS = ("head-a", "head-b")  # in turn


class Published:
    """The last checkpoint of a run's folder.

    Args:
        folder: of the run; all processes see it.
        training: what is saved and restored.

    Attributes:
        path: the file.
        head: the folder beside it that the file names, or None.
        step: after which it was saved; None: nothing was.
    """

    def __init__(self, folder: Path, training: Training) -> None:
        self.path, self.training = folder / CHECKPOINT, training
        self.head: str | None = None
        self.step: int | None = None

    @property
    def whole(self) -> str:
        """What is there to go on from, and how."""
        return f"the checkpoint of step {self.step} is whole, go on with: {way_on(self.path.parent)}"

    def save(self, noted: Mapping[str, Any]) -> None:
        """Save the state of the training, and what is ``noted`` beside it; in all processes.

        Raises:
            RunError: it cannot be written: the last checkpoint stands. ToldElsewhereError in other processes.
        """
        from protomem_kernels.distributed.storage import Folder

        training, ranks = self.training, self.training.ranks
        head = None if ranks.alone else HEADS[self.head == HEADS[0]]
        if head is not None:
            together(ranks, partial(self._save_head, self.path.with_name(head)))

        def write() -> None:
            if head is None:
                state = training.state()
            else:
                digest = Folder(self.path.with_name(head)).digest
                state = training.state_without_head() | {"head": head, "head_sha256": digest}
            checkpoints.save_checkpoint(self.path, {**noted, **state})
            for other in set(HEADS) - {head}:
                shutil.rmtree(self.path.with_name(other), ignore_errors=True)

        told_by_first(ranks, write)
        self.head, self.step = head, training.step

    def _save_head(self, folder: Path) -> None:
        """Save what this process has of the head, together with the others."""
        try:
            save(folder, self.training.loss, self.training.optimizer)
        except RuntimeError as error:
            raise RunError(f"cannot write {folder}: {error.__cause__ or error}") from error

    def restore(self, content: dict[str, Any]) -> None:
        """Put the training where the checkpoint was written, whose ``content`` the file has.

        Raises:
            RunError: the head beside the file is another.
            KeyError, ValueError, TypeError, RuntimeError: it is not of such a run.
        """
        training, head = self.training, content.get("head")
        if head is not None:
            if head not in HEADS:
                raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
            training.restore_without_head(content)
            load(self._checked(head, content["head_sha256"]), training.loss, training.optimizer)
        elif training.ranks.alone:
            training.restore(content)
        else:
            training.restore_without_head(content)
            load(_of_one_process(content, training.head_numbers), training.loss, training.optimizer)
        self.head, self.step = head, training.step

    def _checked(self, head: str, digest: str) -> Path:
        from protomem_kernels.distributed.storage import Folder

        folder = self.path.with_name(head)
        if Folder(folder).digest != digest:
            raise RunError(f"{folder} is not the one that {self.path} was saved with; take a copy of both")
        return folder


def _of_one_process(content: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """Return a head, and what the optimiser keeps beside its parameters, as one process has saved them."""
    kept = content["optimizer"]["state"]
    return {**content["loss"]} | {
        f"{name}{BESIDE}{key}": value for name, place in numbers.items() for key, value in kept.get(place, {}).items()
    }
