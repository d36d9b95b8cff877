"""``compare``: the trials of some tables that are still missing, and the pages of all that is there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.experiments.images import prepare
from protomem_kernels.experiments.plots import draw_ages, draw_table
from protomem_kernels.experiments.report import markdown
from protomem_kernels.experiments.results import Results, Row
from protomem_kernels.experiments.table import Method, MethodTable
from protomem_kernels.experiments.work import run_all
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.files import sweep, written_whole
from protomem_kernels.training.locks import locked


class Plan(NamedTuple):
    """What is still to be done for one table."""

    table: MethodTable
    results: Results
    missing: list[tuple[Method, int]]

    @property
    def steps(self) -> int:
        """Training steps of all that is missing."""
        return sum(method.trial.train.steps for method, _ in self.missing)


class CompareObserver:
    """What a comparison tells of itself. Nothing is done with it here; override what is of interest."""

    def begin(self, plans: Sequence[Plan]) -> None:
        """Take note of what is to be done."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Take note of how far the making of a data set is."""

    def note(self, line: str) -> None:
        """Take note of something about the data that a person should know: a line."""

    def steps(self, table: MethodTable, taken: int) -> None:
        """Take note of how many training steps of a table were taken so far, in this call."""

    def trial(self, table: MethodTable, row: Row) -> None:
        """Take note of a trial that ended."""

    def written(self, table: MethodTable, page: Path) -> None:
        """Take note of a table that is whole."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder of the results, and let no other comparison write into it within the block.

    Raises:
        RunError: it cannot be written, or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error
    with locked(folder, "name another folder with --out"):
        sweep(folder)
        yield


def plan(tables: Sequence[MethodTable], folder: Path, only: Sequence[str] = ()) -> list[Plan]:
    """Return what is missing of each table in a folder; ``only`` names the methods that are wanted.

    Raises:
        RunError: a file there is none of results, or no table has such a method.
    """
    unknown = sorted(set(only) - {name for table in tables for name in table.methods})
    if unknown:
        known = ", ".join(repr(name) for table in tables for name in table.methods)
        raise RunError(f"there is no method {', '.join(map(repr, unknown))}; there are {known}")
    plans = []
    for table in tables:
        results = Results(folder / f"{table.name}.csv", table)
        missing = [trial for trial in results.missing() if not only or trial[0].name in only]
        plans.append(Plan(table, results, missing))
    return plans


def compare(plans: Sequence[Plan], *, command: str, jobs: int = 1, watch: CompareObserver | None = None) -> list[Path]:
    """Run what is missing of the tables, one after another, and write their pages; return these.

    Every trial that ends is written at once, so that nothing but what runs is lost when this is ended.

    Args:
        plans: of the tables.
        command: that does this, for the pages.
        jobs: trials at a time.
        watch: who is told.

    Raises:
        RunError: a trial cannot be run, or a file not be written.
        DatasetError: the images of a table cannot be had; the other tables are made before it is raised.
    """
    watch = watch or CompareObserver()
    watch.begin(plans)
    source, pages, refused = commit(), list[Path](), list[DatasetError]()
    for plan in plans:
        try:
            _prepare(plan, watch)
        except DatasetError as error:  # the others may have their images
            watch.note(f"{plan.table.name} is left out: {error}")
            refused.append(error)
            continue
        for row in _run(plan, jobs, source, watch):
            plan.results.add(row)
            watch.trial(plan.table, row)
        if plan.results.rows:
            pages.append(write_page(plan.results, command))
            watch.written(plan.table, pages[-1])
    if refused:
        raise refused[0]
    return pages


def _prepare(plan: Plan, watch: CompareObserver) -> None:
    """Make the images of a table, all of whose methods see one data set, if anything is to be run on them."""
    for method, _ in plan.missing[:1]:
        for line in prepare(method.trial, partial(watch.preparing, method.trial.data)):
            watch.note(line)


def _run(plan: Plan, jobs: int, source: str, watch: CompareObserver) -> Iterator[Row]:
    """Run what no other table of the folder has, and yield its rows."""
    trials = run_all(
        [trial for trial in plan.missing if not plan.results.borrow(*trial)],
        jobs=jobs,
        ages=plan.table.contents.ages,
        told=partial(watch.steps, plan.table),
    )
    for method, seed, figures in trials:
        yield Row(method.name, seed, method.trial.digest(), source, figures)


def write_page(results: Results, command: str) -> Path:
    """Write the page of a table and its pictures beside its rows."""
    table, rows, page = results.table, results.rows, results.path.with_suffix(".md")
    pictures = [page.with_suffix(".png")]
    draw_table(pictures[0], table, rows)
    if table.contents.ages:
        pictures.append(page.with_name(f"{table.name}_ages.png"))
        draw_ages(pictures[1], table, rows)
    with written_whole(page) as temporary:
        temporary.write_text(markdown(table, rows, command, [picture.name for picture in pictures]), encoding="utf-8")
    return page


def commit() -> str:
    """Return the commit of the sources, marked where they were changed since; "" where they are no checkout.

    Pages and rows of a table, which lie in a checkout too, are no sources. An installed package may lie in somebody
    else's checkout, which does not track it.
    """
    here = Path(__file__)
    sources = str(here.parents[1]), ":/csrc"
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", *sources)
        return _git(here.parent, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()
