"""``protomem train``: the options, and the run from its data to its figures."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

from protomem_kernels.cli import checkpoints, runs
from protomem_kernels.cli.config import RUN, TrainConfig, config_from, read_toml
from protomem_kernels.cli.errors import CommandError, errors_in_one_line
from protomem_kernels.cli.faces import Faces
from protomem_kernels.cli.progress import Display, result_table
from protomem_kernels.cli.report import report
from protomem_kernels.cli.training import Training, batches


def run_training(config: TrainConfig, console: Console, resumed: Path | None = None) -> dict[str, Any]:
    """Train, verify on unseen people, write the run's folder, and return what ``metrics.json`` holds.

    Args:
        config: the whole description of the run.
        console: where progress and the result table go.
        resumed: the folder of the run to go on with; None: a fresh folder.

    """
    started = time.perf_counter()
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    faces = Faces(config)
    training = Training(config, channels=faces.channels, identities=len(faces.train.identities), device=device)
    earlier = 0.0  # seconds of work that the checkpoint already holds
    if resumed is None:
        folder = runs.start_run(config)
    else:
        folder = resumed
        if (folder / runs.CHECKPOINT).exists():
            earlier = go_on(training, folder / runs.CHECKPOINT)
        checkpoints.sweep(folder)
    console.print(f"[bold]{folder}[/]: {faces.summary}, {config.steps} steps on {device}")
    if training.step:
        console.print(f"continuing after step {training.step}")

    sampler = faces.sampler(config)
    order = batches(sampler, training.step, config.steps)
    with Display(folder, config, first_step=training.step, console=console) as display:
        for images, labels in faces.train_batches(order):
            step = training.advance(images, labels)
            if not math.isfinite(step.loss):
                raise CommandError(f"the loss is {step.loss} in step {step.number}; try a lower --learning-rate")
            display.show(step)
            if training.step % config.checkpoint_every == 0 or training.step == config.steps:
                content = {"config": config.as_dict(), "seconds": earlier + time.perf_counter() - started}
                checkpoints.save_checkpoint(folder / runs.CHECKPOINT, content | training.state())

    metrics = report(folder, config, faces, training, seconds=earlier + time.perf_counter() - started)
    console.print(result_table(folder, metrics))
    return metrics


def go_on(training: Training, checkpoint: Path) -> float:
    """Put ``training`` where the checkpoint was written; return the seconds of work behind it."""
    content = checkpoints.load_checkpoint(checkpoint)
    try:
        for key, ours in training.config.as_dict().items():
            theirs = content["config"][key]
            if theirs != ours and key not in runs.FREE_ON_RESUME:
                raise CommandError(f"{checkpoint} belongs to another run: {key} is {theirs!r} there and {ours!r} here")
        training.restore(content)
        return float(content["seconds"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:  # what load_state_dict raises for other shapes
        raise CommandError(f"{checkpoint} does not fit this run: {error}") from error


def pick_device(name: str) -> torch.device:
    """Return the device of that name (``auto``: a GPU where there is one); CommandError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@errors_in_one_line
def train(
    ctx: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with any of these options (snake_case keys).", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of this name.", rich_help_panel=RUN)
    ] = False,
    **flags: Any,
) -> None:
    """Train an encoder with Prototype Memory and verify it on people it has never seen.

    Without any option: the ORL faces (40 people, 10 images each; AT&T Laboratories Cambridge), 30 people to train and
    10 to verify, about two minutes on two cores. Flags override the TOML file.
    """
    given = read_toml(config_file) if config_file else {}
    given |= {key: value for key, value in flags.items() if _was_typed(ctx, key)}
    config = config_from(given, str(config_file))
    folder = None
    if resume:
        folder, config = runs.reopen_run(config, given)
    run_training(config, Console(), folder)


def _was_typed(ctx: typer.Context, key: str) -> bool:
    """Tell a flag on the command line from an option's default."""
    source = ctx.get_parameter_source(key)
    return source is not None and source.name == "COMMANDLINE"


def _take_options_from_the_config() -> None:
    """Replace ``**flags`` in the command's signature by one option per field of TrainConfig."""
    types = get_type_hints(TrainConfig)
    parameters = [p for p in inspect.signature(train, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for item in dataclasses.fields(TrainConfig):
        meta = item.metadata
        flag = typer.Option(
            item.default,
            "--" + item.name.replace("_", "-"),
            help=_help(meta),
            rich_help_panel=meta["panel"],
            metavar="NAME" if meta["choices"] else None,
            show_default=item.default != "",
        )
        parameters.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=flag, annotation=types[item.name])
        )
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}


def _help(meta: Mapping[str, Any]) -> str:
    choices = ", ".join(meta["choices"])
    return f"{meta['help']} [cyan]{choices}[/]" if choices else meta["help"]


_take_options_from_the_config()
