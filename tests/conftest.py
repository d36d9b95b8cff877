"""Settings that hold for the whole suite."""

from __future__ import annotations

import os

from hypothesis import Phase, settings

# A mutant only has to fail: looking for the smallest failing example would take most of the time.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
if os.environ.get("PROTOMEM_MUTANT"):
    settings.load_profile("mutants")
