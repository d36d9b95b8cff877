"""Faults in ``losses``."""

from tests.faults.fault import Fault

T_LOSSES = "tests/test_losses.py"

FAULTS = [
    Fault(
        "the guard past pi missing in the fused loss",
        "backends/triton/reduce_losses.py",
        "value = tl.where(guarded | (c != c), value, c - m * sin_m)",
        "value = value",
        "tests/ops/test_reduce_losses.py::test_loss_and_gradients",
    ),
    Fault(
        "a broken embedding hidden by the fused targets",
        "backends/triton/prepare_samples.py",
        "targets = tl.where((labels >= 0) & (slots < 0) & (finite == 0), 0, slots)",
        "targets = slots",
        "tests/ops/test_prepare_samples.py::test_a_broken_embedding_with_a_label_and_no_slot_is_shown",
    ),
    Fault(
        "eval writes",
        "losses.py",
        "if self.training else self._read(batch)",
        "if True else self._read(batch)",
        T_LOSSES,
    ),
    Fault(
        "fresh rows stay in the memory too",
        "losses.py",
        "(ring.identities >= 0) & ~written",
        "ring.identities >= 0",
        T_LOSSES,
    ),
    Fault(
        "momentum survives a change of identity",
        "optimizers.py",
        "state[name].masked_fill_(mask[:, None], value)",
        "pass",
        f"{T_LOSSES}::test_the_optimiser_steps_rows_that_stay_of_unit_length",
    ),
    Fault(
        "broken embeddings hidden",
        "losses.py",
        "return torch.where(broken, 0, targets)",
        "return targets",
        f"{T_LOSSES}::test_a_non_finite_embedding_shows_in_its_own_loss_alone",
    ),
    Fault(
        "rows not of unit length after a step",
        "losses.py",
        "optimizer.register_step_post_hook(",
        "(",
        f"{T_LOSSES}::test_the_optimiser_steps_rows_that_stay_of_unit_length",
    ),
]
