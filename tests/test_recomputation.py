"""Activation checkpointing runs a forward pass again: the step's state moves once, and its gradient is the loss's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from protomem_kernels import (
    AdaFace,
    ArcFace,
    CurricularFace,
    ElasticFace,
    MarginSoftmaxLoss,
    MemoryState,
    PrototypeMemoryLoss,
    RecognizabilityQuality,
    enqueue_,
)
from tests import oracles

DIM = 8
reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
CASES = {
    "none": {},
    "fresh": {"prototype_gradient": "fresh"},
    "memory": {"prototype_gradient": "memory"},
    "AdaFace": {"margin": AdaFace},
    "CurricularFace": {"mining": CurricularFace},
    "ElasticFace": {"margin": lambda: ElasticFace(generator=torch.Generator().manual_seed(3))},
    "quality": {"prototype_gradient": "fresh", "quality": lambda: RecognizabilityQuality(DIM, detach=False)},
    "lru, small": {"policy": "lru", "capacity": 9},
}


def model(options):
    torch.manual_seed(0)
    options = {key: value() if callable(value) else value for key, value in options.items()}
    encoder = nn.Sequential(nn.Linear(6, DIM), nn.Dropout(0.2))
    loss_fn = PrototypeMemoryLoss(DIM, **{"capacity": 40, **options})
    if loss_fn.prototype_gradient == "memory":
        loss_fn.attach_optimizer(torch.optim.SGD(loss_fn.parameters(), lr=0.0))
    return encoder, loss_fn


def batch(seed):
    torch.manual_seed(seed)  # the dropout's too
    return torch.randn(14, 6), torch.randint(0, 5 + seed, (14,))


def whole(encoder, loss_fn, use_reentrant=False):
    def forward(x, labels):
        e = encoder(x)
        if isinstance(loss_fn.quality, RecognizabilityQuality):
            loss_fn.quality.update_unrecognizable(e[:2])
        return loss_fn(e, labels)

    def checkpointed(x, labels):
        return checkpoint(forward, x.requires_grad_(), labels, use_reentrant=use_reentrant)

    return forward, checkpointed


@reentrant
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_encoder_and_head_in_one_region_take_the_step_once(options, use_reentrant):
    plain, checked = model(options), model(options)
    for step in range(5):
        losses = []
        for (encoder, loss_fn), run in (
            (plain, whole(*plain)[0]),
            (checked, whole(*checked, use_reentrant=use_reentrant)[1]),
        ):
            encoder.zero_grad()
            loss_fn.zero_grad()
            x, labels = batch(step)
            loss = run(x, labels)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        assert oracles.same(plain[1].state_dict(), checked[1].state_dict())
        for a, b in zip(plain[0].parameters(), checked[0].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for a, b in zip(plain[1].parameters(), checked[1].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("options", [{}, {"prototype_gradient": "fresh"}, {"margin": AdaFace}], ids=str)
@pytest.mark.parametrize("same_labels", [False, True])
def test_a_step_that_is_not_the_last_one_cannot_be_recomputed(options, same_labels):
    encoder, loss_fn = model(options)
    _, run = whole(encoder, loss_fn)
    (a, labels), (b, others) = batch(1), batch(2)
    loss = run(a, labels) + run(b, labels if same_labels else others)
    state = oracles.snapshot(loss_fn)
    with pytest.raises(RuntimeError, match=r"is recomputed within a backward pass .* Checkpoint the encoder alone"):
        loss.backward()
    assert oracles.same(state, loss_fn.state_dict())


def test_what_writes_the_memory_in_between_is_noticed():
    encoder, loss_fn = model({})
    loss = whole(encoder, loss_fn)[1](*batch(0))
    loss_fn.memory.update(torch.randn(3, DIM), torch.tensor([70, 71, 72]))
    with pytest.raises(RuntimeError, match="a memory's update is recomputed"):
        loss.backward()


def test_the_encoder_alone_may_be_checkpointed_however_many_steps_share_a_backward_pass():
    results = []
    for through in (lambda encoder, x: encoder(x), lambda encoder, x: checkpoint(encoder, x, use_reentrant=False)):
        encoder, loss_fn = model({"margin": AdaFace})
        encoder.eval()
        loss = sum(loss_fn(through(encoder, x), labels) for x, labels in map(batch, range(3)))
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in encoder.parameters()), *loss_fn.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("parts", [{"margin": AdaFace}, {"mining": CurricularFace, "margin": lambda: ArcFace(0.3)}])
def test_statistics_of_a_head_with_class_weights_move_once(parts):
    def make():
        torch.manual_seed(0)
        return MarginSoftmaxLoss(9, DIM, **{name: part() for name, part in parts.items()})

    plain, checked = make(), make()
    for step in range(3):
        e = 30 * torch.randn(12, DIM, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(12) % 9
        plain.zero_grad()
        checked.zero_grad()
        plain(e, labels).backward()
        checkpoint(checked, e, labels, use_reentrant=False).backward()
        assert oracles.same(plain.state_dict(), checked.state_dict())
        assert torch.equal(plain.weight.grad, checked.weight.grad)


def test_backward_may_run_twice_over_one_step():
    encoder, loss_fn = model({})
    loss = whole(encoder, loss_fn)[1](*batch(0))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in encoder.parameters()]
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(encoder.parameters(), once, strict=True))


def test_a_compiled_region_that_writes_the_memory_is_refused_when_it_runs_again():
    """Compiled code has no step to replay: the operator itself says that it must not run."""
    encoder, loss_fn = model({})
    encoder.eval()
    compiled = torch.compile(lambda x, labels: loss_fn(encoder(x), labels), backend="aot_eager", fullgraph=True)
    x, labels = batch(0)
    loss = checkpoint(compiled, x.requires_grad_(), labels, use_reentrant=False)
    before = oracles.snapshot(loss_fn)
    with pytest.raises(RuntimeError, match=r"enqueue_ was called within a backward pass.*checkpoint the encoder"):
        loss.backward()
    assert oracles.same(before, loss_fn.state_dict())


def test_the_operator_alone_is_refused_within_a_backward_pass():
    state = MemoryState.empty(4, DIM)
    x = torch.randn(3, DIM, requires_grad=True)
    x.register_hook(lambda grad: enqueue_(state, grad, torch.arange(3)) and None)
    with pytest.raises(RuntimeError, match="enqueue_ was called within a backward pass"):
        x.sum().backward()
    assert int(state.clock) == 0
    enqueue_(state, x, torch.arange(3))
    assert int(state.clock) == 1
