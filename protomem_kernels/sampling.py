"""The name of ``protomem_kernels.data.sampling`` before it had a room of its own; both stay."""

from protomem_kernels.data.sampling import *  # noqa: F403
from protomem_kernels.data.sampling import __all__ as __all__
