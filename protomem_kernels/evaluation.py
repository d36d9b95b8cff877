"""The name of ``protomem_kernels.data.evaluation`` before it had a room of its own; both stay."""

from protomem_kernels.data.evaluation import *  # noqa: F403
from protomem_kernels.data.evaluation import __all__ as __all__
