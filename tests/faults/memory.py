"""Faults in ``memory``."""

from tests.faults.fault import Fault

T_MEMORY = "tests/test_memory.py"

FAULTS = [
    Fault("doppelganger of itself", "memory.py", "self.prototypes, slots, k=k", "self.prototypes, None, k=k", T_MEMORY),
    Fault("reset keeps the identities", "memory.py", "self.identities.fill_(-1)", "pass", T_MEMORY),
]
