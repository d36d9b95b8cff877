"""``protomem compare``: the tables of methods on real images that show what the method learns."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from protomem_kernels.cli.errors import errors_in_one_line
from protomem_kernels.experiments.compare import CompareObserver, Plan, alone_in, compare, plan
from protomem_kernels.experiments.results import Row
from protomem_kernels.experiments.table import MethodTable, read_table, shipped
from protomem_kernels.training.stopping import RunStopped, StopSignals


def _completed(incomplete: str) -> list[str]:
    return [name for name in shipped() if name.startswith(incomplete)]


@errors_in_one_line
def compare_(
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Tables of the package, or paths of one's own (.toml). Default: {', '.join(shipped())}.",
            autocompletion=_completed,
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("evidence"),
    quick: Annotated[bool, typer.Option("--quick", help="All of it in small, with one seed: does it run?")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Trials at a time, each of one thread.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="This method alone; may be given again.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what there is, and what is missing; run nothing.")] = False,
) -> None:
    """Compare methods over seeds on identities that none of them has seen, table by table.

    A trial that was run is never run again: the same command goes on where it was stopped.
    """
    chosen = [read_table(name, quick=quick) for name in tables or shipped()]
    console = Console()
    if list_:
        for table, results, missing in plan(chosen, out, only or []):
            line = f"{table.name}: {table.title}; {len(results.rows)} trials are there, {len(missing)} missing"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    words = ["protomem", "compare", *(tables or []), "--out", str(out)]
    words += ["--quick"] * quick
    command = shlex.join(words)
    shown = Shown(console)
    try:
        with StopSignals(), alone_in(out), shown:
            compare(plan(chosen, out, only or []), command=command, jobs=jobs, watch=shown)
    except RunStopped as stopped:
        raise RunStopped(stopped.signal, f"stopped by {stopped.signal.name}; go on with: {command}") from None


class Shown(CompareObserver):
    """Shows how far a comparison is: a bar over all steps, and a line per trial."""

    def __init__(self, console: Console) -> None:
        self._console, self._before = console, 0
        self._made: TaskID | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, plans: Sequence[Plan]) -> None:
        """Say how much there is to do."""
        for table, results, missing in plans:
            if results.dropped:
                self._say(f"{table.name}: {results.dropped} rows are of other settings than the table's; made again")
            self._say(f"{table.name}: {table.title}; {len(results.rows)} trials are there, {len(missing)} to run")
        self._task = self._bar.add_task("compare", total=sum(plan.steps for plan in plans))
        self._left = {plan.table.name: plan.steps for plan in plans}

    def preparing(self, what: str, done: int, total: int) -> None:
        """Show a bar of its own."""
        if self._made is None:
            self._made = self._bar.add_task(f"drawing {what}", total=total)
        self._bar.update(self._made, completed=done, visible=done < total)

    def note(self, line: str) -> None:
        """Say it."""
        self._say(line)

    def steps(self, table: MethodTable, taken: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=self._before + taken, description=table.name)

    def trial(self, table: MethodTable, row: Row) -> None:
        """Say what came out."""
        main = row.figures.get(table.contents.figure, float("nan"))
        cost = row.figures["ms_per_step"]
        self._say(
            f"{table.name}, {row.method}, seed {row.seed}: {table.contents.figure} {main:.4f}, {cost:.1f} ms a step"
        )

    def written(self, table: MethodTable, page: Path) -> None:
        """Say where its page is."""
        self._before += self._left[table.name]
        self._say(f"{table.name}: {page}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
