"""``warm_up``: everything that a training step needs, checked and compiled before the first one."""

from __future__ import annotations

import torch

from protomem_kernels._checks import check_int
from protomem_kernels.losses import MarginSoftmaxLoss, PrototypeMemoryLoss


def warm_up(
    loss_fn: PrototypeMemoryLoss | MarginSoftmaxLoss, batch_size: int, dtype: torch.dtype | None = None
) -> None:
    """Run a step forward and backward on made-up embeddings, so that its kernels are checked and compiled.

    On a GPU each backend's kernels check themselves at their first use, and Triton compiles its kernels then: some
    seconds, which are better spent before a CUDA graph is captured or a run is timed. Nothing is learned: no identity
    enters, no statistic moves, no generator advances, no ``.grad`` is touched.

    Args:
        loss_fn: the head, on its device, in the mode in which it will be used; with ``prototype_gradient="memory"`` its
            optimiser is attached.
        batch_size: B, as in training; kernels are compiled for sizes.
        dtype: of the embeddings to come. Default: float32 (float64 beside float64 weights).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        RuntimeError: ``PROTOMEM_SELF_CHECK=fail``, and a kernel's check failed.

    >>> warm_up(PrototypeMemoryLoss(embedding_dim=4, capacity=8), batch_size=2)
    """
    if not isinstance(loss_fn, (PrototypeMemoryLoss, MarginSoftmaxLoss)):
        raise TypeError(f"loss_fn must be a PrototypeMemoryLoss or MarginSoftmaxLoss, got {type(loss_fn).__name__}")
    check_int("batch_size", batch_size, at_least=1)
    rows = loss_fn.memory.prototypes if isinstance(loss_fn, PrototypeMemoryLoss) else loss_fn.weight
    if dtype is None:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    embeddings = torch.zeros(batch_size, rows.shape[1], dtype=dtype, device=rows.device, requires_grad=True)
    labels = torch.full((batch_size,), -1, dtype=torch.int64, device=rows.device)  # nobody: nothing enters
    memory = loss_fn.memory if isinstance(loss_fn, PrototypeMemoryLoss) else None
    clock = None if memory is None else memory.clock.clone()
    # What else a step without samples may move: the generator of a margin. Rows and identities stay as they are.
    parts = {
        key: value.clone() for key, value in loss_fn.state_dict().items() if key.startswith(("margin.", "mining."))
    }
    with torch.enable_grad():
        loss = loss_fn(embeddings, labels)
        wanted = [embeddings, *(p for p in loss_fn.parameters() if p.requires_grad)]
        torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    loss_fn.load_state_dict(parts, strict=False)
    if memory is not None and clock is not None:
        memory.clock.copy_(clock)
