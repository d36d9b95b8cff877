"""A run from its data to its figures: train, leave checkpoints, verify on unseen identities, write the run's folder.

``run_training(TrainConfig(steps=400, name="mine"))`` does it all. Nothing is shown; whoever wants to look on hands in
an ``Observer`` (the command line's draws a bar).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protomem_kernels.data.sampling import IdentityBatchSampler
from protomem_kernels.training import checkpoints, runs
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.files import sweep
from protomem_kernels.training.locks import LOCK, locked
from protomem_kernels.training.report import report
from protomem_kernels.training.steps import Step, Training
from protomem_kernels.training.stopping import RunStopped, StopSignals


class Observer:
    """What a run tells of itself. Nothing is done with it here; override what is of interest.

    An OSError that a method raises (the output is closed, the disk full) ends the run after a last checkpoint.
    """

    def note(self, line: str) -> None:
        """Take note of something about the data that a person should know, before ``begin``: a line."""

    def begin(self, folder: Path, config: TrainConfig, identities: str, device: torch.device, first_step: int) -> None:
        """Take note that training starts.

        Args:
            folder: the run's folder.
            config: the whole description of the run.
            identities: one phrase on which train and which verify.
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
    """Train, verify on unseen identities, write the run's folder, and return what ``metrics.json`` holds.

    SIGINT, SIGTERM or SIGHUP (heard in the main thread) end it after the step that it is in, and a checkpoint. No two
    runs write into one folder at the same time.

    Args:
        config: the whole description of the run.
        watch: who is told of every step; None: nobody.
        resumed: the folder of the run to go on with; None: a fresh folder. With more ``config.steps`` than the run was
            started for it is extended: from its checkpoint on, the schedule is that of the new number of steps.

    Raises:
        RunError: the configuration, the folder or the checkpoint cannot be used; another run uses the folder; a disk is
            full or ``watch`` cannot show the run any more; the loss is no longer finite.
        DatasetError: the images cannot be used.
        RunStopped: a signal asked for it. It is a KeyboardInterrupt.

    """
    watch = watch or Observer()
    started = time.perf_counter()
    with StopSignals() as signals, stops_told("before the first step", resumed):
        device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.backends.cudnn.deterministic = True
        faces = Faces(config)
        training = Training(config, channels=faces.channels, identities=len(faces.train.identities), device=device)
        with run_folder(config, resumed) as folder:
            earlier = Earlier()
            if resumed is not None:
                if (folder / runs.CHECKPOINT).exists():
                    earlier = go_on(training, folder / runs.CHECKPOINT)
                runs.extend_run(folder, config.steps)
                sweep(folder)
            return _train_and_report(folder, training, faces, watch, signals, earlier, started)


def _train_and_report(
    folder: Path,
    training: Training,
    faces: Faces,
    watch: Observer,
    signals: StopSignals,
    earlier: Earlier,
    started: float,
) -> dict[str, Any]:
    config, checkpoint = training.config, folder / runs.CHECKPOINT
    saved = training.step if checkpoint.exists() else None
    unheard: OSError | None = None  # what kept the observer from showing

    def seconds() -> float:
        return earlier.seconds + time.perf_counter() - started

    def state() -> dict[str, Any]:
        noted = {"seconds": seconds(), "extended_after": [*earlier.extended_after]}
        return {"config": config.as_dict(), **noted, **training.state()}

    with signals.held():
        order = batches(faces.sampler(config), training.step, config.steps)
        try:
            for line in faces.left_out.lines():
                unheard = unheard or failure(watch.note, line)
            unheard = unheard or failure(watch.begin, folder, config, faces.summary, training.device, training.step)
            if unheard is not None:
                raise RunError(f"cannot show the run: {unheard.strerror or unheard}")
            for images, labels in faces.train_batches(order):
                step = training.advance(images, labels)
                if not math.isfinite(step.loss):
                    raise RunError(f"the loss is {step.loss} in step {step.number}; try a lower --learning-rate")
                unheard = failure(watch.show, step)
                leaving = signals.heard is not None or unheard is not None
                if leaving or training.step % config.checkpoint_every == 0 or training.step == config.steps:
                    with whole_state_told(folder, saved):
                        checkpoints.save_checkpoint(checkpoint, state())
                    saved = training.step
                if leaving:
                    break
        finally:
            unheard = failure(watch.end) or unheard
        there = f"after step {training.step} of {config.steps}; go on with: {runs.way_on(folder)}"
        if signals.heard is not None:
            raise RunStopped(signals.heard, f"stopped by {signals.heard.name} {there}")
        if unheard is not None and training.step < config.steps:
            raise RunError(f"cannot show the run any more ({unheard.strerror or unheard}), stopped {there}")

    with stops_told("while it was verified", folder), whole_state_told(folder, saved):
        more = {"extended_after": [*earlier.extended_after], "seconds": round(seconds(), 2)}
        metrics = report(folder, config, faces, training, more)
    unheard = failure(watch.result, folder, metrics) or unheard
    if unheard is not None:
        why = unheard.strerror or unheard
        raise RunError(f"the run is done but cannot be shown ({why}); its figures are in {folder / runs.METRICS}")
    return metrics


class Earlier(NamedTuple):
    """What a checkpoint tells of the run up to it.

    Attributes:
        seconds: of work.
        extended_after: the steps after which the run was extended to more of them.
    """

    seconds: float = 0.0
    extended_after: tuple[int, ...] = ()


@contextmanager
def run_folder(config: TrainConfig, resumed: Path | None) -> Iterator[Path]:
    """Yield the folder of a run, a fresh one unless it is resumed, locked."""
    if resumed is not None:
        with locked(resumed):
            yield resumed
        return
    folder = runs.start_run(config)
    with locked(folder):
        try:
            runs.write_config(folder, config)
        except BaseException:
            (folder / LOCK).unlink()
            folder.rmdir()
            raise
        yield folder


@contextmanager
def stops_told(when: str, folder: Path | None) -> Iterator[None]:
    """Say when the run was stopped, and how to go on where there is a folder to go on with."""
    try:
        yield
    except RunStopped as stopped:
        if str(stopped):
            raise
        how = f"; go on with: {runs.way_on(folder)}" if folder else ""
        raise RunStopped(stopped.signal, f"stopped by {stopped.signal.name} {when}{how}") from None


@contextmanager
def whole_state_told(folder: Path, saved: int | None) -> Iterator[None]:
    """Say in an error of writing that the last checkpoint is whole, and how to go on."""
    try:
        yield
    except RunError as error:
        if saved is None:
            raise
        there = f"the checkpoint of step {saved} is whole, go on with: {runs.way_on(folder)}"
        raise RunError(f"{error}; {there}") from error


def failure(tell: Callable[..., None], *what: Any) -> OSError | None:
    """Tell an observer; return what kept it from showing that, or None."""
    try:
        tell(*what)
    except OSError as error:
        return error
    return None


def go_on(training: Training, checkpoint: Path) -> Earlier:
    """Put ``training`` where the checkpoint was written; return what is behind it."""
    content = checkpoints.load_checkpoint(checkpoint)
    try:
        # An option that is newer than the checkpoint did not exist there: the run had what is its default now.
        theirs, ours = {**TrainConfig().as_dict(), **content["config"]}, training.config.as_dict()
        for key in ours:
            extended = key == "steps" and type(theirs[key]) is int and theirs[key] < ours[key]
            if theirs[key] != ours[key] and key not in runs.FREE_ON_RESUME and not extended:
                raise RunError(
                    f"{checkpoint} belongs to another run: {key} is {theirs[key]!r} there and {ours[key]!r} here"
                )
        training.restore(content)
        return _earlier(content, training)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{checkpoint} does not fit this run: {error}") from error


def _earlier(content: dict[str, Any], training: Training) -> Earlier:
    seconds, extended_after = content["seconds"], content["extended_after"]
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be a number, 0 or more, got {seconds!r}")
    if type(extended_after) is not list or not all(type(s) is int and 0 <= s <= training.step for s in extended_after):
        raise ValueError(f"extended_after must be steps between 0 and {training.step}, got {extended_after!r:.80}")
    if content["config"]["steps"] < training.config.steps:
        extended_after = [*extended_after, training.step]
    return Earlier(float(seconds), tuple(extended_after))


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
