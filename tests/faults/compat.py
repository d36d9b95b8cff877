"""Faults in ``compat``, ``health`` and what a memory does when the slots in use change."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "insightface's ArcFace is differentiated",
        "compat/insightface.py",
        'return ArcFaceMargin(float(self.m2), straight_through=self.gradient == "straight_through")',
        "return ArcFaceMargin(float(self.m2))",
        "tests/compat/test_insightface.py::test_ten_steps_of_training_are_insightfaces",
    ),
    Fault(
        "a miner's weights count for nothing",
        "compat/pytorch_metric_learning.py",
        "losses * weights",
        "losses",
        "tests/compat/test_pytorch_metric_learning.py::test_miners_weigh_the_losses_as_in_the_original",
    ),
    Fault(
        "the queue begins anew on resume",
        "compat/pytorch_metric_learning.py",
        'if "queue_idx" in local_metadata:',
        "if False:",
        "tests/compat/test_pytorch_metric_learning.py::test_the_cross_batch_memory_comes_back_on_resume",
    ),
    Fault(
        "of fewer slots the oldest stay",
        "memory.py",
        "order = order[self.identities[order] >= 0][-self.slots_in_use :]",
        "order = order[self.identities[order] >= 0][: self.slots_in_use]",
        "tests/test_schedules.py::test_who_stays_and_who_goes_first_when_the_slots_change",
    ),
    Fault(
        "drift counts rows that have just entered",
        "losses.py",
        "(known & (slots >= 0), self._drift",
        "(slots >= 0, self._drift",
        "tests/test_health.py::test_the_watched_step_by_hand",
    ),
]
