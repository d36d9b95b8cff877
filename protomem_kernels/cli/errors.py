"""Errors that are the user's to mend: one clear line on stderr and exit code 2, never a traceback; warnings: a line."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer

from protomem_kernels.data.images import DatasetError
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.processes import ToldElsewhereError
from protomem_kernels.training.stopping import RunStopped

P = ParamSpec("P")
R = TypeVar("R")


class CommandError(Exception):
    """Something a command cannot go on with, for a reason that its user can read and mend."""


def errors_in_one_line(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that expected errors end it with one line and exit code 2; anything else stays a traceback.

    A run that a signal stopped ends with one line, too, and the exit code of that signal. Warnings are one line each,
    without the place in the code that Python would name.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with warnings_in_one_line():
                return command(*args, **kwargs)
        except (CommandError, RunError, DatasetError) as error:
            line, code = f"error: {error}", 2
        except RunStopped as stopped:
            line, code = str(stopped), stopped.exit_code
        except ToldElsewhereError as told:
            raise typer.Exit(told.exit_code) from None
        _give_up_stdout_if_closed()
        typer.echo(" ".join(line.split()), err=True)
        raise typer.Exit(code)

    return wrapper


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print a UserWarning, which is for whoever typed the command, as its words alone."""
    usual = warnings.formatwarning

    def told(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *place, **line)
        return f"warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _give_up_stdout_if_closed() -> None:
    """Drop what cannot be written, which Python would try again, and complain of, when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
