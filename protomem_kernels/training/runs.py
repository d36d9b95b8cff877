"""Run folders: ``runs/<name>/`` holds one run's configuration, checkpoint, events, figures and pictures."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

from protomem_kernels.training.config import TrainConfig, config_from, read_toml
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.files import written_whole

CONFIG, CHECKPOINT, ENCODER, METRICS = "config.toml", "checkpoint.pt", "encoder.pt", "metrics.json"
ROC, PAIRS = "roc.png", "hardest_pairs.png"
START = ".torchrun"  # which start of torchrun writes the folder

# What a resumed run may do otherwise without becoming another experiment. A different device, compiler or number of
# threads rounds differently, so the figures then agree to rounding only.
FREE_ON_RESUME = frozenset(
    {"name", "runs_dir", "device", "threads", "timeout", "workers", "checkpoint_every", "compile", "strict", "patience"}
)


def start_run(config: TrainConfig) -> Path:
    """Make a fresh, empty folder: ``<name>`` or the first free ``<name>-2``, ``<name>-3`` ...

    No earlier run is ever touched.
    """
    name = config.run_name
    if not name or Path(name).name != name or name == "..":
        raise RunError(f"name must be a plain folder name, got {name!r}")
    try:
        Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = Path(config.runs_dir) / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            break
    except OSError as error:
        raise RunError(f"cannot write to the runs folder {config.runs_dir}: {error.strerror or error}") from error
    return folder


def note_start(folder: Path, start: str | None) -> None:
    """Note in a run's folder which start of torchrun writes it."""
    if start is not None:
        with written_whole(folder / START) as temporary:
            temporary.write_text(start, encoding="utf-8")


def run_of_start(config: TrainConfig, start: str | None) -> Path | None:
    """Return the folder of the newest run that this start of torchrun has made, if it has made one."""
    noted = [file for file in Path(config.runs_dir).glob(f"*/{START}") if file.read_text(encoding="utf-8") == start]
    return max(noted, key=lambda file: file.stat().st_mtime_ns).parent if noted else None


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write ``config.toml``, from which the run can be repeated with ``--config`` or resumed."""
    with written_whole(folder / CONFIG) as temporary:
        temporary.write_text(f"# protomem train --config {folder / CONFIG}\n{config.as_toml()}", encoding="utf-8")


def extend_run(folder: Path, steps: int) -> None:
    """Note in ``config.toml`` that a run goes on to more steps than it was started for."""
    saved = config_from(read_toml(folder / CONFIG), str(folder / CONFIG))
    if saved.steps != steps:
        write_config(folder, config_from({**saved.as_dict(), "steps": steps}, str(folder / CONFIG)))


def way_on(folder: Path) -> str:
    """Return the command that goes on with the run in a folder."""
    return shlex.join(["protomem", "train", "--resume", "--name", folder.name, "--runs-dir", str(folder.parent)])


def reopen_run(config: TrainConfig, given: dict[str, Any]) -> tuple[Path, TrainConfig]:
    """Return the newest run of the configuration's name, and its own configuration.

    Args:
        config: says which run (``runs_dir``, ``run_name``).
        given: the values that the user wrote, in a TOML file or as flags; one that contradicts the run is an error.
            More ``steps`` than the run was started for extend it.

    """
    name = config.run_name
    mine = re.compile(re.escape(name) + r"(-\d+)?")
    started = [file for file in Path(config.runs_dir).glob(f"*/{CONFIG}") if mine.fullmatch(file.parent.name)]
    if not started:
        raise RunError(f"nothing to resume: there is no run {name!r} in {config.runs_dir}")
    file = max(started, key=lambda file: (file.stat().st_mtime_ns, file))
    folder, saved = file.parent, config_from(read_toml(file), str(file)).as_dict()
    asked = config.as_dict()
    extended = {"steps": asked["steps"]} if "steps" in given and asked["steps"] > saved["steps"] else {}
    for key in sorted(set(given) - FREE_ON_RESUME - set(extended)):
        if asked[key] != saved[key]:
            raise RunError(
                f"{folder} was started with {key} = {saved[key]!r} and cannot go on with {asked[key]!r}; "
                "leave the option out, or start a new run without --resume"
            )
    changed = {key: asked[key] for key in FREE_ON_RESUME & set(given) - {"name", "runs_dir"}}
    return folder, config_from({**saved, **changed, **extended}, str(file))
