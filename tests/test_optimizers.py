"""The optimiser's state of a slot that a new identity takes: a new parameter's, in that optimiser's own way."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from protomem_kernels import PrototypeMemoryLoss
from protomem_kernels.optimizers import clear_rows

M, D = 64, 64  # bitsandbytes keeps 32 bits for parameters of less than 4,096 numbers


def slots(*numbers):
    return torch.zeros(M, dtype=torch.bool).index_fill_(0, torch.tensor(numbers), True)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.03),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_cleared_rows_hold_what_a_new_parameter_begins_with(make):
    """The next step of a cleared row is the first step of a row of its own, where rows do not share statistics."""
    parameter = torch.nn.Parameter(torch.randn(M, D))
    optimizer = make([parameter])
    for _ in range(4):
        parameter.grad = torch.randn(M, D)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
    clear_rows(optimizer, parameter, slots(3, 60))
    for name, value in optimizer.state[parameter].items():
        begins = {"sum": 0.5, "step_size": 0.03}.get(name, 0.0)
        if isinstance(value, torch.Tensor) and value.shape[:1] == (M,):
            assert (value[slots(3, 60)] == begins).all(), name
            assert torch.equal(value[~slots(3, 60)], before[name][~slots(3, 60)]), name
            assert (before[name][slots(3, 60)] != begins).any(), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name])


class EightBit(torch.optim.Optimizer):
    """Momentum kept in 8 bits, in the layout of bitsandbytes: codes, what they mean, one scale per block of 256."""

    def __init__(self, params, moments=1):
        super().__init__(params, {"lr": 0.01})
        self.moments = moments

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state, meanings = self.state[p], torch.arange(-127, 128) / 127
            shape = p.shape if self.moments == 1 else (self.moments, *p.shape)
            if not state:
                zero = int(meanings.abs().argmin())
                state |= {
                    "state1": torch.full(shape, zero, dtype=torch.uint8),
                    "qmap1": torch.cat([meanings, meanings[-1:]]),
                    "absmax1": torch.zeros(p.numel() * self.moments // 256),
                }
            m = 0.9 * dequantized(state) + p.grad
            state["absmax1"] = m.reshape(-1, 256).abs().amax(dim=1).clamp(min=1e-12)
            scaled = m.reshape(-1, 256) / state["absmax1"][:, None]
            state["state1"] = ((scaled + 1) * 127).round().to(torch.uint8).reshape(shape)
            p.data -= 0.01 * dequantized(state).reshape(-1, *p.shape)[0]


def dequantized(state):
    codes = state["state1"]
    return (state["qmap1"][codes.long()].reshape(-1, 256) * state["absmax1"].reshape(-1, 1)).reshape(codes.shape)


def fresh_head(make):
    torch.manual_seed(0)
    loss_fn = PrototypeMemoryLoss(D, M, prototype_gradient="memory")
    optimizer = make(loss_fn.parameters())
    loss_fn.attach_optimizer(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(torch.randn(32, D), torch.randint(0, 500, (32,))).backward()
        optimizer.step()
    return loss_fn, optimizer


def assert_new_identities_begin_at_zero(loss_fn, optimizer):
    optimizer.zero_grad()
    loss = loss_fn(torch.randn(2, D), torch.tensor([9001, 9002]))
    rows = loss_fn.memory.lookup(torch.tensor([9001, 9002]))
    state = optimizer.state[loss_fn.memory.prototypes]
    moments = dequantized(state)
    assert (moments[..., rows, :] == 0).all()
    assert (moments != 0).any()
    before = loss_fn.memory.prototypes.detach()[rows].clone()
    loss.backward()
    optimizer.step()
    assert (before * loss_fn.memory.prototypes.detach()[rows]).sum(dim=1).min() > 0.9


@pytest.mark.parametrize("moments", [1, 2])
def test_eight_bit_state_is_cleared_to_the_code_of_zero(moments):
    assert_new_identities_begin_at_zero(*fresh_head(lambda p: EightBit(p, moments)))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_bitsandbytes(name):
    import bitsandbytes

    assert_new_identities_begin_at_zero(*fresh_head(lambda p: getattr(bitsandbytes.optim, name)(p, lr=0.01)))


def test_state_whose_zero_is_not_known_is_refused_and_nothing_is_cleared():
    class Quantised(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["codes"] = torch.ones(p.shape, dtype=torch.int8)

    loss_fn, optimizer = None, None
    with pytest.raises(TypeError, match=r"optimizer must keep state whose zero is known .*torch.int8 as 'codes'"):
        loss_fn, optimizer = fresh_head(lambda p: Quantised(p, lr=0.1, momentum=0.9))
    assert loss_fn is optimizer is None
