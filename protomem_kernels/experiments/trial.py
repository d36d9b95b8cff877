"""One trial of a table: a method, described down to the last number.

A trial is what ``protomem train`` calls a configuration, as far as that says how an encoder learns, and what only an
experiment has beside it: the head, how many prototypes it keeps, which images it sees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protomem_kernels.data import glyphs, synthetic_faces
from protomem_kernels.training.config import MEMORY, MODEL, SCHEDULE, TrainConfig, schema
from protomem_kernels.training.errors import RunError

HANGUL, SYNTHETIC = "hangul", "faces"
# Of a run's options those that say how it learns; not those of a run that goes on, or that verifies on the way.
_OF_A_RUN = {"capacity", "pretrained", "backbone_learning_rate", "compile", "precision", "checkpoint_every"}
_OF_A_RUN |= {"validate_every", "patience"}
LEARNING = tuple(key for key, field in schema().items() if field["panel"] in (MODEL, MEMORY, SCHEDULE))
LEARNING = ("augmentation", *(key for key in LEARNING if key not in _OF_A_RUN))


class Trial(BaseModel):
    """What decides a trial's figures, its seed apart. ``train`` holds how it learns, as ``protomem train`` has it.

    Raises:
        RunError: from :func:`trial_from`, a key or a value that is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = Field(
        "orl", description="orl, hangul, faces (synthetic), simulated (noise), or what train takes as --data"
    )
    fonts: str = Field("", description="folder of hangul's fonts; of five Debian packages where nobody says")
    image_size: tuple[int, int] = Field((32, 32), description="height and width that the encoder sees")
    identities: int = Field(0, ge=0, description="identities that train; 0: all but those below")
    validation_identities: int = Field(1, ge=1, description="identities on which options are chosen")
    test_identities: int = Field(10, ge=2, description="identities that the table is about")
    images_tested: int = Field(0, ge=0, description="images of each of the latter; 0: all")
    measured_on: Literal["test", "validation"] = Field("test", description="which of the latter two give the figures")
    degraded: float = Field(0.0, ge=0, le=1, description="share of the training images that are damaged")

    severity: tuple[float, float] = Field((0.3, 0.9), description="of the damage, from and to")

    head: Literal["memory", "full", "sampled"] = Field(
        "memory", description="prototype memory; class weights, all of them or a sample in each step"
    )
    share: float = Field(1.0, gt=0, le=1, description="prototypes kept, or class weights in use, per identity")
    head_learning_rate: float = Field(0.01, ge=0, description="peak learning rate of class weights")
    weights: Literal["none", "true"] = Field("none", description="true: images weigh what their true quality is")
    sampler: Literal["random", "doppelgangers"] = Field("random", description="which identities share a batch")

    train: TrainConfig = Field(default_factory=TrainConfig)

    @property
    def slots(self) -> int:
        """Prototypes kept, or class weights in a step; ``identities`` has to be settled."""
        return max(round(self.share * self.identities), min(self.train.identities_per_batch, self.identities))

    def settings(self) -> dict[str, Any]:
        """Return all that decides the figures, by plain names and values; what is empty is left out."""
        values = self.model_dump(mode="json", exclude={"train"})
        values |= {key: value for key, value in self.train.as_dict().items() if key in LEARNING}
        drawn = {HANGUL: glyphs.DRAWING, SYNTHETIC: synthetic_faces.DRAWING}.get(self.data, "")
        return {key: value for key, value in {**values, "drawing": drawn}.items() if value != ""}

    def digest(self) -> str:
        """Return eight digits that change with any of the settings.

        >>> Trial().digest() == Trial(share=0.5).digest()
        False
        """
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


OWN = tuple(name for name in Trial.model_fields if name != "train")


def trial_from(values: Mapping[str, Any], origin: str) -> Trial:
    """Return the trial of flat keys: those of an experiment, and those of ``protomem train`` that say how it learns.

    Args:
        values: the keys and their values; the defaults of both hold for the others.
        origin: who says so, for the errors.

    Raises:
        RunError: an unknown key, or a value that it does not take.

    >>> trial_from({"share": 0.1, "refresh_ratio": 0.5}, "here").train.refresh_ratio
    0.5
    """
    unknown = sorted(set(values) - set(OWN) - set(LEARNING))
    if unknown:
        raise RunError(f"{origin}: unknown key {', '.join(unknown)}; known are {', '.join((*OWN, *LEARNING))}")
    try:
        train = TrainConfig(**{key: value for key, value in values.items() if key in LEARNING})
        return Trial(**{key: value for key, value in values.items() if key in OWN}, train=train)
    except RunError as error:
        raise RunError(f"{origin}: {error}") from error
    except ValidationError as error:
        raise RunError(f"{origin}: {what_is_wrong(error)}") from error


def what_is_wrong(error: ValidationError) -> str:
    """Return the first thing that is wrong: where, what was expected, what came."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}"
    return f"{where}: {first['msg']}, got {first['input']!r:.80}"
