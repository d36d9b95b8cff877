"""A run from its data to its figures: train, leave checkpoints, verify on unseen people, write the run's folder.

``run_training(TrainConfig(steps=400, name="mine"))`` does it all. Nothing is shown; whoever wants to look on hands in
an ``Observer`` (the command line's draws a bar).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from protomem_kernels.data.sampling import IdentityBatchSampler
from protomem_kernels.training import checkpoints, runs
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.files import sweep
from protomem_kernels.training.report import report
from protomem_kernels.training.steps import Step, Training


class Observer:
    """What a run tells of itself. Nothing is done with it here; override what is of interest."""

    def begin(self, folder: Path, config: TrainConfig, people: str, device: torch.device, first_step: int) -> None:
        """Take note that training starts.

        Args:
            folder: the run's folder.
            config: the whole description of the run.
            people: one phrase on who trains and who verifies.
            device: where it trains.
            first_step: steps that are already behind a run that goes on; 0 for a fresh one.

        """

    def show(self, step: Step) -> None:
        """Take note of one training step."""

    def end(self) -> None:
        """Take note that training is over, after the last step or because of an error; always follows ``begin``."""

    def result(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Take note of the figures of a run that came to its end, as ``metrics.json`` holds them."""


def run_training(config: TrainConfig, *, watch: Observer | None = None, resumed: Path | None = None) -> dict[str, Any]:
    """Train, verify on unseen people, write the run's folder, and return what ``metrics.json`` holds.

    Args:
        config: the whole description of the run.
        watch: who is told of every step; None: nobody.
        resumed: the folder of the run to go on with; None: a fresh folder.

    Raises:
        RunError: the configuration, the folder or the checkpoint cannot be used; the loss is no longer finite.
        DatasetError: the images cannot be used.

    """
    watch = watch or Observer()
    started = time.perf_counter()
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    faces = Faces(config)
    training = Training(config, channels=faces.channels, identities=len(faces.train.identities), device=device)
    earlier = 0.0  # seconds of work that the checkpoint already holds
    if resumed is None:
        folder = runs.start_run(config)
    else:
        folder = resumed
        if (folder / runs.CHECKPOINT).exists():
            earlier = go_on(training, folder / runs.CHECKPOINT)
        sweep(folder)

    order = batches(faces.sampler(config), training.step, config.steps)
    watch.begin(folder, config, faces.summary, device, training.step)
    try:
        for images, labels in faces.train_batches(order):
            step = training.advance(images, labels)
            if not math.isfinite(step.loss):
                raise RunError(f"the loss is {step.loss} in step {step.number}; try a lower --learning-rate")
            watch.show(step)
            if training.step % config.checkpoint_every == 0 or training.step == config.steps:
                content = {"config": config.as_dict(), "seconds": earlier + time.perf_counter() - started}
                checkpoints.save_checkpoint(folder / runs.CHECKPOINT, content | training.state())
    finally:
        watch.end()

    metrics = report(folder, config, faces, training, seconds=earlier + time.perf_counter() - started)
    watch.result(folder, metrics)
    return metrics


def go_on(training: Training, checkpoint: Path) -> float:
    """Put ``training`` where the checkpoint was written; return the seconds of work behind it."""
    content = checkpoints.load_checkpoint(checkpoint)
    try:
        for key, ours in training.config.as_dict().items():
            theirs = content["config"][key]
            if theirs != ours and key not in runs.FREE_ON_RESUME:
                raise RunError(f"{checkpoint} belongs to another run: {key} is {theirs!r} there and {ours!r} here")
        training.restore(content)
        return float(content["seconds"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:  # what load_state_dict raises for other shapes
        raise RunError(f"{checkpoint} does not fit this run: {error}") from error


def batches(sampler: IdentityBatchSampler, first_step: int, steps: int) -> Iterator[list[int]]:
    """Yield the index batches of steps ``first_step`` to ``steps - 1``, entering the first epoch at the right place."""
    step = first_step
    while step < steps:
        epoch, offset = divmod(step, len(sampler))
        sampler.set_epoch(epoch)
        for position, batch in enumerate(sampler):
            if position >= offset and step < steps:
                yield batch
                step += 1


def pick_device(name: str) -> torch.device:
    """Return the device of that name (``auto``: a GPU where there is one); RunError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
