"""Options of a head as functions of the step: set, saved and resumed; and the slots that a memory uses."""

from __future__ import annotations

import pytest
import torch

import protomem_kernels as pmk
from tests import oracles

DIM = 4


def batch(step: int, identities: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, DIM, generator=generator), torch.randint(identities, (5,), generator=generator)


def scheduled(**options) -> tuple[pmk.PrototypeMemoryLoss, pmk.HeadSchedule]:
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 24, mining=pmk.HardestNegatives(9), scale=8, **options)
    return loss_fn, pmk.HeadSchedule(
        loss_fn,
        margin=lambda step: 0.05 * step,
        scale=lambda step: 8 + step,
        k=lambda step: 3 + step // 2,
        refresh_ratio=lambda step: 1 / (1 + step),
        capacity=lambda step: (6, 12, 8, 24)[min(step // 3, 3)],
    )


def test_every_option_follows_its_function() -> None:
    loss_fn, schedule = scheduled()
    for step in range(12):
        assert loss_fn.margin == pmk.ArcFace(0.05 * step)
        assert (loss_fn.scale, loss_fn.mining) == (8 + step, pmk.HardestNegatives(3 + step // 2))
        assert loss_fn.memory.refresh_ratio == 1 / (1 + step)
        assert loss_fn.memory.capacity_in_use == (6, 12, 8, 24)[step // 3]
        loss_fn(*batch(step))
        schedule.step()


@pytest.mark.parametrize("policy", ["fifo", "lru"])
@pytest.mark.parametrize("first", ["head", "schedule"])
@pytest.mark.parametrize("at", [2, 3, 5, 7, 10])
def test_a_resumed_run_goes_on_bit_for_bit(policy: str, first: str, at: int) -> None:
    loss_fn, schedule = scheduled(policy=policy)

    def train(loss_fn, schedule, steps) -> list[float]:
        losses = []
        for step in steps:
            losses.append(loss_fn(*batch(step)).item())
            schedule.step()
        return losses

    train(loss_fn, schedule, range(at))
    saved = {"head": loss_fn.state_dict(), "schedule": schedule.state_dict()}
    saved = {name: {key: torch.as_tensor(v).clone() for key, v in part.items()} for name, part in saved.items()}
    saved["schedule"] = {key: int(value) for key, value in saved["schedule"].items()}
    resumed = dict(zip(("head", "schedule"), scheduled(policy=policy), strict=True))
    for name in sorted(resumed, key=lambda name: name != first):
        resumed[name].load_state_dict(saved[name])
    assert train(*resumed.values(), range(at, 14)) == train(loss_fn, schedule, range(at, 14))
    assert all(map(torch.equal, resumed["head"].memory.state, loss_fn.memory.state))


@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_a_memory_of_which_a_part_is_used_is_a_smaller_memory(policy: str) -> None:
    large, small = pmk.PrototypeMemoryLoss(DIM, 30, policy=policy), pmk.PrototypeMemoryLoss(DIM, 7, policy=policy)
    large.memory.use(7)
    for step in range(9):
        embeddings, labels = batch(step)
        ours, theirs = (embeddings.clone().requires_grad_() for _ in range(2))
        losses = large(ours, labels), small(theirs, labels)
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert torch.equal(ours.grad, theirs.grad)
    large.memory.state.validate()
    assert torch.equal(large.memory.identities[:7], small.memory.identities)
    assert (large.memory.identities[7:] == -1).all()


@pytest.mark.parametrize("policy", ["fifo", "lru"])
@pytest.mark.parametrize(("before", "after"), [(6, 9), (9, 6), (9, 3), (6, 7)])
def test_who_stays_and_who_goes_first_when_the_slots_change(policy: str, before: int, after: int) -> None:
    memory = pmk.PrototypeMemory(12, DIM, policy=policy)
    memory.use(before)
    model = oracles.DictMemory(before, DIM, policy=policy)
    for step in range(5):
        embeddings, labels = batch(step, identities=14)
        embeddings, labels = embeddings[:3], labels[:3]
        memory.update(embeddings, labels)
        model.step(embeddings.double(), labels)
    rows = {int(i): memory.prototypes_of(i[None])[0] for i in memory.identities if i >= 0}
    order = [int(i) for i in _oldest(memory, policy, before)]
    memory.use(after)
    assert [int(i) for i in memory.identities if i >= 0] == order[-after:]
    for identity in order[-after:]:
        assert torch.equal(memory.prototypes_of(torch.tensor([identity]))[0], rows[identity])
    memory.state.validate()
    for new in range(after):  # and the oldest go first
        memory.update(torch.randn(1, DIM), torch.tensor([1000 + new]))
        left = order[-after:]
        room = after - len(left)
        gone = [identity for identity in left if memory.lookup(torch.tensor([identity])) < 0]
        assert gone == left[: max(0, new + 1 - room)]


def _oldest(memory: pmk.PrototypeMemory, policy: str, slots: int) -> torch.Tensor:
    start = int(memory.cursor)
    order = (torch.arange(slots) + start) % slots if policy == "fifo" else memory.stamps[:slots].argsort(stable=True)
    identities = memory.identities[order]
    return identities[identities >= 0]


def test_margins_with_state_and_margins_of_ones_own() -> None:
    head = pmk.MarginSoftmaxLoss(5, DIM, margin=pmk.AdaFace())
    schedule = pmk.HeadSchedule(head, margin=lambda step: 0.1 * (1 + step))
    schedule.step()
    assert head.margin.m == pytest.approx(0.2)
    schedule = pmk.HeadSchedule(head, margin=lambda step: pmk.CosFace(0.1) if step else pmk.ArcFace(0.2))
    schedule.step()
    assert head.margin == pmk.CosFace(0.1)


def test_what_cannot_be_is_an_error() -> None:
    head, loss_fn = pmk.MarginSoftmaxLoss(5, DIM), pmk.PrototypeMemoryLoss(DIM, 8)
    with pytest.raises(ValueError, match="capacity must be left out for MarginSoftmaxLoss"):
        pmk.HeadSchedule(head, capacity=lambda step: 3)
    with pytest.raises(TypeError, match="scale must be a function of the step, got float"):
        pmk.HeadSchedule(head, scale=3.0)
    with pytest.raises(TypeError, match="head must be a training head"):
        pmk.HeadSchedule(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="capacity must be at most 8"):
        pmk.HeadSchedule(loss_fn, capacity=lambda step: 9)
    with pytest.raises(ValueError, match=r"refresh_ratio must be in \[0, 1\]"):
        pmk.HeadSchedule(loss_fn, refresh_ratio=lambda step: 2.0)
    with pytest.raises(ValueError, match="margin must give a margin, not a number, for DSoftmax"):
        pmk.HeadSchedule(pmk.DSoftmaxLoss(5, DIM), margin=lambda step: 0.3)
    with pytest.raises(ValueError, match="k must be left out for CurricularFace"):
        pmk.HeadSchedule(pmk.MarginSoftmaxLoss(5, DIM, mining=pmk.CurricularFace()), k=lambda step: 3)
    learnable = pmk.PrototypeMemoryLoss(DIM, 8, prototype_gradient="memory")
    with pytest.raises(ValueError, match="learnable memory must use all its slots"):
        learnable.memory.use(4)
    loss_fn.memory.use(2)
    with pytest.raises(ValueError, match=r"at least 3, the number of identities in labels, got 2"):
        loss_fn(torch.randn(3, DIM), torch.tensor([1, 2, 3]))
