"""The operators: one file each with contract, checks, fake kernel, autograd and dispatch to a backend."""

from protomem_kernels.ops.aggregate_prototypes import aggregate_prototypes
from protomem_kernels.ops.dispatch import Choice, explain, use_backend
from protomem_kernels.ops.enqueue import enqueue_, find_slots
from protomem_kernels.ops.hardest_negatives import hardest_negatives
from protomem_kernels.ops.margin_softmax_logits import margin_softmax_logits
from protomem_kernels.ops.margin_softmax_loss import margin_softmax_loss

__all__ = [
    "Choice",
    "aggregate_prototypes",
    "enqueue_",
    "explain",
    "find_slots",
    "hardest_negatives",
    "margin_softmax_logits",
    "margin_softmax_loss",
    "use_backend",
]
