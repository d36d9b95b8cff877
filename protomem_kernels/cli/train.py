"""``protomem train``: the options, read off the fields of ``TrainConfig``, and which of them were typed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from protomem_kernels.cli.errors import errors_in_one_line
from protomem_kernels.cli.progress import Display, RunConsole
from protomem_kernels.training.config import RUN, TrainConfig, config_from, limits, read_toml, schema
from protomem_kernels.training.loop import run_training
from protomem_kernels.training.runs import reopen_run


@errors_in_one_line
def train(
    ctx: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with any of these options (snake_case keys).", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the newest run of this name; more --steps extend it.", rich_help_panel=RUN
        ),
    ] = False,
    **flags: Any,
) -> None:
    """Train an encoder with Prototype Memory and verify it on identities it has never seen.

    Without any option: the ORL faces (40 people, 10 images each; AT&T Laboratories Cambridge), 30 people to train and
    10 to verify, about two minutes on two cores. Flags override the TOML file, and --no-compile
    and the like turn off what is on there.
    """
    given = read_toml(config_file) if config_file else {}
    for key, value in flags.items():
        if _was_typed(ctx, key):
            given |= {key: value} if key in TrainConfig.model_fields else {key.removeprefix("no_"): False}
    config = config_from(given, str(config_file))
    folder = None
    if resume:
        folder, config = reopen_run(config, given)
    run_training(config, watch=Display(RunConsole()), resumed=folder)


def _choices_told(choices: list[str]) -> str:
    return f"[cyan]{', '.join(choices)}[/]" if choices else ""


def _limits_told(name: str) -> str:
    """Say the limits of a number that has two of them, unless they are there for the machine alone."""
    low, high = limits(name)
    return "" if low is None or high is None or high > 1024 else f"[cyan]{low:g} to {high:g}[/]"


def _completing(choices: list[str]) -> Callable[[str], list[str]]:
    """Return what tells a shell the choices that begin with what is typed."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _was_typed(ctx: typer.Context, key: str) -> bool:
    """Tell a flag on the command line from an option's default."""
    source = ctx.get_parameter_source(key)
    return source is not None and source.name == "COMMANDLINE"


def _take_options_from_the_config() -> None:
    """Replace ``**flags`` in the command's signature by one option per field of TrainConfig."""
    types = get_type_hints(TrainConfig)
    parameters = [p for p in inspect.signature(train, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, accepted in schema().items():
        word = name.replace("_", "-")
        choices = accepted.get("enum") or accepted["choices"]
        flag = typer.Option(
            TrainConfig.model_fields[name].default,
            f"--{word}",
            help=" ".join(filter(None, [accepted["description"], _choices_told(choices), _limits_told(name)])),
            rich_help_panel=accepted["panel"],
            metavar="NAME" if choices else None,
            autocompletion=_completing(choices) if choices else None,
            show_default=accepted["default"] not in ("", None),
        )
        # A choice is checked by the configuration, in the same words as one in a TOML file.
        kind = str if get_origin(types[name]) is Literal else types[name]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=flag, annotation=kind))
        if kind is bool:
            off = typer.Option(False, f"--no-{word}", hidden=True)  # beside its switch it would take half the width
            parameters.append(
                inspect.Parameter(f"no_{name}", inspect.Parameter.KEYWORD_ONLY, default=off, annotation=bool)
            )
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}


_take_options_from_the_config()
