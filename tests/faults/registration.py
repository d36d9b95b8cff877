"""Faults in how operators are registered and backends chosen."""

from tests.faults.fault import Fault

T_LOSS = "tests/ops/test_margin_softmax_loss.py"
T_REGISTRATION = "tests/ops/test_registration.py"

FAULTS = [
    Fault(
        "autocast reaches the products",
        "ops/register.py",
        "with without_autocast(tensors[0]):",
        "if True:",
        T_LOSS,
    ),
    Fault(
        "a backend that refuses serves all the same",
        "backends/choice.py",
        "kernel is not None and backend.refuses(operator, tensors) is None",
        "kernel is not None",
        f"{T_REGISTRATION}::test_another_backend_plugs_in_and_may_refuse",
    ),
]
