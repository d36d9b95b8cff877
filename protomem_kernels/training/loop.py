"""A run from its data to its figures: train, leave checkpoints, verify on unseen identities, write the run's folder.

``run_training(TrainConfig(steps=400, name="mine"))`` does it all. Nothing is shown; whoever wants to look on hands in
an ``Observer`` (the command line's draws a bar).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protomem_kernels.data.sampling import IdentityBatchSampler
from protomem_kernels.distributed.ranks import Ranks
from protomem_kernels.training import runs
from protomem_kernels.training.checkpoints import load_checkpoint
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.files import sweep
from protomem_kernels.training.locks import LOCK, locked
from protomem_kernels.training.processes import (
    any_of,
    check_alike,
    first_tells,
    is_lost,
    joined,
    share,
    started_anew,
    started_by,
    together,
    told_by_first,
)
from protomem_kernels.training.published import Published
from protomem_kernels.training.report import report
from protomem_kernels.training.steps import Step, Training
from protomem_kernels.training.stopping import RunStopped, StopSignals
from protomem_kernels.training.validation import Validations, validate


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

    def validated(self, step: int, validations: Validations) -> None:
        """Take note of a verification on the way, after a step: what the best one so far is."""

    def end(self) -> None:
        """Take note that training is over, after the last step or because of an error; always follows ``begin``."""

    def result(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Take note of the figures of a run that came to its end, as ``metrics.json`` holds them."""


def run_training(config: TrainConfig, *, watch: Observer | None = None, resumed: Path | None = None) -> dict[str, Any]:
    """Train, verify on unseen identities, write the run's folder, and return what ``metrics.json`` holds.

    SIGINT, SIGTERM or SIGHUP (heard in the main thread) end it after the step that it is in, and a checkpoint. No two
    runs write into one folder at the same time.

    Processes that torchrun has started do this together: each batch is shared out among them, and the memory is spread
    over them. The first one alone shows, writes and verifies; the others return {}.

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
        ToldElsewhereError: it has ended for a reason that another of its processes raises.

    """
    started = time.perf_counter()
    with StopSignals() as signals, stops_told("before the first step", resumed):
        device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.backends.cudnn.deterministic = True
        with joined(device, config.timeout) as ranks:
            watch = watch if watch is not None and ranks.rank == 0 else Observer()
            check_alike(ranks, {key: value for key, value in config.as_dict().items() if key != "device"})
            faces = together(ranks, lambda: Faces(config))
            check_alike(ranks, {"the images that train": faces.trained_on})
            settled = faces.config  # with the size of the images
            training = together(ranks, lambda: prepared(settled, faces, device, ranks))
            with run_folder(settled, resumed, ranks) as folder:
                published, earlier = Published(folder, training), Earlier()
                if told_by_first(ranks, published.path.exists):
                    earlier = together(ranks, lambda: go_on(published, faces.trained_on))
                # Noted only now: a run that cannot go on stays what it was.
                told_by_first(ranks, lambda: runs.extend_run(folder, settled.steps))
                return Run(training, published, faces, watch, signals, earlier, started).to_its_end()


def prepared(config: TrainConfig, faces: Faces, device: torch.device, ranks: Ranks) -> Training:
    """Return what trains, before its first step."""
    identities = faces.train.identities
    return Training(config, channels=faces.channels, identities=identities, device=device, ranks=ranks)


class Earlier(NamedTuple):
    """What a checkpoint tells of the run up to it.

    Attributes:
        seconds: of work.
        extended_after: the steps after which the run was extended to more of them.
        validations: what was found on the way.
    """

    seconds: float = 0.0
    extended_after: tuple[int, ...] = ()
    validations: Validations = Validations()


@dataclass
class Run:
    """A run under way.

    Attributes:
        training: what trains.
        published: its last checkpoint, in the run's folder.
        faces: on what.
        watch: who looks on.
        signals: may ask it to stop.
        earlier: what is behind it.
        started: when this process began with it, by ``time.perf_counter``.
        validations: what was found on the way.
        unheard: what kept the observer from showing.
    """

    training: Training
    published: Published
    faces: Faces
    watch: Observer
    signals: StopSignals
    earlier: Earlier
    started: float

    def __post_init__(self) -> None:
        self.validations = self.earlier.validations
        self.unheard: OSError | None = None
        self.config, self.ranks, self.folder = self.training.config, self.training.ranks, self.published.path.parent

    def to_its_end(self) -> dict[str, Any]:
        """Train and verify; return the metrics in the first process, nothing in the others."""
        with self.signals.held(), lost_process_told(self.training, self.published):
            self.train()
        if self.ranks.rank:
            return {}
        with stops_told("while it was verified", self.folder), whole_state_told(self.published):
            more = {
                "extended_after": [*self.earlier.extended_after],
                "seconds": round(self.seconds(), 2),
                "processes": self.ranks.size,
            }
            metrics = report(self.folder, self.faces, self.training, self.validations.best_step, more)
        self.tell(self.watch.result, self.folder, metrics)
        if self.unheard is not None:
            raise RunError(
                f"the run is done but cannot be shown ({why(self.unheard)}); its figures are in "
                f"{self.folder / runs.METRICS}"
            )
        return metrics

    def train(self) -> None:
        """Train to the last step, or to where it is no longer better."""
        config, training, ranks = self.config, self.training, self.ranks
        last = training.step if self.done() else config.steps
        order = batches(self.faces.sampler(config), training.step, last)
        shares = (share(batch, config.images_per_identity, ranks) for batch in order)
        who = self.faces.summary if ranks.alone else f"{self.faces.summary}, in {ranks.size} processes"
        try:
            for line in self.faces.notes:
                self.tell(self.watch.note, line)
            self.tell(self.watch.begin, self.folder, config, who, training.device, training.step)
            if any(self.asked_to_leave()):
                raise first_tells(ranks, RunError(f"cannot show the run: {why(self.unheard)}"))
            for images, labels in self.faces.train_batches(shares):
                step = training.advance(images, labels)
                if not math.isfinite(step.loss):
                    wrong = RunError(f"the loss is {step.loss} in step {step.number}; try a lower --learning-rate")
                    raise first_tells(ranks, wrong)
                self.tell(self.watch.show, step)
                if config.validate_every and training.step % config.validate_every == 0:
                    look = partial(validate, training, self.faces, self.folder, self.validations)
                    self.validations = told_by_first(ranks, look)
                    self.tell(self.watch.validated, training.step, self.validations)
                leaving = any(self.asked_to_leave()) or self.done()
                if leaving or training.step % config.checkpoint_every == 0:
                    with whole_state_told(self.published):
                        self.published.save(self.noted())
                if leaving:
                    break
        finally:
            self.tell(self.watch.end)
        there = f"after step {training.step} of {config.steps}; go on with: {runs.way_on(self.folder)}"
        heard, unseen = self.asked_to_leave()
        if heard:
            stopped = RunStopped(signal.Signals(heard), f"stopped by {signal.Signals(heard).name} {there}")
            raise first_tells(ranks, stopped, stopped.exit_code)
        if unseen and not self.done():
            told = RunError(f"cannot show the run any more ({why(self.unheard)}), stopped {there}")
            raise first_tells(ranks, told)

    def done(self) -> bool:
        """Say whether nothing is left to train."""
        return self.training.step == self.config.steps or self.validations.over(self.config.patience)

    def tell(self, what: Callable[..., None], *arguments: Any) -> None:
        """Tell the observer, and keep what first kept it from showing something."""
        try:
            what(*arguments)
        except OSError as error:
            self.unheard = self.unheard or error

    def asked_to_leave(self) -> tuple[int, int]:
        """Return the signal that any process has heard, and whether its observer is at a loss; 0: neither."""
        heard, unseen = any_of(self.ranks, self.training.device, self.signals.heard or 0, self.unheard is not None)
        return heard, unseen

    def seconds(self) -> float:
        """Return how long the run has taken so far."""
        return self.earlier.seconds + time.perf_counter() - self.started

    def noted(self) -> dict[str, Any]:
        """Return what a checkpoint tells of the run beside the state of the training."""
        return {
            "config": self.config.as_dict(),
            "trained_on": self.faces.trained_on,
            "seconds": self.seconds(),
            "extended_after": [*self.earlier.extended_after],
            "validations": [*self.validations],
        }


@contextmanager
def run_folder(config: TrainConfig, resumed: Path | None, ranks: Ranks) -> Iterator[Path]:
    """Yield the folder of a run, a fresh one unless it is resumed, locked by the first process.

    What torchrun starts anew goes on with the run that it has started.
    """
    start = started_by()
    with ExitStack() as held:

        def own() -> Path:
            before = resumed or (runs.run_of_start(config, start) if started_anew() else None)
            return held.enter_context(own_folder(config, before, start))

        yield told_by_first(ranks, own)


@contextmanager
def own_folder(config: TrainConfig, resumed: Path | None, start: str | None) -> Iterator[Path]:
    """Yield the folder of a run, locked."""
    if resumed is not None:
        with locked(resumed):
            runs.note_start(resumed, start)
            sweep(resumed)
            yield resumed
        return
    folder = runs.start_run(config)
    with locked(folder):
        try:
            runs.write_config(folder, config)
            runs.note_start(folder, start)
        except BaseException:
            (folder / LOCK).unlink()
            folder.rmdir()
            raise
        yield folder


@contextmanager
def lost_process_told(training: Training, published: Published) -> Iterator[None]:
    """Say that another process of the run is gone, which step this was in, and how to go on."""
    ranks = training.ranks
    try:
        yield
    except RuntimeError as error:
        if ranks.alone or not is_lost(error):
            raise
        state = "" if published.step is None else f"; {published.whole}"
        raise RunError(
            f"process {ranks.rank} of {ranks.size} lost another one in step {training.step + 1} "
            f"({str(error.__cause__ or error).splitlines()[0]:.200}){state}"
        ) from error


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
def whole_state_told(published: Published) -> Iterator[None]:
    """Say in an error of writing that the last checkpoint is whole, and how to go on."""
    try:
        yield
    except RunError as error:
        if published.step is None:
            raise
        raise RunError(f"{error}; {published.whole}") from error


def why(error: OSError | None) -> str:
    """Return what an error says, in words."""
    return "another process cannot" if error is None else str(error.strerror or error)


def go_on(published: Published, trained_on: list[Any]) -> Earlier:
    """Put the training where the checkpoint was written; return what is behind it."""
    training, checkpoint = published.training, published.path
    content = load_checkpoint(checkpoint)
    try:
        # An option that is newer than the checkpoint did not exist there: the run had what is its default now.
        theirs, ours = {**TrainConfig().as_dict(), **content["config"]}, training.config.as_dict()
        for key in ours:
            extended = key == "steps" and type(theirs[key]) is int and theirs[key] < ours[key]
            if theirs[key] != ours[key] and key not in runs.FREE_ON_RESUME and not extended:
                raise RunError(
                    f"{checkpoint} belongs to another run: {key} is {theirs[key]!r} there and {ours[key]!r} here"
                )
        if content.get("trained_on", trained_on) != trained_on:
            (images, identities, _), (now, of, _) = content["trained_on"], trained_on
            raise RunError(
                f"{checkpoint} was trained on other images: {images} of {identities} identities there, {now} of {of} "
                "here, or others by name; bring them back, or start a run of its own without --resume"
            )
        published.restore(content)
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
    validations = Validations.from_checkpoint(content["validations"]) if "validations" in content else Validations()
    return Earlier(float(seconds), tuple(extended_after), validations)


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
