"""Tables of methods, described in TOML: what is asked, what all methods share, and what each of them does otherwise.

    title = "Refresh ratio"
    question = "How much of the new prototype when an identity returns?"
    seeds = [0, 1, 2]

    base = "hangul"

    [shared]
    share = 0.1

    [methods."refresh 0.2"]
    refresh_ratio = 0.2

    [methods."replaced"]
    refresh_ratio = 1.0

What tables share stands in a file of its own, their ``base``: one of the package's, or a path. Options that suit one
head (``memory``, ``full``, ``sampled``) stand in ``[heads.NAME]``; what the same file says of all comes before them.
``x`` and ``line`` of a method place it in a plot of lines; a table without them has a dot per method.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protomem_kernels.experiments.trial import Trial, trial_from, what_is_wrong
from protomem_kernels.training.config import read_toml
from protomem_kernels.training.errors import RunError

DEFAULT_HEAD = Trial.model_fields["head"].default
QUICK = "-quick"  # ends the name of a table in small, whose files are its own
MAIN = "tar_at_far_1e-3"  # the figure of a plot, unless a table says otherwise


class Contents(BaseModel):
    """What a file says.

    ``shared`` and ``quick`` hold keys of trials, ``heads`` those by the name of a head, and ``methods`` those and two
    more by the name of a method.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: str = ""
    title: str = ""
    question: str = ""
    claim: str = ""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2]
    figure: str = MAIN
    x_label: str = ""
    x_log: bool = False
    ages: bool = False
    shared: dict[str, Any] = {}
    heads: dict[str, dict[str, Any]] = {}
    quick: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}


class Place(BaseModel):
    """Where a method stands in a plot of lines, if it does."""

    model_config = ConfigDict(frozen=True)

    x: float | None = None
    line: str = ""


class Method(NamedTuple):
    """One row of a table.

    Attributes:
        name: of the method.
        trial: what it does.
        place: in a plot of lines.
    """

    name: str
    trial: Trial
    place: Place


class MethodTable(NamedTuple):
    """A table of methods over seeds.

    Attributes:
        name: of its files.
        contents: what its file says of it.
        seeds: of every method.
        methods: by name, in the order of the rows.
    """

    name: str
    contents: Contents
    seeds: list[int]
    methods: dict[str, Method]

    @property
    def title(self) -> str:
        """What it is called."""
        return self.contents.title or self.name

    @property
    def trials(self) -> list[tuple[Method, int]]:
        """Every method with every seed; all methods once before any comes again."""
        return [(method, seed) for seed in self.seeds for method in self.methods.values()]


def shipped(folder: str = "tables") -> list[str]:
    """Return the names of the tables (or ``bases``) that come with the package."""
    return sorted(Path(entry.name).stem for entry in (resources.files(__package__) / folder).iterdir())


def read_table(name: str, *, quick: bool = False) -> MethodTable:
    """Return a table that comes with the package by its name, or one's own by the path of its file.

    Args:
        name: one of :func:`shipped`, or a path that ends with .toml.
        quick: a small form of it: one seed, and what the file says under ``quick`` for all methods.

    Raises:
        RunError: there is no such table, or it is not one.
    """
    path = _path(name, "tables")
    return table_from(read_toml(path), f"{path.stem}{QUICK if quick else ''}", quick=quick)


def _path(name: str, folder: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    if name not in shipped(folder):
        known = ", ".join(shipped(folder))
        raise RunError(f"there is no table {name!r} in {folder}; there are {known}, and paths that end with .toml")
    return Path(str(resources.files(__package__) / folder / f"{name}.toml"))


def table_from(values: Mapping[str, Any], name: str, *, quick: bool = False) -> MethodTable:
    """Return the table of the contents of a file.

    Raises:
        RunError: a key or a value that it does not take.
    """
    contents = _checked(Contents, values, name)
    if not contents.methods or len(set(contents.seeds)) < len(contents.seeds):
        raise RunError(f"{name}: methods must hold at least one, and seeds each but once, got {contents.seeds}")
    base = _checked(Contents, read_toml(_path(contents.base, "bases")), contents.base) if contents.base else Contents()
    small = base.quick | contents.quick if quick else {}
    methods = {}
    for key, own in contents.methods.items():
        where = f"{name}, {key}"
        place = _checked(Place, {word: value for word, value in own.items() if word in Place.model_fields}, where)
        differs = {word: value for word, value in own.items() if word not in Place.model_fields}
        head = (base.shared | contents.shared | differs).get("head", DEFAULT_HEAD)
        shared = base.shared | base.heads.get(head, {}) | contents.shared | contents.heads.get(head, {})
        methods[key] = Method(key, trial_from(shared | differs | small, where), place)
    return MethodTable(name, contents, contents.seeds[:1] if quick else contents.seeds, methods)


def _checked(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        raise RunError(f"{where}: {what_is_wrong(error)}") from error
