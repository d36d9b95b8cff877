"""The name of ``protomem_kernels.data.images`` and ``.degradations`` before they had a room of their own; all stay."""

from protomem_kernels.data.degradations import *  # noqa: F403
from protomem_kernels.data.degradations import __all__ as _degradations
from protomem_kernels.data.images import *  # noqa: F403
from protomem_kernels.data.images import __all__ as _images

__all__ = [*_degradations, *_images]
