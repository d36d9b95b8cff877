"""``python -m benchmarks``: run the suite, and turn its figures into tables, files and plots."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import protomem_kernels as pmk
from benchmarks.last import with_last
from benchmarks.plots import draw_plots
from benchmarks.results import Results, read_results, verdict, write_results
from protomem_kernels.cli.errors import CommandError, errors_in_one_line
from protomem_kernels.cli.machine import machine
from protomem_kernels.cli.pytest_runs import NOTHING_COLLECTED, USAGE_ERROR, run_pytest
from protomem_kernels.training.loop import pick_device

SUITE = Path(__file__).parent
LOG = "pytest.log"
DTYPES = ("float32", "bfloat16", "float16")


@errors_in_one_line
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the figures the project holds itself to, in under two minutes.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every combination of sizes (hours). [dim]Default: one axis at a time.[/]")
    ] = False,
    select: Annotated[
        str, typer.Option(help="Only benchmarks whose name contains this, e.g. enqueue or 'forward and eager'.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what is written. [dim]Default: runs/bench; with --static docs of the checkout.[/]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16: of the embeddings and the prototypes.")
    ] = "float32",
    backend: Annotated[
        str,
        typer.Option(help="Measure this backend of ours alone. [dim]Default: all, or the one that dispatch takes.[/]"),
    ] = "",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0: as many as PyTorch sees fit.")] = 0,
    static: Annotated[
        bool, typer.Option("--static", help="Measure nothing: compile every Triton kernel for real GPUs and count.")
    ] = False,
) -> None:
    """Measure every operator against its peers, in units of G: the time of the bare matrix product of the same sizes.

    Without --quick about three quarters of an hour on two cores. With --quick the exit code is 1 if a figure is not
    what it must be.

    Example: protomem bench --select enqueue --threads 1
    """
    chosen = [name for name, given in {"--quick": quick, "--full": full, "--static": static}.items() if given]
    if len(chosen) > 1:
        raise CommandError(f"{' and '.join(chosen)} exclude each other")
    if static:
        _static_report(_writable(output or SUITE.parent / "docs"))
        return
    device = str(pick_device(device))
    if dtype not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if quick and dtype != DTYPES[0]:
        raise CommandError(f"the figures of --quick are those of {DTYPES[0]}; leave --dtype out")
    _check_backend(backend)
    output = _writable(output or Path("runs/bench"))
    options = ["--device", device, "--threads", str(threads), "--dtype", dtype]
    options += ["--backend", backend] if backend else []
    options += ["--sizes", "full"] if full else []
    options += ["-k", select] if select else []

    console = Console()
    _run_suite("quick.py" if quick else "", options, output, select, console)
    results = with_last(output, read_results(output, machine(device, threads) | {"dtype": dtype}))
    write_results(output, results)
    for table in [_figures(results)] if quick else _tables(results):
        console.print(table)
    for reason in results.not_measured:
        console.print(f"not measured: {reason}", markup=False)
    for plot in draw_plots(output, results):
        console.print(f"plot: {plot}", markup=False)
    missed = sum(not verdict(row["value"], row["must"], row["aim"]).must for row in results.rows if "must" in row)
    if results.failed or missed or (quick and results.not_measured):
        for failure in results.failed:
            console.print(f"failed: {failure} (see {output / LOG})", markup=False)
        raise typer.Exit(1)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def _static_report(folder: Path) -> None:
    """Run the compile harness in a process without the interpreter; it writes the report into ``folder``."""
    if find_spec("triton") is None:
        raise CommandError("python -m benchmarks --static needs triton: pip install triton (it exists for Linux)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", "--output", str(folder.resolve())]
    done = subprocess.run(command, cwd=SUITE.parent, env=environment, text=True, stderr=subprocess.PIPE)
    if done.returncode:
        raise CommandError(f"the static report failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _check_backend(backend: str) -> None:
    if backend:
        try:
            with pmk.use_backend(backend):
                pass
        except (RuntimeError, ValueError) as error:
            raise CommandError(str(error)) from error


def _run_suite(file: str, options: list[str], output: Path, select: str, console: Console) -> None:
    """Run the suite (or one file of it) in a pytest of its own; its report, figures and log are left in ``output``."""
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise CommandError(f"python -m benchmarks needs {', '.join(missing)}: pip install -e '.[train,bench]'")
    here = output.resolve()
    for name in ("benchmark.json", "junit.xml"):
        (here / name).unlink(missing_ok=True)
    arguments = [str(SUITE / file), "--benchmark-quiet"]
    arguments += [f"--benchmark-json={here / 'benchmark.json'}", f"--junit-xml={here / 'junit.xml'}", *options]
    code = run_pytest(arguments, SUITE.parent, output / LOG, console, "collecting the benchmarks ...")
    if code == NOTHING_COLLECTED or (select and code == USAGE_ERROR):
        files = ", ".join(sorted(path.stem.removeprefix("bench_") for path in SUITE.glob("bench_*.py")))
        raise CommandError(f"no benchmark matches --select {select!r}; there are {files} (all names: {output / LOG})")
    if code not in (0, 1):
        raise CommandError(f"pytest ended with exit code {code}; see {output / LOG}")


def _figures(results: Results) -> Table:
    """Return the table of the figures that the project holds itself to."""
    table = Table("figure", "measured", "must", "aim", "last", "change", title=_title(results), title_justify="left")
    for row in results.rows:
        unit = {"times": "", "times faster": "x"}.get(row["unit"], f" {row['unit']}")
        met = verdict(row["value"], row["must"], row["aim"])
        table.add_row(
            row["figure"],
            f"{row['value']:.2f}{unit}",
            f"{row['must']:g}{unit} {'[green]pass[/]' if met.must else '[red]MISS[/]'}",
            f"{row['aim']:g}{unit} {'[green]pass[/]' if met.aim else '[dim]not yet[/]'}",
            *(COLUMNS[column](row[column]) if column in row else "" for column in ("last", "change")),
        )
    return table


COLUMNS: dict[str, Callable[[Any], str]] = {
    "what": str,
    "peer": str,
    "B": str,
    "M": "{:,}".format,
    "D": str,
    "regime": str,
    "identities": "{:,}".format,
    "ratio": "{:.2f}".format,
    "ratio_min": "{:.2f}".format,
    "ratio_max": "{:.2f}".format,
    "seconds": "{:.3g}".format,
    "peak_extra_bytes": lambda value: f"{value / 2**20:,.0f} MiB",
    "times_the_copying": "{:.1f}".format,
    "last": "{:.2f}".format,
    "change": "{:+.0%}".format,
}


def _tables(results: Results) -> list[Table]:
    """Return one table per operator, with the columns that it has figures for."""
    tables = []
    for operator in dict.fromkeys(row["operator"] for row in results.rows):
        rows = [row for row in results.rows if row["operator"] == operator]
        columns = [column for column in COLUMNS if any(column in row for row in rows)]
        headers = [column.replace("_", " ").replace("ratio", rows[0]["unit"]) for column in columns]
        table = Table(*headers, title=f"{operator}\n{_title(results)}", title_justify="left")
        for row in rows:
            table.add_row(*(COLUMNS[column](row[column]) if column in row else "" for column in columns))
        tables.append(table)
    return tables


def _title(results: Results) -> str:
    of = results.machine
    where = f"{of['gpu'] or of['cpu']}, {of['threads']} threads, {of['capability']}"
    return f"[dim]{where}, {of['dtype']}, torch {of['torch']}[/]"
