"""How a run goes on for somebody who looks at a terminal: a bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from protomem_kernels.training.steps import Step


class Bar:
    """A progress bar with the loss, how full the memory is, and the time that is left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss [cyan]{task.fields[loss]:.3f}[/]  memory [cyan]{task.fields[occupancy]:.0%}[/]"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, first_step: int, steps: int) -> None:
        """Begin after so many steps of all of them."""
        self._bar.start()
        self._task = self._bar.add_task("training", total=steps, completed=first_step, loss=0.0, occupancy=0.0)

    def show(self, step: Step, loss: float) -> None:
        """Move on to a step; ``loss`` is the smoothed one."""
        self._bar.update(self._task, completed=step.number, loss=loss, occupancy=step.occupancy)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()
