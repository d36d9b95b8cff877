"""One frozen description of a training run: the options of ``protomem train`` and the keys of its TOML file.

A field is written once, here, with its default, its help and what it accepts; the command line, the TOML reader and the
check of both are read off the fields.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

from protomem_kernels.training.errors import RunError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value: TypeAlias = str | int | float | tuple[int, int]

RUN, DATA, MODEL, MEMORY, SCHEDULE = "Run", "Data", "Encoder", "Prototype memory and loss", "Schedule"


def option(
    default: Value,
    help: str,
    panel: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Return a dataclass field that also carries what the command line and the checks need to know of it.

    Args:
        default: the value where neither a flag nor the TOML file gives one.
        help: one sentence for ``--help``.
        panel: the heading under which ``--help`` shows it.
        choices: the accepted strings; empty: any.
        low: the smallest accepted number (of each part of a pair), inclusive.
        high: the largest accepted number, inclusive.

    """
    return field(default=default, metadata={"help": help, "panel": panel, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; two runs of one configuration on one machine give the same figures."""

    name: str = option("", "Name of the run; a number is added if it is taken. [dim]Default: the data's name.[/]", RUN)
    runs_dir: str = option("runs", "Folder that holds one folder per run.", RUN)
    seed: int = option(0, "Seed of the initialisation, batches and augmentation.", RUN, low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ... (auto: a GPU where there is one).", RUN)
    threads: int = option(0, "CPU threads; 0: as many as PyTorch sees fit.", RUN, low=0, high=1024)

    data: str = option("", "Folder with one sub-folder of images per identity. [dim]Default: ORL faces.[/]", DATA)
    fold: int = option(3, "Which quarter of the identities is held out for verification.", DATA, low=0, high=3)
    inner_fold: int = option(
        -1,
        "To choose options: hold out this third (0-2) of the fold's training identities instead, and leave the fold "
        "itself alone; -1: off.",
        DATA,
        low=-1,
        high=2,
    )
    image_size: tuple[int, int] = option((56, 46), "Height and width that the encoder sees.", DATA, low=8, high=1024)
    augmentation: float = option(1.0, "Strength of the augmentation; 0: none.", DATA, low=0.0, high=4.0)
    workers: int = option(0, "Processes that read images (folders only).", DATA, low=0, high=256)

    encoder: str = option(
        "residual", "residual (small CNN), residual-pooled (for images that are not aligned), or a timm model.", MODEL
    )
    width: int = option(16, "Channels of the residual CNN's first stage.", MODEL, low=1, high=1024)
    embedding_dim: int = option(128, "Size of an embedding.", MODEL, low=2, high=8192)
    dropout: float = option(0.4, "Dropout before the last layer of the residual CNN.", MODEL, low=0.0, high=0.9)

    capacity: int = option(
        0, "Slots of the prototype memory; 0: one per training identity, 100,000 at most.", MEMORY, low=0
    )
    refresh_ratio: float = option(
        0.2, "Weight of the new prototype when a slot is refreshed.", MEMORY, low=0.0, high=1.0
    )
    policy: str = option("fifo", "Who leaves a full memory.", MEMORY, choices=("fifo", "lru"))
    prototype_gradient: str = option(
        "none", "What of the memory the gradient reaches.", MEMORY, choices=("none", "fresh", "memory")
    )
    quality: str = option(
        "none", "Quality estimate that weighs an identity's images.", MEMORY, choices=("none", "norm", "center")
    )
    margin: str = option("arcface", "Margin on the target cosine.", MEMORY, choices=("arcface", "cosface", "adaface"))
    margin_size: float = option(0.3, "Size of the margin (arcface: radians).", MEMORY, low=0.0, high=1.5)
    scale: float = option(24.0, "Scale of the cosines in the softmax.", MEMORY, low=1e-3, high=1e4)
    mining: str = option(
        "none",
        "Treatment of hard negatives.",
        MEMORY,
        choices=("none", "mv-softmax", "curricular", "hardest-negatives", "noisy-negatives", "hard-samples"),
    )

    steps: int = option(800, "Training steps.", SCHEDULE, low=1)
    identities_per_batch: int = option(16, "Identities in a batch.", SCHEDULE, low=2)
    images_per_identity: int = option(4, "Images of each of them.", SCHEDULE, low=1)
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW (warm-up, then cosine).", SCHEDULE, low=0.0)
    weight_decay: float = option(0.05, "Decoupled weight decay of the weight matrices.", SCHEDULE, low=0.0)
    averaging: float = option(
        0.99, "Decay of the weights' moving average, which is verified.", SCHEDULE, low=0.0, high=1.0
    )
    checkpoint_every: int = option(100, "Steps between checkpoints.", SCHEDULE, low=1)

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _checked(item.name, getattr(self, item.name), types[item.name], item.metadata)
            object.__setattr__(self, item.name, value)

    @property
    def run_name(self) -> str:
        """The run's name before a number is added."""
        return self.name or (Path(self.data).resolve().name if self.data else "orl")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that TOML, JSON and a checkpoint can hold (pairs as lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def as_toml(self) -> str:
        """Return the TOML file that ``--config`` reads back into the same configuration."""
        import json  # a JSON string, number or list of integers is also a TOML one

        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in self.as_dict().items())


def config_from(values: Mapping[str, Any], origin: str) -> TrainConfig:
    """Return the configuration of a mapping; ``origin`` names where it came from in the error for an unknown key."""
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RunError(f"{origin}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    return TrainConfig(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file as ``config_from`` takes them."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid TOML: {error}") from error


def _checked(name: str, value: Any, expected: Any, meta: Mapping[str, Any]) -> Value:
    """Return ``value`` as the field's type, or raise RunError naming the field, what was expected and what came."""
    if expected == tuple[int, int]:
        if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(type(part) is int for part in value)):
            raise RunError(f"{name} must be two whole numbers, got {value!r}")
        value, numbers = tuple(value), list(value)
    elif expected is float:
        if type(value) not in (int, float):
            raise RunError(f"{name} must be a number, got {value!r}")
        value = float(value)
        numbers = [value]
    elif type(value) is not expected:
        raise RunError(f"{name} must be {'a whole number' if expected is int else 'a string'}, got {value!r}")
    else:
        numbers = [value] if expected is int else []
    if meta["choices"] and value not in meta["choices"]:
        raise RunError(f"{name} must be one of {', '.join(meta['choices'])}, got {value!r}")
    low, high = meta["low"], meta["high"]
    if not all(math.isfinite(n) and (low is None or low <= n) and (high is None or n <= high) for n in numbers):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RunError(f"{name} must be {bounds}, got {value!r}")
    return value  # type: ignore[no-any-return]
