"""The definition of every operator in plain PyTorch: any device, any dtype, fixed order, no batch x memory.

The functions take checked arguments and return tuples of tensors; ``KERNELS`` is what the dispatch sees.
"""

from protomem_kernels.reference._rows import normalize_rows_, unit_rows
from protomem_kernels.reference.aggregate_prototypes import aggregate_prototypes, aggregate_prototypes_backward
from protomem_kernels.reference.enqueue import enqueue_, match_identities, refreshed_rows
from protomem_kernels.reference.hardest_negatives import hardest_negatives, hardest_negatives_backward
from protomem_kernels.reference.margin_softmax_logits import margin_softmax_logits, margin_softmax_logits_backward
from protomem_kernels.reference.negative_logsumexp import negative_logsumexp, negative_logsumexp_backward_

__all__ = ["KERNELS", "match_identities", "normalize_rows_", "refreshed_rows", "unit_rows"]

KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        aggregate_prototypes,
        aggregate_prototypes_backward,
        enqueue_,
        negative_logsumexp,
        negative_logsumexp_backward_,
        hardest_negatives,
        hardest_negatives_backward,
        margin_softmax_logits,
        margin_softmax_logits_backward,
    )
}
