"""The definition of every operator in plain PyTorch: any device, any dtype, fixed order, no batch x memory.

The functions take checked arguments and return tuples of tensors. This backend is always there and serves everything.
"""

from protomem_kernels.backends.protocol import FolderBackend

BACKEND = FolderBackend("reference", __name__)
