"""Other libraries' training code on several ranks, with our classes in it."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels.compat import insightface
from tests.compat import insightface_loop
from tests.compat.insightface_loop import CASES, NUMBERS
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


def trained(group: Any, name: str) -> Any:
    """Return one rank's numbers of the loop in insightface's manner."""

    def average(gradient: Tensor) -> None:
        dist.all_reduce(gradient, group=group)
        gradient /= group.size()

    torch.set_default_dtype(torch.float64)
    try:
        head = partial(insightface.PartialFC_V2, process_group=group)
        return insightface_loop.train(head, insightface.CombinedMarginLoss, name, average)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name, (*_, ranks) in CASES.items() if ranks > 1])
def test_ten_steps_of_training_are_insightfaces(name: str, pool: Pool) -> None:
    truths = json.loads(NUMBERS.read_text())["cases"][name]
    for found, truth in zip(pool.run(len(truths), trained, name), truths, strict=True):
        assert found["sampled"] == truth["sampled"]
        for what in ("losses", "encoder", "weight"):
            torch.testing.assert_close(
                torch.tensor(found[what], dtype=torch.float64),
                torch.tensor(truth[what], dtype=torch.float64),
                rtol=1e-9,
                atol=1e-9,
            )


def made_and_loaded(group: Any) -> Any:
    """Return where each rank's classes lie, by default over the world, and whether the original's state fits."""
    head = insightface.PartialFC_V2(insightface.CosFace(), DIM, CLASSES)
    head.load_state_dict({"weight": torch.full((head.num_local, DIM), 1.0 + head.rank)})
    return head.rank, head.world_size, head.class_start, head.num_local


def test_classes_lie_on_the_ranks_as_in_partial_fc(pool: Pool) -> None:
    assert pool.run(3, made_and_loaded) == [(0, 3, 0, 13), (1, 3, 13, 12), (2, 3, 25, 12)]


def warmed(group: Any, weight: Tensor, labels: Tensor) -> Any:
    """Fill a memory by each rank's part of a classifier, and a head by what the memory then holds of all classes."""
    memory = pmk.PrototypeMemory(60, DIM, process_group=group)
    mine = slice(group.rank(), None, group.size())
    pmk.warm_start(memory, weight[mine], labels[mine])
    head = insightface.PartialFC_V2(insightface.ArcFace(), DIM, CLASSES, process_group=group)
    pmk.warm_start(head, weight)  # the shards of any number of ranks, put together
    assert torch.equal(head.weight, weight[head.class_start : head.class_start + head.num_local])
    asked = labels if group.rank() == 0 else labels[:2]
    return memory.prototypes_of(asked), len(memory)


def test_a_classifier_warms_a_memory_over_ranks(pool: Pool) -> None:
    weight = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(CLASSES) * 31
    told = pool.run(2, warmed, weight, labels)
    for rank, (rows, _) in enumerate(told):
        torch.testing.assert_close(rows, torch.nn.functional.normalize(weight)[: CLASSES if rank == 0 else 2])
    assert sum(count for _, count in told) == CLASSES
