"""Beyond capacity: as many independent rings as ranks, in plain Python, each for the identities of its owner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels.distributed.owners import mix, owners
from tests import oracles
from tests.distributed import cases
from tests.distributed.cases import DIM, cut, part
from tests.distributed.pool import Pool

BITS = (1 << 64) - 1


def mixed(identity: int) -> int:
    """The finaliser of splitmix64 with Python's own numbers, its lowest bit dropped."""
    z = identity & BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & BITS
    return (z ^ (z >> 31)) >> 1


def test_owners_are_those_of_the_formula() -> None:
    identities = [0, 1, 2, 3, 12345, 2**31, 2**62 + 7, 2**63 - 1, *range(10**9, 10**9 + 50)]
    assert mix(torch.tensor(identities)).tolist() == [mixed(identity) for identity in identities]
    for ranks in (1, 2, 3, 7, 1024):
        assert owners(torch.tensor(identities), ranks).tolist() == [mixed(identity) % ranks for identity in identities]


def test_owners_are_spread_evenly() -> None:
    """Numbers in a row, and multiples of the number of ranks: the fullest of 8 shards has few more than its share."""
    for identities in (torch.arange(80_000), 8 * torch.arange(80_000), torch.arange(80_000) << 40):
        assert owners(identities, 8).bincount(minlength=8).max() < 1.04 * 10_000


def arc(cosine: Tensor, _: Tensor) -> Tensor:
    return oracles.arcface(cosine, 0.3)


def train(group: Any, options: dict[str, Any], data: Any, sizes: Any) -> list[Any]:
    """Run steps; return of each the loss, the gradients, the shard's state, and the slots that labels have after it."""
    loss_fn = cases.head(options, group, learning_rate=0.0)
    rank, seen = loss_fn.ranks.rank, []
    for e, labels, _ in data:
        mine, own = part(e, sizes, rank).requires_grad_(), part(labels, sizes, rank)  # type: ignore[union-attr]
        if loss_fn.optimizer is not None:
            loss_fn.optimizer.zero_grad()
        loss, stats = loss_fn(mine, own, return_stats=True)
        loss.backward()
        memory = loss_fn.memory
        row_gradient = memory.prototypes.grad.clone() if loss_fn.optimizer is not None else None
        state = {name: value.detach().clone() for name, value in memory.state._asdict().items()}
        moved = [int(stats.entered), int(stats.refreshed), int(stats.left)]
        seen.append((loss.detach(), mine.grad, row_gradient, state, memory.lookup(own), moved))
    return seen


@pytest.mark.parametrize("mode", ["none", "fresh", "memory"])
@pytest.mark.parametrize("policy", ["fifo", "lru"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_full_shards_are_rings_of_their_own(pool: Pool, ranks: int, policy: str, mode: str) -> None:
    capacity, ratio, total = 23, 0.4, 24
    options = {
        "capacity": capacity,
        "margin": "arc",
        "scale": 8.0,
        "dtype": torch.float64,
        "prototype_gradient": mode,
        "policy": policy,
        "refresh_ratio": ratio,
        "average_gradients": False,
    }
    data, sizes = cases.batches(9, total, identities=45), cut(total, ranks, "ragged")
    ours = pool.run(ranks, train, options, data, sizes)

    shard = -(-capacity // ranks)
    rings = [oracles.DictMemory(shard, DIM, ratio=ratio, policy=policy) for _ in range(ranks)]
    left = 0
    for step, (e, labels, _) in enumerate(data):
        wanted = e.clone().requires_grad_()
        owner = torch.tensor([mixed(label) % ranks if label >= 0 else -1 for label in labels.tolist()])
        targets = torch.full_like(labels, -1)
        for rank, ring in enumerate(rings):
            ring.detach()
            slots = ring.step(wanted if mode == "fresh" else e, torch.where(owner == rank, labels, -1))
            targets = torch.where(slots >= 0, rank * shard + slots, targets)
        rows = torch.cat([ring.rows for ring in rings])
        if mode == "memory":
            rows = rows.detach().requires_grad_()
        occupied = torch.cat([ring.occupied for ring in rings])
        losses = oracles.dense_losses(wanted, rows, targets, arc, 8.0, occupied=occupied)
        loss = oracles.reduce(losses, targets, "mean")
        loss.backward()
        moved = [sum(getattr(ring, name) for ring in rings) for name in ("entered", "refreshed", "left")]
        left += moved[2]
        for rank, ring in enumerate(rings):
            got, grad, row_gradient, state, slots, counted = ours[rank][step]
            near(got, loss.detach())
            near(grad, part(wanted.grad, sizes, rank))
            if mode == "memory":
                near(row_gradient, rows.grad[rank * shard : (rank + 1) * shard])
            ring.equals(SimpleNamespace(**state), rtol=0, atol=1e-12)
            stands = [
                next((r * shard + other.slot(label) for r, other in enumerate(rings) if other.slot(label) >= 0), -1)
                for label in part(labels, sizes, rank).tolist()  # type: ignore[union-attr]
            ]
            assert slots.tolist() == stands
            assert counted == moved
    assert left > 10


def near(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def life(group: Any, total: int, sizes: Any) -> Any:
    """The memory alone: update, what it returned, doppelgangers, and the shard."""
    memory = pmk.PrototypeMemory(61, DIM, dtype=torch.float64, process_group=group)
    rank = memory.ranks.rank
    updated = [
        memory.update(part(e, sizes, rank), part(labels, sizes, rank)) for e, labels, _ in cases.batches(2, total)
    ]
    labels = part(cases.batches(2, total)[1][1], sizes, rank)
    return updated, memory.lookup(labels), memory.doppelgangers(labels, 3), memory.identities.clone(), repr(memory)


def test_slots_count_through_the_shards(pool: Pool) -> None:
    sizes = cut(21, 3, "ragged")
    found = pool.run(3, life, 21, sizes)
    identities = torch.cat([own for *_, own, _ in found])
    everything = cases.batches(2, 21)
    for rank, (updated, known, (cosines, twins), _, text) in enumerate(found):
        labels = part(everything[1][1], sizes, rank)
        for slots, (_, given, _) in zip(updated, everything, strict=True):
            here = part(given, sizes, rank)
            assert ((slots >= 0) == ((here >= 0) & (here != 999))).all()  # type: ignore[operator, union-attr]
        assert torch.equal(known, updated[1])
        assert torch.equal(identities[known[known >= 0]], labels[known >= 0])  # type: ignore[index]
        assert ((cosines > -2) == (known >= 0)[:, None]).all()
        assert not (twins == labels[:, None]).any() or bool((known < 0).any())  # type: ignore[index]
        assert f"rank {rank} of 3" in text
        assert "capacity=61" in text


def in_two_steps(group: Any, sizes: Any) -> Any:
    """Aggregate, which is collective, and enqueue, which is not, beside update; the last ranks of the world alone."""
    ranks = dist.get_world_size() - 1
    others = dist.new_group(range(1, 1 + ranks))
    if dist.get_rank() == 0:
        return None
    one, other = (pmk.PrototypeMemory(61, DIM, dtype=torch.float64, process_group=others) for _ in range(2))
    rank = one.ranks.rank
    assert rank == dist.get_rank() - 1
    for e, labels, _ in cases.batches(3, sum(sizes)):
        mine, own = part(e, sizes, rank), part(labels, sizes, rank)
        one.update(mine, own)
        made = other.aggregate(mine, own)
        assert len(made.index) == sum(sizes)
        other.enqueue(made)
        assert torch.equal(other.lookup(own), one.lookup(own))
    margin = pmk.PrototypeMemoryLoss(DIM, 61, margin=pmk.ElasticFace(std=0.3), process_group=others)
    loss = margin(torch.ones(1, DIM) + rank, torch.tensor([rank]))
    return [torch.equal(a, b) for a, b in zip(one.state, other.state, strict=True)], loss.item()


def test_aggregate_and_enqueue_in_a_group_of_some_of_the_world(pool: Pool) -> None:
    absent, first, *others = pool.run(pool.size, in_two_steps, [9] * (pool.size - 2) + [12])
    assert absent is None
    assert first[0] == [True] * 5
    assert others == [first] * (pool.size - 2)
