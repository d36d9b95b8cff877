"""Faults of the other lists that a minute of the fuzz alone has to find, knowing nothing of them."""

from tests.faults import aggregate_prototypes, enqueue, losses, memory
from tests.faults.fault import Fault

T_FUZZ = "tests/fuzz/test_fuzz.py::test_no_rule_is_broken"
WITHIN = {
    "operators": [
        (aggregate_prototypes, "gradient ignores the weight"),
        (enqueue, "lru prefers the youngest"),
    ],
    "memory": [(memory, "doppelganger of itself")],
    "losses": [
        (losses, "fresh rows stay in the memory too"),
        (losses, "momentum survives a change of identity"),
    ],
}


def _found_by_the_fuzz(module: object, name: str, group: str) -> Fault:
    (fault,) = (fault for fault in module.FAULTS if fault.name == name and not fault.in_triton)  # type: ignore[attr-defined]
    return fault._replace(name=f"fuzz: {name}", tests=f"{T_FUZZ}[{group}]")


FAULTS = [_found_by_the_fuzz(module, name, group) for group, planted in WITHIN.items() for module, name in planted]
