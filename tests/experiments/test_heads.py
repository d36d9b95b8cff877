"""Heads: class weights that move only when they are used, and what each head keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from protomem_kernels.data.sampling import DoppelgangerBatchSampler
from protomem_kernels.experiments.heads import build_head
from protomem_kernels.training.errors import RunError

C, D = 24, 16


def step(head, embeddings, labels):
    loss = head(embeddings, labels, None)
    for optimizer in head.optimizers:
        optimizer.zero_grad()
    loss.backward()
    head.before_step()
    for optimizer in head.optimizers:
        optimizer.step()
    return loss


def built(trial, **own):
    torch.manual_seed(0)
    return build_head(trial(**own), nn.Linear(2, D), torch.arange(C))


def test_rows_that_a_step_does_not_use_stay_where_they_are(trial):
    head = built(trial, head="sampled", share=0.5)
    for _ in range(4):
        before = head.loss.weight.detach().clone()
        step(head, torch.randn(6, D), torch.tensor([0, 1, 2, 3, 4, 5]))
        moved = (head.loss.weight != before).any(1)
        assert int(moved.sum()) == 12
        assert bool(moved[:6].all())


def test_class_weights_that_all_steps_use_are_stepped_as_adam_does(trial):
    head = built(trial, head="full", head_learning_rate=0.05)
    plain = nn.Parameter(head.loss.weight.detach().clone())
    theirs = built(trial, head="full").loss
    theirs.weight = plain
    adam = torch.optim.Adam([plain], lr=0.05, betas=(0.9, 0.99))
    embeddings, labels = torch.randn(6, D), torch.randint(C, (6,))
    step(head, embeddings, labels)
    theirs(embeddings, labels).backward()
    adam.step()
    clear = plain.grad.abs() > 1e-4  # below that their epsilons, which differ, count
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(head.loss.weight[clear], plain[clear], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("own", "held"),
    [
        ({"share": 0.5}, 12 * (D * 4 + 8 + 8) + 2 * 8),  # rows, identities, stamps; cursor and clock
        ({"head": "full"}, 3 * C * D * 4),  # rows and two moments
        ({"head": "sampled", "share": 0.5}, 3 * C * D * 4),
    ],
)
def test_bytes_that_a_head_holds(trial, own, held):
    head = built(trial, **own)
    step(head, torch.randn(6, D, requires_grad=True), torch.arange(6))
    assert head.held_bytes == held


def test_stored_prototypes_are_those_of_the_labels(trial):
    head = built(trial, share=0.5)
    head(torch.eye(D)[:3], torch.tensor([7, 9, 11]), None)
    rows, there = head.prototypes(torch.tensor([11, 8, 7]))
    assert there.tolist() == [True, False, True]
    assert torch.equal(rows[there], torch.eye(D)[[2, 0]])
    weights = built(trial, head="full")
    assert torch.equal(weights.prototypes(torch.tensor([3]))[0], weights.loss.weight[[3]])


def test_batches_of_look_alikes_ask_the_memory(trial):
    labels = torch.arange(C).repeat_interleave(2)
    head = built(trial, sampler="doppelgangers")
    sampler = head.sampler(trial(sampler="doppelgangers"), labels, 0)
    assert isinstance(sampler, DoppelgangerBatchSampler)
    assert sampler.memory is head.loss.memory


@pytest.mark.parametrize(
    "own", [{"quality": "norm"}, {"weights": "true"}, {"prototype_gradient": "fresh"}, {"sampler": "doppelgangers"}]
)
def test_what_needs_a_memory_is_refused_to_class_weights(trial, own):
    with pytest.raises(RunError, match=f"{next(iter(own))} .* needs the head memory, got full"):
        built(trial, head="full", **own).sampler(trial(head="full", **own), torch.arange(C), 0)


def test_the_gradient_reaches_the_rows_of_a_memory_that_is_a_parameter(trial):
    head = built(trial, prototype_gradient="memory")
    step(head, torch.randn(6, D), torch.arange(6))
    before = head.loss.memory.prototypes.detach().clone()
    step(head, torch.randn(6, D), torch.arange(6, 12))
    moved = (head.loss.memory.prototypes != before).any(1)
    assert int(moved.sum()) == 12, "rows of the first step moved too"
