"""``python -m benchmarks``; without the ``train`` extra it says so in one line and ends with exit code 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protomem_kernels.cli import check_needed

if TYPE_CHECKING:
    import typer


def app() -> typer.Typer:
    import typer

    from benchmarks.command import bench

    command = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_show_locals=False)
    command.command()(bench)
    return command


def main() -> None:
    check_needed("python -m benchmarks")
    app()()


if __name__ == "__main__":
    main()
