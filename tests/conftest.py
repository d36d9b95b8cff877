"""Settings that hold for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import Phase, settings

# A mutant only has to fail: looking for the smallest failing example would take most of the time.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
if os.environ.get("PROTOMEM_MUTANT"):
    settings.load_profile("mutants")


def pytest_configure() -> None:
    """Make sure that ``make sanitize`` runs what it has built, and not the checkout's own package."""
    if "PROTOMEM_SANITIZED" not in os.environ:
        return
    from protomem_kernels import compiled

    folder, sanitized = Path(os.environ["PROTOMEM_SANITIZED"]), compiled.MODULE
    assert sanitized is not None, compiled.unavailable()
    assert folder in Path(sanitized.__file__).parents, f"{sanitized.__file__} is not in {folder}"
    assert "-fsanitize=address,undefined" in sanitized.flags, sanitized.flags


def pytest_report_header() -> str | None:
    if "PROTOMEM_SANITIZED" not in os.environ:
        return None
    from protomem_kernels import compiled

    return f"sanitized object: {compiled.MODULE.__file__}, runs {', '.join(compiled.MODULE.capabilities())}"
