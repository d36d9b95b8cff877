"""Faults in ``mining``."""

from tests.faults.fault import Fault

T_MINING = "tests/test_mining.py"

FAULTS = [
    Fault(
        "CurricularFace's t not updated", "mining.py", "lambda: self._update(cosine, counts)", "lambda: None", T_MINING
    ),
    Fault(
        "easy samples kept",
        "mining.py",
        "argsort(descending=True, stable=True)",
        "argsort(descending=False, stable=True)",
        T_MINING,
    ),
]
