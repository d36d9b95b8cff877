"""Errors that are the user's to mend: one clear line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from protomem_kernels.data.images import DatasetError
from protomem_kernels.training.errors import RunError

P = ParamSpec("P")
R = TypeVar("R")


class CommandError(Exception):
    """Something a command cannot go on with, for a reason that its user can read and mend."""


def errors_in_one_line(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that expected errors end it with one line and exit code 2; anything else stays a traceback."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (CommandError, RunError, DatasetError) as error:
            typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from None

    return wrapper
