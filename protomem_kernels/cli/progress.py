"""What a person sees of a run: a bar or lines while it trains, TensorBoard beside it, figures and a way on after it."""

from __future__ import annotations

import shlex
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protomem_kernels.cli.bar import Bar
from protomem_kernels.cli.lines import Lines
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.loop import Observer
from protomem_kernels.training.report import who_verifies
from protomem_kernels.training.steps import Step
from protomem_kernels.training.validation import Validations


class RunConsole(Console):
    """A console whose closed output is an error like others, which a run can save itself from."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled; rich would end the process."""
        raise


class Display(Observer):
    """Shows a run on the console while it goes on, and writes its steps to TensorBoard."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._smooth = 0.0  # moving average of the loss, for the eye only
        self._threads_errors = threading.excepthook
        self._writer: Any = None
        self._steps = Bar(console) if console.is_terminal else Lines(console.file)

    def note(self, line: str) -> None:
        """Say it."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, folder: Path, config: TrainConfig, identities: str, device: torch.device, first_step: int) -> None:
        """Say what is trained, open TensorBoard's file and start the bar or the lines."""
        what = f"[bold]{escape(str(folder))}[/]: {escape(identities)}, {config.steps} steps on {device}"
        self._console.print(what, soft_wrap=True)
        if first_step:
            self._console.print(f"continuing after step {first_step}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensorboard's own dependencies
            from torch.utils.tensorboard import SummaryWriter
        # Events of steps that a killed run took after its last checkpoint are marked as undone.
        threading.excepthook = self._note
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._steps.start(first_step, config.steps)

    def show(self, step: Step) -> None:
        """Show the step, and write the step to TensorBoard."""
        self._smooth = step.loss if not self._smooth else 0.9 * self._smooth + 0.1 * step.loss
        self._steps.show(step, self._smooth)
        for name, value in step._asdict().items():
            if isinstance(value, float):
                self._writer.add_scalar(f"train/{name}", value, step.number)
        if step.health is not None:
            step.health.write(self._writer, step.number)

    def validated(self, step: int, validations: Validations) -> None:
        """Say how good the encoder is, and write it to TensorBoard."""
        best = "the best so far" if validations.since == 0 else f"the best was step {validations.best_step}"
        self.note(f"verified after step {step}: accuracy {validations.last:.3f}, {best}")
        self._writer.add_scalar("validation/accuracy", validations.last, step)

    def end(self) -> None:
        """Stop the bar or the lines and close TensorBoard's file."""
        try:
            self._steps.stop()
        finally:
            try:
                if self._writer is not None:
                    self._writer.close()
            finally:
                threading.excepthook = self._threads_errors

    def _note(self, error: threading.ExceptHookArgs) -> None:
        """Be silent about a thread of the bar's or TensorBoard's that cannot write: the main thread hears of it."""
        if not isinstance(error.exc_value, OSError):
            self._threads_errors(error)

    def result(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Show the table of the figures, where the run's files are, and what can be done with it."""
        if "verification_accuracy" in metrics:
            self._console.print(result_table(metrics))
        for line in [*uncertainty_lines(metrics), *closing_lines(folder, metrics)]:
            self.note(line)


def uncertainty_lines(metrics: dict[str, Any]) -> list[str]:
    """Return how sure the figures are, and what they cannot say."""
    rates = {"accuracy": "verification_accuracy", "TAR at FAR 1e-2": "tar_at_far_1e-2"}
    notes = [f"note:  {caution}" for caution in metrics["cautions"]]
    if "verification_accuracy" not in metrics:
        return notes
    ranges = [f"{name} {metrics[f'{key}_low']:.3f} to {metrics[f'{key}_high']:.3f}" for name, key in rates.items()]
    return [f"95 %:  {', '.join(ranges)}", *notes]


def closing_lines(folder: Path, metrics: dict[str, Any]) -> list[str]:
    """Return where a run's files are, and commands that use what was trained."""
    verified = "verification_accuracy" in metrics
    pictures = ", roc.png, hardest_pairs.png" if verified else ""
    command = ["verify", "A.jpg", "B.jpg"] if verified else ["embed", "FOLDER"]
    return [
        f"files: {folder} (encoder.pt, metrics.json{pictures})",
        f"look:  {shlex.join(['tensorboard', '--logdir', str(folder.parent)])}",
        f"next:  {shlex.join(['protomem', *command, '--run', str(folder)])}",
    ]


def result_table(metrics: dict[str, Any]) -> Table:
    """Return the run's figures beside those of the raw pixels."""
    table = Table(title=f"Verification of {who_verifies(metrics)}")
    for heading in ("", "trained", "raw pixels", "gain"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "verification accuracy": ("verification_accuracy", "baseline_raw_pixels"),
        "TAR at FAR 1e-2": ("tar_at_far_1e-2", "baseline_tar_at_far_1e-2"),
        "rank-1 identification": ("rank1", "baseline_rank1"),
        "area under the ROC": ("auc", "baseline_auc"),
    }
    for title, (ours, baseline) in rows.items():
        if metrics[ours] is None:  # of rank-1: a list of pairs cannot say it
            continue
        gain = metrics[ours] - metrics[baseline]
        table.add_row(
            title,
            f"[bold]{metrics[ours]:.3f}[/]",
            f"{metrics[baseline]:.3f}",
            f"[{'green' if gain > 0 else 'red'}]{gain:+.3f}[/]",
        )
    table.add_section()
    table.add_row("pixels in ten views", "", f"{metrics['baseline_ten_views']:.3f}", "")
    return table
