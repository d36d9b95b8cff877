"""The schema of every operator, once: arguments and results as PyTorch spells them.

Python defines the operators from these, in the namespace ``protomem`` and, for the compiled backends, in theirs; C++
implements them and repeats nothing.
"""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    "aggregate_prototypes": (
        "(Tensor embeddings, Tensor labels, Tensor? weights, bool normalize, SymInt? max_identities)"
        " -> (Tensor prototypes, Tensor identities, Tensor index, Tensor mass, Tensor norm)"
    ),
    "aggregate_prototypes_backward": (
        "(Tensor grad_prototypes, Tensor grad_mass, Tensor embeddings, Tensor? weights, Tensor index,"
        " Tensor prototypes, Tensor mass, Tensor norm, bool normalize) -> (Tensor grad_embeddings, Tensor grad_weights)"
    ),
    "enqueue_": (
        "(Tensor(a!) memory_prototypes, Tensor(b!) memory_identities, Tensor(c!) stamps, Tensor(d!) cursor,"
        " Tensor(e!) clock, Tensor prototypes, Tensor identities, float refresh_ratio, str policy,"
        " bool keep_previous) -> (Tensor slots, Tensor evicted, Tensor known, Tensor previous)"
    ),
    "hardest_negatives": (
        "(Tensor x, Tensor prototypes, Tensor targets, Tensor? occupied, SymInt k, bool normalize_prototypes)"
        " -> (Tensor cosines, Tensor slots)"
    ),
    "hardest_negatives_backward": (
        "(Tensor grad_cosines, Tensor x, Tensor prototypes, Tensor slots, bool normalize_prototypes,"
        " bool need_prototypes) -> (Tensor grad_x, Tensor grad_prototypes)"
    ),
    "margin_softmax_logits": (
        "(Tensor x, Tensor prototypes, Tensor targets, Tensor target_logits, Tensor? occupied, Tensor? threshold,"
        " Tensor? coefficients, float scale, bool normalize_prototypes) -> Tensor logits"
    ),
    "margin_softmax_logits_backward": (
        "(Tensor grad, Tensor x, Tensor prototypes, Tensor targets, Tensor? occupied, Tensor? threshold,"
        " Tensor? coefficients, float scale, bool normalize_prototypes, bool need_prototypes)"
        " -> (Tensor grad_x, Tensor grad_prototypes, Tensor grad_target_logits)"
    ),
    "negative_logsumexp": (
        "(Tensor x, Tensor prototypes, Tensor targets, Tensor? occupied, Tensor? negatives, Tensor? threshold,"
        " Tensor? coefficients, float scale, float? offset, bool normalize_prototypes, bool with_gradient,"
        " SymInt kept_rows) -> (Tensor cosine, Tensor n, Tensor target_rows, Tensor o, Tensor kept)"
    ),
    "negative_logsumexp_backward_": (
        "(Tensor(a!) grad_prototypes, Tensor grad_cosine, Tensor grad_n, Tensor x, Tensor prototypes, Tensor targets,"
        " Tensor? occupied, Tensor? negatives, Tensor? threshold, Tensor? coefficients, Tensor n, float scale,"
        " float? offset, bool normalize_prototypes, SymInt kept_rows) -> ()"
    ),
    "prepare_samples": (
        "(Tensor embeddings, Tensor labels, Tensor index, Tensor slots, SymInt capacity)"
        " -> (Tensor x, Tensor norm, Tensor targets)"
    ),
    "prepare_samples_backward": ("(Tensor grad_x, Tensor embeddings, Tensor x, Tensor norm) -> Tensor grad_embeddings"),
    "reduce_losses": (
        "(Tensor cosine, Tensor n, Tensor targets, SymInt capacity, str kind, float margin, float scale, bool mean)"
        " -> (Tensor loss, Tensor slope_cosine, Tensor slope_n)"
    ),
}
