"""Many processes: who owns an identity, what goes from rank to rank, and heads under ``DistributedDataParallel``.

This room knows collectives, owners and rows, never a memory or a loss. One rank is its identity.
"""

from protomem_kernels.distributed.checkpoints import load, save, save_async
from protomem_kernels.distributed.data_parallel import prepare_ddp

__all__ = ["load", "prepare_ddp", "save", "save_async"]
