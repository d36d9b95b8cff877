"""Other libraries' training code on several ranks, with our classes in it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.distributed.pool import Pool

CLASSES, DIM, BATCH = 37, 12, 20
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def wrapped(group: Any, module: str) -> Any:
    """Return one rank's loss and gradients under pytorch-metric-learning's DistributedLossWrapper."""
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    torch.manual_seed(3)
    head = import_module(module).ArcFaceLoss(CLASSES, DIM)
    torch.manual_seed(group.rank())
    embeddings = torch.randn(BATCH, DIM, requires_grad=True)
    loss = DistributedLossWrapper(head)(embeddings, torch.randint(CLASSES, (BATCH,)))
    loss.backward()
    return loss.detach(), embeddings.grad, head.W.grad


def test_pytorch_metric_learnings_distributed_wrapper(pool: Pool) -> None:
    pytest.importorskip("pytorch_metric_learning")
    names = "pytorch_metric_learning.losses", "protomem_kernels.compat.pytorch_metric_learning"
    theirs, mine = (pool.run(pool.size, wrapped, name) for name in names)  # the wrapper knows the world alone
    for found, truth in zip(mine, theirs, strict=True):
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
