"""The registered operators: one file each with contract, checks, fake kernel and autograd.

``schemas`` holds what PyTorch knows of them, ``register`` tells it, ``call`` calls them, ``once`` ends their gradients.
"""

from protomem_kernels.ops.aggregate_prototypes import aggregate_prototypes
from protomem_kernels.ops.enqueue import enqueue_
from protomem_kernels.ops.hardest_negatives import hardest_negatives
from protomem_kernels.ops.margin_softmax_logits import margin_softmax_logits
from protomem_kernels.ops.negative_logsumexp import negative_logsumexp
from protomem_kernels.ops.prepare_samples import prepare_samples
from protomem_kernels.ops.reduce_losses import reduce_losses

__all__ = [
    "aggregate_prototypes",
    "enqueue_",
    "hardest_negatives",
    "margin_softmax_logits",
    "negative_logsumexp",
    "prepare_samples",
    "reduce_losses",
]
