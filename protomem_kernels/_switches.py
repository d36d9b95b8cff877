"""The environment switches of this package and what each may be: a value that is none of these is an error.

All are looked at when the package is imported, so that a misspelt one is not taken for its default.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

ON_OR_OFF = ("0", "1")
SWITCHES: dict[str, tuple[str, ...]] = {
    "PROTOMEM_AUTOTUNE": ON_OR_OFF,
    "PROTOMEM_CPU_CAPABILITY": ("default", "avx2", "avx512"),
    "PROTOMEM_DEBUG": ON_OR_OFF,
    "PROTOMEM_DISABLE_COMPILED": ON_OR_OFF,
    "PROTOMEM_SELF_CHECK": ("0", "1", "fail"),
}


def value_of(name: str, allowed: Sequence[str] = (), note: str = "") -> str | None:
    """Return what a switch is set to, or None if it is not set or empty.

    Args:
        name: of the switch, one of ``SWITCHES``.
        allowed: what it may be here. Default: what it may be anywhere.
        note: for the error's message, why these.

    Raises:
        ValueError: it is something else; the message lists what it may be.
    """
    value = os.environ.get(name)
    if not value:
        return None
    allowed = allowed or SWITCHES[name]
    if value not in allowed:
        raise ValueError(f"the environment's {name} must be one of {', '.join(allowed)}{note}, got {value!r}")
    return value


def is_on(name: str) -> bool:
    """Say whether a switch that is on or off is on; off where it is not set."""
    return value_of(name) == "1"


for _name in SWITCHES:
    value_of(_name)
