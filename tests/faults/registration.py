"""Faults in how operators are registered and backends chosen."""

from tests.faults.fault import Fault

T_LOSS = "tests/ops/test_margin_softmax_loss.py"
T_REGISTRATION = "tests/ops/test_registration.py"
T_VERSIONS = "tests/ops/test_versions.py"

FAULTS = [
    Fault(
        "autocast reaches the products",
        "ops/register.py",
        "with without_autocast(tensors[0]):",
        "if True:",
        T_LOSS,
    ),
    Fault(
        "what a kernel writes through pointers is not seen by autograd",
        "ops/register.py",
        "if written:  # before the kernel",
        "if False:  # before the kernel",
        f"{T_VERSIONS}::test_a_kernel_that_writes_through_pointers_is_seen",
    ),
    Fault(
        "what a mode or a subclass unwraps is not seen by autograd",
        "ops/register.py",
        "raise_versions_above(library, overload, written)",
        "pass",
        f"{T_VERSIONS}::test_a_wrapper_around_tensors_is_seen_too",
    ),
    Fault(
        "backward is served by whoever comes first",
        "ops/same_backend.py",
        "if ctx.backend is not None:",
        "if False:",
        "tests/backends/test_choice.py",
    ),
    Fault(
        "autograd's own threads know of no block",
        "backends/choice.py",
        "return handed_on ",
        "return None ",
        "tests/backends/test_choice.py::test_the_threads_of_autograd",
    ),
    Fault(
        "a misspelt switch is off",
        "_switches.py",
        "if value not in allowed:",
        "if False:",
        "tests/test_switches.py",
    ),
    Fault(
        "a backend that refuses serves all the same",
        "backends/choice.py",
        "if kernel is None or backend.refuses(operator, tensors) is not None",
        "if kernel is None",
        f"{T_REGISTRATION}::test_another_backend_plugs_in_and_may_refuse",
    ),
]
