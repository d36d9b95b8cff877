"""Faults in ``quality``."""

from tests.faults.fault import Fault

T_QUALITY = "tests/test_quality.py"

FAULTS = [
    Fault(
        "own image among the others",
        "quality.py",
        "unit_embeddings(same @ x - x)",
        "unit_embeddings(same @ x)",
        T_QUALITY,
    ),
]
