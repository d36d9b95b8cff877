"""What one rank refuses, every rank refuses with the same words, before any of them has written anything."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import protomem_kernels as pmk
from protomem_kernels.distributed.owners import owners
from tests.distributed.pool import Pool, RankError

DIM = 4


def labels_of(owner: int, count: int, ranks: int = 2) -> torch.Tensor:
    numbers = torch.arange(1000)
    return numbers[owners(numbers, ranks) == owner][:count]


def step(group: Any, change: str) -> Any:
    """A good step, and one in which a rank comes with something else; return whether all is as before it."""
    rank = dist.get_rank(group)
    options: dict[str, Any] = {"capacity": 16, "margin": pmk.ArcFace(0.3), "scale": 8.0}
    if rank == 1:
        options |= DIFFERENT.get(change, {})
    if change == "equal_batches":
        options["equal_batches"] = True
    loss_fn = pmk.PrototypeMemoryLoss(DIM, process_group=group, **options)
    memory = loss_fn.memory
    if change not in DIFFERENT:
        loss_fn(torch.randn(3, DIM), torch.arange(3) + 10 * rank)
    kept = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    clock = int(memory.clock)
    batch: list[Any] = [torch.randn(3, DIM, requires_grad=True), torch.arange(3) + 20 * rank]
    if rank == 1 and change in WRONG:
        WRONG[change](batch)
    if change == "training":
        loss_fn.train(rank == 0)
    if change == "too many":
        batch = [torch.randn(5, DIM), labels_of(1, 10)[5 * rank :][:5]]
    if change == "foreign state":
        memory.reset()
        if rank == 1:
            memory.identities[0], memory.prototypes[0, 0] = labels_of(0, 1)[0], 1.0
        kept, clock = {name: value.clone() for name, value in loss_fn.state_dict().items()}, 0
    calls: dict[str, Callable[[], Any]] = {
        "statistics": lambda: loss_fn(*batch, return_stats=rank == 0),
        "k": lambda: memory.doppelgangers(torch.arange(3), 2 + rank),
        "no k": lambda: memory.doppelgangers(torch.arange(3), 2 - 2 * rank),
        "labels to look up": lambda: memory.lookup(torch.arange(3) / (2 if rank else 1)),
        "another call": lambda: memory.lookup(torch.arange(3)) if rank else memory.update(*batch),
    }
    try:
        calls.get(change, lambda: loss_fn(*batch))()
    except (TypeError, ValueError, RuntimeError) as error:
        same = all(torch.equal(value, kept[name]) for name, value in loss_fn.state_dict().items())
        return type(error).__name__, str(error), same and int(memory.clock) == clock
    return None


DIFFERENT: dict[str, dict[str, Any]] = {
    "capacity": {"capacity": 18},
    "margin": {"margin": pmk.ArcFace(0.4)},
    "scale": {"scale": 9.0},
    "mining": {"mining": pmk.HardestNegatives(2)},
    "quality": {"quality": pmk.NormQuality()},
    "policy": {"policy": "lru"},
    "refresh_ratio": {"refresh_ratio": 0.2},
    "reduction": {"reduction": "sum"},
    "the memory's dtype": {"dtype": torch.float64},
    "average_gradients": {"average_gradients": False},
    "prototype_gradient": {"prototype_gradient": "fresh"},
}


def put(place: int, value: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    def change(batch: list[Any]) -> None:
        batch[place] = value(batch[place])

    return change


WRONG: dict[str, Callable[[list[Any]], None]] = {
    "labels on another device": put(1, lambda labels: labels.to("meta")),
    "labels that are no integers": put(1, lambda labels: labels / 2),
    "too few labels": put(1, lambda labels: labels[:2]),
    "no tensor": put(0, lambda _: "embeddings"),
    "another size of embeddings": put(0, lambda e: torch.randn(3, DIM + 1)),
    "the embeddings' dtype": put(0, lambda e: e.detach().double().requires_grad_()),
    "no gradient": put(0, lambda e: e.detach()),
    "weights": lambda batch: batch.append(torch.ones(3)),
    "equal_batches": lambda batch: batch.__setitem__(slice(None), [batch[0][:2], batch[1][:2]]),
}
SAYS: dict[str, tuple[str, str]] = {
    **{name: ("ValueError", f"{name} must be the same on all ranks, got ") for name in DIFFERENT},
    "labels on another device": ("ValueError", "labels must be on cpu like embeddings, got meta (rank 1 of 2)"),
    "labels that are no integers": ("TypeError", "labels must be int64 or int32, got torch.float32"),
    "too few labels": ("ValueError", "labels must have shape (3,) to match embeddings"),
    "no tensor": ("TypeError", "embeddings must be a tensor of shape (B, D), got str (rank 1 of 2)"),
    "another size of embeddings": ("ValueError", "embeddings must have shape (B, 4) to match the memory's"),
    "the embeddings' dtype": ("ValueError", "the embeddings' dtype must be the same on all ranks"),
    "no gradient": ("ValueError", "whether embeddings require a gradient must be the same on all ranks"),
    "weights": ("ValueError", "the weights' dtype must be the same on all ranks, got None on rank 0 and torch.float32"),
    "equal_batches": ("ValueError", "the number of rows (equal_batches=True) must be the same on all ranks, got 3 on"),
    "training": ("ValueError", "training must be the same on all ranks, got True on rank 0 and False on rank 1"),
    "statistics": ("ValueError", "return_stats must be the same on all ranks"),
    "too many": (
        "ValueError",
        "labels must hold at most 8 identities of one owner, the slots of its shard (",
    ),
    "k": ("ValueError", "k must be the same on all ranks, got 2 on rank 0 and 3 on rank 1"),
    "no k": ("ValueError", "k must be at least 1, got 0 (rank 1 of 2)"),
    "labels to look up": ("TypeError", "labels must be int64 or int32, got torch.float32"),
    "another call": ("ValueError", "the call must be the same on all ranks"),
    "foreign state": ("ValueError", "memory.identities must be those that rank 1 of 2 owns, got 0 at index 0, which"),
}


@pytest.mark.parametrize("change", SAYS)
def test_the_same_error_on_every_rank_before_any_write(pool: Pool, change: str) -> None:
    kind, words = SAYS[change]
    first, second = pool.run(2, step, change)
    assert first == second
    assert first[0] == kind
    assert words in first[1]
    assert first[2], "something was written"


def a_bad_weight(group: Any) -> Any:
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 8, process_group=group)
    weights = torch.tensor([1.0, -1.0]) if dist.get_rank(group) else torch.ones(2)
    try:
        loss_fn(torch.randn(2, DIM), torch.arange(2), weights)
    except ValueError as error:
        return str(error), int(loss_fn.memory.clock)


def test_a_weight_that_must_not_be(pool: Pool) -> None:
    assert pool.run(2, a_bad_weight) == [("weights must be finite and not negative, got -1.0 at index 3", 0)] * 2


def after_an_error(group: Any) -> Any:
    """A refused step, and a good one: nothing hangs, nothing is out of step."""
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 8, process_group=group)
    rank = dist.get_rank(group)
    with pytest.raises(ValueError, match="labels must have shape"):
        loss_fn(torch.randn(2, DIM), torch.arange(2 + rank))
    e = torch.randn(2, DIM, requires_grad=True)
    loss = loss_fn(e, torch.arange(2))
    loss.backward()
    return loss.item(), int(loss_fn.memory.clock), bool(torch.isfinite(e.grad).all())


def test_a_refused_step_does_no_harm(pool: Pool) -> None:
    first, second = pool.run(2, after_an_error)
    assert first == second
    assert first[1:] == (1, True)


def absent(group: Any, what: str) -> Any:
    """Rank 1 never calls; rank 0 says how long it waited and for what."""
    loss = None
    if what == "backward":  # forward, it does
        e = torch.randn(2, DIM, requires_grad=True)
        loss = pmk.PrototypeMemoryLoss(DIM, 8, process_group=group)(e, torch.arange(2))
    if dist.get_rank(group) == 1:
        return None
    memory = pmk.PrototypeMemory(8, DIM, process_group=group)
    calls: dict[str, Callable[[], Any]] = {
        "update": lambda: memory.update(torch.randn(2, DIM), torch.arange(2)),
        "doppelgangers": lambda: memory.doppelgangers(torch.arange(2), 1),
        "backward": lambda: loss.backward(),
    }
    start = time.monotonic()
    try:
        calls[what]()
    except RuntimeError as error:
        return str(error), time.monotonic() - start, int(memory.clock)


@pytest.mark.parametrize("what", ["update", "doppelgangers", "backward"])
def test_a_rank_that_never_calls(pool: Pool, what: str) -> None:
    message, seconds, clock = pool.run(2, absent, what, breaks_within=2.0)[0]
    assert message.startswith("rank 0 of 2 waited in vain for the others in all_gather: every rank of process")
    assert seconds < 20
    assert clock == 0


def built(group: Any, kind: str) -> None:
    if kind == "memory":
        pmk.PrototypeMemoryLoss(DIM, 1, process_group=group)
    elif kind == "classes":
        pmk.MarginSoftmaxLoss(1, DIM, process_group=group)
    elif kind == "other ranks":
        others = dist.new_group([0])
        pmk.PrototypeMemory(8, DIM, process_group=others)


def test_fewer_slots_or_classes_than_ranks(pool: Pool) -> None:
    for kind, words in (
        ("memory", "capacity must be at least 2, the ranks"),
        ("classes", "num_classes must be at least 2"),
    ):
        with pytest.raises(RankError) as caught:
            pool.run(2, built, kind)
        assert [error[0] for error in caught.value.errors] == ["ValueError"] * 2
        assert all(words in error[1] for error in caught.value.errors)


def test_a_group_of_other_ranks(pool: Pool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(pool.size, built, "other ranks")
    assert caught.value.errors[0] is None
    assert all("process_group must be a group that this process is a rank of" in e[1] for e in caught.value.errors[1:])


def test_what_is_no_group_of_this_process() -> None:
    with pytest.raises(TypeError, match=r"process_group must be a process group of torch.distributed.* got str"):
        pmk.PrototypeMemory(8, DIM, process_group="world")
    group = dist.ProcessGroup(0, 2)
    with pytest.raises(ValueError, match=r"process_group must be initialised: call torch\.distributed"):
        pmk.MarginSoftmaxLoss(8, DIM, process_group=group)


@pytest.mark.parametrize(
    ("name", "value"), [("average_gradients", 0), ("average_gradients", "yes"), ("equal_batches", 1)]
)
def test_options_of_a_wrong_type(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        pmk.PrototypeMemoryLoss(DIM, 8, **{name: value})


def copies(group: Any) -> Any:
    """A copy stays with the ranks and goes its own way; a pickle is refused; a shard of another rank too."""
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 40, process_group=group, margin=pmk.ElasticFace())
    rank = dist.get_rank(group)
    e, labels = torch.randn(6, DIM), torch.arange(6) + 6 * rank
    loss_fn(e, labels)
    twin = copy.deepcopy(loss_fn)
    twin(e, labels + 100)
    with pytest.raises(TypeError, match=r"cannot be pickled, since a process group cannot: save its state_dict"):
        pickle.dumps(loss_fn)
    states = loss_fn.ranks.objects(loss_fn.state_dict())
    twin.load_state_dict(states[rank])
    try:
        twin.load_state_dict(states[1 - rank])
    except RuntimeError as error:
        refused = str(error)
    row = pmk.AggregatedPrototypes(torch.eye(DIM)[:1], labels_of(1 - rank, 1), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=f"aggregated.identities must be those that rank {rank} of 2 owns"):
        loss_fn.memory.enqueue(row)
    return refused, len(loss_fn.memory), int(twin.memory.clock), loss_fn.memory.lookup(labels + 100).max().item()


def test_states_stay_with_their_rank(pool: Pool) -> None:
    told = pool.run(2, copies)
    assert sum(held for _, held, _, _ in told) == 12
    for rank, (refused, _, clock, foreign) in enumerate(told):
        assert f"identities must be those that rank {rank} of 2 owns" in refused
        assert "is this the shard of another rank, or of another number of ranks? What protomem_kernels.dist" in refused
        assert (clock, foreign) == (1, -1)
