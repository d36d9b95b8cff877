"""The margins, mining rules and quality estimators of the library by name, with their parameters, as one line of text.

``arcface`` is ``ArcFace()``, ``magface:l-a=5,u-m=0.7`` is ``MagFace(l_a=5.0, u_m=0.7)``, and what belongs to a part of
a part has a dot: ``softmax:temperature=0.2,base=norm,base.power=2``. Names and parameters are read off the public face
of the package, so that what is new there can be had here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

import protomem_kernels
from protomem_kernels import quality
from protomem_kernels.margins import Margin
from protomem_kernels.mining import MiningRule
from protomem_kernels.training.errors import RunError

KINDS: dict[str, Callable[[type], bool]] = {
    "margin": lambda made: issubclass(made, Margin),
    "mining": lambda made: issubclass(made, MiningRule),
    "quality": lambda made: made.__module__ == quality.__name__,
}
VALUES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
NONE = "none"


@cache
def named(kind: str) -> dict[str, Any]:
    """Return the public classes of a kind ("margin", "mining" or "quality") by their names in a configuration.

    A name is the class's own in kebab case, without the kind's at its end.

    >>> named("quality")["norm"].__name__
    'NormQuality'
    """
    public = (getattr(protomem_kernels, name) for name in protomem_kernels.__all__)
    classes = (made for made in public if isinstance(made, type) and KINDS[kind](made))
    return {_name(made, kind): made for made in classes if _can_be_told(made)}


def choices(kind: str) -> list[str]:
    """Return the names of a kind, ``none`` first."""
    return [NONE, *named(kind)]


def build(kind: str, text: str, **of_the_run: Any) -> Any:
    """Return what ``text`` describes, or None for ``none``.

    Args:
        kind: "margin", "mining" or "quality".
        text: a name, then maybe a colon and ``parameter=value`` pairs with commas between.
        of_the_run: values that constructors ask for and a configuration has elsewhere (``embedding_dim``).

    Raises:
        RunError: there is no such name or parameter, or it does not take the value.

    >>> build("margin", "magface:l-a=5").l_a
    5.0
    """
    name, options = _read(kind, text)
    if name == NONE:
        return None
    made = named(kind)[name]
    for key, option in options.items():
        if _inner(made, key):
            options[key] = build(kind, option, **of_the_run)
    given = {key: value for key, value in of_the_run.items() if key in inspect.signature(made).parameters}
    try:
        return made(**given, **options)
    except (TypeError, ValueError) as error:
        raise RunError(f"{kind} {name}: {error}") from error


def normal(kind: str, text: str) -> str:
    """Return ``text`` in the one form that all its spellings share, or raise RunError as ``build`` does.

    >>> normal("margin", "elasticface:std=.1, m=0.50")
    'elasticface:std=0.1'
    """
    build(kind, text, embedding_dim=1)
    settings = _settings(kind, text)
    name = text.partition(":")[0].strip()
    return f"{name}:{','.join(settings)}" if settings else name


def _settings(kind: str, text: str) -> list[str]:
    """Return the parameters that differ from their defaults, in the constructor's order, as ``parameter=value``."""
    name, options = _read(kind, text)
    settings = []
    for key, parameter in _parameters(kind, name).items() if name != NONE else ():
        if key not in options or options[key] == parameter.default:
            continue
        word = key.replace("_", "-")
        if _inner(named(kind)[name], key):
            settings.append(f"{word}={options[key].partition(':')[0]}")
            settings += [f"{word}.{setting}" for setting in _settings(kind, options[key])]
        else:
            settings.append(f"{word}={_said(options[key])}")
    return settings


def _read(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """Return the name in ``text`` and its parameters; a part of this part is text again."""
    name, _, rest = (word.strip() for word in text.partition(":"))
    if name not in choices(kind):
        raise RunError(f"{kind} must be one of {', '.join(choices(kind))}, got {name!r}")
    parameters = _parameters(kind, name) if name != NONE else {}
    options: dict[str, Any] = {}
    inner: dict[str, list[str]] = {}
    for setting in filter(None, rest.split(",")):
        word, equals, value = (piece.strip() for piece in setting.partition("="))
        key, dot, deeper = word.replace("-", "_").partition(".")
        if not equals or key not in parameters or (dot and not _inner(named(kind)[name], key)):
            known = ", ".join(f"{key.replace('_', '-')}{_default(p)}" for key, p in parameters.items()) or "none"
            raise RunError(f"{kind} {name}: its parameters are {known}; got {setting.strip()!r}")
        if dot:
            inner.setdefault(key, []).append(f"{deeper}={value}")
        else:
            options[key] = _value(f"{kind} {name}: {word}", parameters[key], value)
    for key, settings in inner.items():
        options[key] = f"{options.get(key, NONE)}:{','.join(settings)}"
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and options.get(key, NONE).partition(":")[0] == NONE:
            others = ", ".join(named(kind))
            raise RunError(f"{kind} {name} needs another one as its {key}, as in {name}:{key}=NAME, one of {others}")
    return name, options


def _parameters(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters that a text can give: plain values, and parts of the same kind."""
    made = named(kind)[name]
    found = inspect.signature(made, eval_str=True).parameters
    plain = {key: p for key, p in found.items() if p.annotation in VALUES or _inner(made, key)}
    return {key: p for key, p in plain.items() if p.default is not p.empty or _inner(made, key)}


def _can_be_told(made: type) -> bool:
    """Tell whether all that a class asks for can stand in a text; a tensor or a function cannot."""
    asked = inspect.signature(made, eval_str=True).parameters
    return all(p.default is not p.empty or p.annotation in VALUES or _inner(made, key) for key, p in asked.items())


def _inner(made: type, key: str) -> bool:
    """Tell whether a parameter is another estimator."""
    return bool(inspect.signature(made, eval_str=True).parameters[key].annotation == quality.QualityEstimator)


def _value(where: str, parameter: inspect.Parameter, text: str) -> Any:
    if parameter.annotation not in VALUES:
        return text
    try:
        return TypeAdapter(parameter.annotation).validate_python(text)
    except ValidationError as error:
        raise RunError(f"{where} must be {VALUES[parameter.annotation]}, got {text!r}") from error


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={_said(parameter.default)}"


def _name(made: type, kind: str) -> str:
    stem = re.sub(f"{kind.title()}$", "", made.__name__)
    kebab = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", stem).lower()
    return kebab.replace("-face", "face")  # arcface, as everybody writes it
