"""One frozen description of a training run: the options of ``protomem train`` and the keys of its TOML file.

A field is written once, here, with its default, its help and what it accepts. pydantic checks it; the command line and
the words of an error are read off the model's schema.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from protomem_kernels.training import parts
from protomem_kernels.training.errors import RunError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Side: TypeAlias = Annotated[int, Field(ge=8, le=1024)]
# A margin, mining rule or quality estimator of the library as text, e.g. "arcface:m=0.3".
Margin: TypeAlias = Annotated[str, AfterValidator(partial(parts.normal, "margin"))]
Mining: TypeAlias = Annotated[str, AfterValidator(partial(parts.normal, "mining"))]
Quality: TypeAlias = Annotated[str, AfterValidator(partial(parts.normal, "quality"))]

NOBODY = "none"  # verifies
RUN, DATA, MODEL, MEMORY, SCHEDULE = "Run", "Data", "Encoder", "Prototype memory and loss", "Schedule"


def option(
    default: Any,
    help: str,
    panel: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Return a pydantic field that also carries what the command line shows of it.

    Its annotation says what it accepts: a ``Literal`` lists the choices, a pair has the limits of its parts.

    Args:
        default: the value where neither a flag nor the TOML file gives one.
        help: one sentence for ``--help``.
        panel: the heading under which ``--help`` shows it.
        low: the smallest accepted number, inclusive.
        high: the largest accepted number, inclusive.
        choices: what ``--help`` lists beside a field that is no ``Literal``.

    """
    return Field(default, description=help, ge=low, le=high, json_schema_extra={"panel": panel, "choices": [*choices]})


class TrainConfig(BaseModel):
    """Everything that decides a run; two runs of one configuration on one machine give the same figures.

    Raises:
        RunError: a value is none that its field accepts.

    >>> TrainConfig(steps=400, name="mine").run_name
    'mine'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = option("", "Name of the run; a number is added if it is taken. [dim]Default: the data's name.[/]", RUN)
    runs_dir: str = option("runs", "Folder that holds one folder per run.", RUN)
    seed: int = option(
        0, "Seed of who is held out, the initialisation, batches and augmentation.", RUN, low=0, high=2**31 - 1
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ... (auto: a GPU where there is one).", RUN)
    threads: int = option(0, "CPU threads; 0: as many as PyTorch sees fit.", RUN, low=0, high=1024)
    timeout: int = option(
        600, "Seconds that a process of torchrun's waits for the others before it gives up.", RUN, low=1, high=86400
    )

    data: str = option(
        "",
        "Folder with one sub-folder of images per identity; .rec (insightface), .tar (webdataset), .parquet or a saved "
        "table of the library datasets. [dim]Default: ORL faces.[/]",
        DATA,
    )
    validation: str = option(
        "",
        "What verifies: data of its own, as --data takes it, insightface's .bin of pairs, or none, to train on "
        "everybody. [dim]Default: a quarter of the identities.[/]",
        DATA,
    )
    held_out: str = option("", "File with the names of the identities that verify, one a line.", DATA)
    pairs: str = option(
        "",
        "File with the pairs that verify, of images that do not train: first second 1 (the same) or 0, or as LFW lists "
        "them. [dim]Default: all pairs.[/]",
        DATA,
    )
    image_column: str = option("", "Column of a table that holds the images. [dim]Default: found.[/]", DATA)
    label_column: str = option(
        "", "Column of a table, or extension in tar files (cls), that names the identity. [dim]Default: found.[/]", DATA
    )
    fold: int = option(
        3,
        "Which quarter of the identities is held out for verification (of folders: drawn by --seed).",
        DATA,
        low=0,
        high=3,
    )
    inner_fold: int = option(
        -1,
        "To choose options: hold out this third (0-2) of the fold's training identities instead, and leave the fold "
        "itself alone; -1: off.",
        DATA,
        low=-1,
        high=2,
    )
    image_size: tuple[Side, Side] = option(
        (56, 46),
        "Height and width that the encoder sees; images are cropped to that aspect ratio. [dim]Of one's own data, the "
        "default follows the images, up to 112.[/]",
        DATA,
    )
    strict: bool = option(False, "Refuse data of which anything would be left out.", DATA)
    max_megapixels: float = option(
        100.0, "Largest image that is read, in millions of pixels.", DATA, low=0.01, high=1e5
    )
    augmentation: float = option(1.0, "Strength of the augmentation; 0: none.", DATA, low=0.0, high=4.0)
    workers: int = option(0, "Processes that read images (folders only).", DATA, low=0, high=256)

    encoder: str = option(
        "residual", "residual (small CNN), residual-pooled (for images that are not aligned), or a timm model.", MODEL
    )
    pretrained: bool = option(False, "Begin with timm's pretrained weights (timm models only).", MODEL)
    backbone_learning_rate: float | None = option(
        None,
        "Peak learning rate of a timm model's own weights, for fine-tuning. [dim]Default: --learning-rate.[/]",
        MODEL,
        low=0.0,
    )
    width: int = option(16, "Channels of the residual CNN's first stage.", MODEL, low=1, high=1024)
    embedding_dim: int = option(128, "Size of an embedding.", MODEL, low=2, high=8192)
    dropout: float = option(0.4, "Dropout before the last layer of the residual CNN.", MODEL, low=0.0, high=0.9)

    capacity: int = option(
        0, "Slots of the prototype memory; 0: one per training identity, 100,000 at most.", MEMORY, low=0
    )
    refresh_ratio: float = option(
        0.5, "Weight of the new prototype when a slot is refreshed.", MEMORY, low=0.0, high=1.0
    )
    policy: Literal["fifo", "lru"] = option("fifo", "Who leaves a full memory.", MEMORY)
    prototype_gradient: Literal["none", "fresh", "memory"] = option(
        "none", "What of the memory the gradient reaches.", MEMORY
    )
    quality: Quality = option(
        "none",
        "Quality estimate that weighs an identity's images, e.g. softmax:base=norm.",
        MEMORY,
        choices=parts.choices("quality"),
    )
    margin: Margin = option(
        "arcface:m=0.3",
        "Margin on the target cosine, maybe with its parameters, e.g. magface:u-m=0.7 (an unknown one lists them).",
        MEMORY,
        choices=parts.choices("margin"),
    )
    scale: float = option(24.0, "Scale of the cosines in the softmax.", MEMORY, low=1e-3, high=1e4)
    mining: Mining = option(
        "none",
        "Treatment of hard negatives, e.g. mv-softmax:t=0.3.",
        MEMORY,
        choices=parts.choices("mining"),
    )

    steps: int = option(800, "Training steps.", SCHEDULE, low=1)
    identities_per_batch: int = option(16, "Identities in a batch.", SCHEDULE, low=2)
    images_per_identity: int = option(4, "Images of each of them.", SCHEDULE, low=1)
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW (warm-up, then cosine).", SCHEDULE, low=0.0)
    weight_decay: float = option(0.05, "Decoupled weight decay of the weight matrices.", SCHEDULE, low=0.0)
    averaging: float = option(
        0.99, "Decay of the weights' moving average, which is verified.", SCHEDULE, low=0.0, high=1.0
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "In what the encoder computes (auto: half precision on a GPU).", SCHEDULE
    )
    compile: bool = option(False, "Compile the encoder with torch.compile (needs a C++ compiler).", SCHEDULE)
    checkpoint_every: int = option(100, "Steps between checkpoints.", SCHEDULE, low=1)
    validate_every: int = option(
        0, "Steps between verifications; the best encoder is kept. 0: the last one is verified.", SCHEDULE, low=0
    )
    patience: int = option(
        0,
        "Verifications in a row no better than the best that end the run; 0: any number.",
        SCHEDULE,
        low=0,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _told(cls, values: Any, handler: ModelWrapValidatorHandler[TrainConfig]) -> TrainConfig:
        """Take lists for pairs, as TOML and JSON have them, and tell what is wrong in our own words."""
        taken = values
        if isinstance(values, Mapping):
            taken = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            config = handler(taken)
        except ValidationError as error:
            raise RunError(_what_is_wrong(error, values)) from error
        for name, value in config:
            if isinstance(value, str) and not value.isascii() and value.encode("utf-8", "ignore").decode() != value:
                raise RunError(f"{name} must be a string that UTF-8 can hold, as a TOML file does, got {value!r}")
        config._check_what_verifies()
        return config

    def _check_what_verifies(self) -> None:
        if self.held_out and self.validation:
            raise RunError(f"held_out must be left out where validation is {self.validation!r}, got {self.held_out!r}")
        if self.pairs and (self.validation == NOBODY or self.validation_is_pairs):
            raise RunError(f"pairs must be left out where validation is {self.validation!r}, got {self.pairs!r}")
        if self.validate_every and self.validation == NOBODY:
            raise RunError(f"validate_every must be 0 where nothing verifies, got {self.validate_every}")
        if self.patience and not self.validate_every:
            raise RunError(f"patience must be 0 without validate_every, got {self.patience}")

    @property
    def validation_is_pairs(self) -> bool:
        """Whether a ``.bin`` verifies, which is pairs of images of nobody knows whom."""
        return Path(self.validation).suffix.lower() == ".bin"

    @property
    def run_name(self) -> str:
        """The run's name before a number is added."""
        return self.name or (Path(self.data).resolve().name if self.data else "orl")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON and a checkpoint can hold (pairs as lists)."""
        return self.model_dump(mode="json")

    def as_toml(self) -> str:
        """Return the TOML file that ``--config`` reads back into the same configuration."""
        return tomli_w.dumps({key: value for key, value in self.as_dict().items() if value is not None})


@cache
def schema() -> dict[str, dict[str, Any]]:
    """Return of each field the JSON schema of what it accepts, with ``description``, ``default`` and ``panel``.

    Of a field that may be None it is that of its other values.
    """
    properties: dict[str, dict[str, Any]] = TrainConfig.model_json_schema()["properties"]
    return {name: accepted.get("anyOf", [{}])[0] | accepted for name, accepted in properties.items()}


def limits(name: str) -> tuple[float | None, float | None]:
    """Return the smallest and the largest number that a field (each part of a pair) accepts; None: no limit."""
    accepted = schema()[name]
    number = accepted.get("prefixItems", [accepted])[0]
    return number.get("minimum"), number.get("maximum")


def config_from(values: Mapping[str, Any], origin: str) -> TrainConfig:
    """Return the configuration of a mapping; ``origin`` names where it came from in the error for an unknown key."""
    known = TrainConfig.model_fields
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


KINDS = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "two whole numbers",
}


def _what_is_wrong(error: ValidationError, values: Any) -> str:
    """Name the first field that is wrong, what was expected and what came."""
    errors = error.errors(include_url=False)
    out_of_range = ("greater_than_equal", "less_than_equal", "finite_number")
    first = min(
        (found for found in errors if found["loc"][:1] == errors[0]["loc"][:1]),
        key=lambda found: found["type"] in out_of_range,  # of a pair with one part: that, before the part's size
    )
    if not first["loc"] or first["loc"][0] not in schema():
        return f"{'.'.join(map(str, first['loc'])) or 'the configuration'}: {first['msg']}"
    name = str(first["loc"][0])
    low, high = limits(name)
    if first["type"] == "literal_error":
        expected = f"one of {', '.join(schema()[name]['enum'])}"
    elif first["type"] not in out_of_range:
        expected = KINDS[schema()[name]["type"]]
    elif high is None:
        expected = f"at least {low}"
    else:
        expected = f"between {low} and {high}"
    return f"{name} must be {expected}, got {values[name]!r}"
