"""What is fuzzed, by name: each a function that draws one case and holds the package to its oracle."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.draw import Draw
from tests.fuzz.subjects.aggregate_prototypes import aggregate_prototypes
from tests.fuzz.subjects.calls import bad_calls
from tests.fuzz.subjects.enqueue import enqueue
from tests.fuzz.subjects.hardest_negatives import hardest_negatives
from tests.fuzz.subjects.logits import margin_softmax_logits
from tests.fuzz.subjects.loss import margin_softmax_loss
from tests.fuzz.subjects.memory import prototype_memory
from tests.fuzz.subjects.memory_loss import prototype_memory_loss
from tests.fuzz.subjects.states import broken_checkpoints, broken_states

SUBJECTS: dict[str, Callable[[Draw], None]] = {
    subject.__name__: subject
    for subject in (
        aggregate_prototypes,
        enqueue,
        hardest_negatives,
        margin_softmax_loss,
        margin_softmax_logits,
        prototype_memory,
        prototype_memory_loss,
        broken_states,
        broken_checkpoints,
        bad_calls,
    )
}
