"""Faults in what keeps a training run's folder whole."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "a checkpoint's checksum is not looked at",
        "training/checkpoints.py",
        "return trailer == _trailer(_digest(file, end))",
        "return True",
        "tests/training/test_checkpoints.py::test_no_bit_of_a_checkpoint_can_flip_unseen",
    ),
    Fault(
        "two runs hold one folder",
        "training/locks.py",
        "fcntl.LOCK_EX",
        "fcntl.LOCK_SH",
        "tests/training/test_locks.py::test_a_fresh_run_holds_its_folder_too",
    ),
    Fault(
        "a signal breaks into a step",
        "training/stopping.py",
        "if not self._held:",
        "if True:",
        "tests/training/test_stopping.py::test_from_python_it_is_a_keyboard_interrupt",
    ),
]
