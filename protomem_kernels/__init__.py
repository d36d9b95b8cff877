"""Prototype Memory for PyTorch: fused operators and modules for training embedding models on millions of identities."""

from protomem_kernels import distributed
from protomem_kernels.backends.choice import explain, use_backend
from protomem_kernels.backends.precision import matmul_precision
from protomem_kernels.graphed import graphed
from protomem_kernels.health import Health
from protomem_kernels.losses import DSoftmaxLoss, MarginSoftmaxLoss, PrototypeMemoryLoss, PrototypeMemoryStats
from protomem_kernels.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    DSoftmax,
    ElasticFace,
    LabelMargins,
    MagFace,
    SphereFace,
)
from protomem_kernels.memory import PrototypeMemory
from protomem_kernels.mining import CurricularFace, HardestNegatives, HardSamples, MVSoftmax, NoisyNegativeFilter
from protomem_kernels.objective import margin_softmax_logits, margin_softmax_loss
from protomem_kernels.ops import aggregate_prototypes, enqueue_, hardest_negatives
from protomem_kernels.quality import CenterQuality, NormQuality, RecognizabilityQuality, SoftmaxQuality
from protomem_kernels.schedules import HeadSchedule
from protomem_kernels.types import (
    AggregatedPrototypes,
    EnqueueResult,
    HardestNegativesResult,
    MarginSoftmaxStats,
    MemoryState,
)
from protomem_kernels.warm_start import warm_start
from protomem_kernels.warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "AdaFace",
    "AggregatedPrototypes",
    "ArcFace",
    "CenterQuality",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "DSoftmax",
    "DSoftmaxLoss",
    "ElasticFace",
    "EnqueueResult",
    "HardSamples",
    "HardestNegatives",
    "HardestNegativesResult",
    "HeadSchedule",
    "Health",
    "LabelMargins",
    "MVSoftmax",
    "MagFace",
    "MarginSoftmaxLoss",
    "MarginSoftmaxStats",
    "MemoryState",
    "NoisyNegativeFilter",
    "NormQuality",
    "PrototypeMemory",
    "PrototypeMemoryLoss",
    "PrototypeMemoryStats",
    "RecognizabilityQuality",
    "SoftmaxQuality",
    "SphereFace",
    "aggregate_prototypes",
    "distributed",
    "enqueue_",
    "explain",
    "graphed",
    "hardest_negatives",
    "margin_softmax_logits",
    "margin_softmax_loss",
    "matmul_precision",
    "use_backend",
    "warm_start",
    "warm_up",
]
