"""State of modules: it keeps its dtypes, refuses what cannot be, and starts over."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from protomem_kernels import (
    AdaFace,
    CurricularFace,
    ElasticFace,
    MarginSoftmaxLoss,
    MemoryState,
    PrototypeMemory,
    PrototypeMemoryLoss,
    RecognizabilityQuality,
)
from protomem_kernels.state import StatefulModule
from tests import oracles

DIM = 8


def batch(seed=0, size=12, identities=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, DIM, generator=generator), torch.randint(0, identities, (size,), generator=generator)


def full_head(**options):
    torch.manual_seed(0)
    options = {"margin": AdaFace(), "mining": CurricularFace(), "quality": RecognizabilityQuality(DIM), **options}
    return PrototypeMemoryLoss(DIM, 7, **options)


def filled(steps=3, **options):
    memory = PrototypeMemory(7, DIM, **options)
    for step in range(steps):
        memory.update(*batch(step))
    return memory


# dtypes

CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "type": lambda module: module.type(torch.float16),
    "double": lambda module: module.double(),
    "parent": lambda module: nn.Sequential(module).half()[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_statistics_keep_their_dtype_and_run_on_whatever_the_module_is_cast_to(cast):
    plain, other = full_head(), cast(full_head())
    for step in range(60):
        e, labels = batch(step)
        e = e / e.norm(dim=1, keepdim=True) * (30 + 3 * torch.randn(len(e), 1))
        for loss_fn in (plain, other):
            loss_fn.quality.update_unrecognizable(e[:2])
            loss_fn(e, labels)
    assert other.memory.prototypes.dtype == cast(nn.Linear(1, 1)).weight.dtype
    for name, value in other.state_dict().items():
        if name != "memory.prototypes":
            assert value.dtype == plain.state_dict()[name].dtype, name
    assert float(other.margin.mean) == pytest.approx(float(plain.margin.mean), rel=1e-6)
    assert float(other.margin.std) == pytest.approx(float(plain.margin.std), rel=1e-6)
    assert float(plain.margin.mean) > 24  # it has moved
    assert float(other.mining.t) == pytest.approx(float(plain.mining.t), abs=0.01)
    assert torch.allclose(other.quality.unrecognizable, plain.quality.unrecognizable, atol=1e-6)
    assert torch.equal(other.memory.identities, plain.memory.identities)


def test_statistics_are_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        state = full_head().state_dict()
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_loading_with_assign_keeps_the_dtype_of_statistics():
    loss_fn = full_head()
    state = {k: v.half() if v.is_floating_point() else v for k, v in loss_fn.state_dict().items()}
    loss_fn.load_state_dict(state, assign=True)
    assert loss_fn.margin.mean.dtype == loss_fn.mining.t.dtype == loss_fn.quality.unrecognizable.dtype == torch.float32
    assert loss_fn.memory.prototypes.dtype == torch.float16


@pytest.mark.parametrize("learnable", [False, True])
def test_rows_are_of_unit_length_after_a_change_to_a_finer_dtype(learnable):
    memory = filled(dtype=torch.bfloat16, learnable=learnable)
    memory.float()
    memory.state.validate()
    loaded = PrototypeMemory(7, DIM, learnable=learnable)
    loaded.load_state_dict(filled(dtype=torch.bfloat16).state_dict())
    loaded.state.validate()
    assert torch.equal(loaded.prototypes, memory.prototypes)


# what is no state


def corrupt(state, name, index, value):
    tensor = state[name]
    if index is None:
        state[name] = value(tensor)
    else:
        tensor[index] = value


# Tensor, place, value, and what the message has to say; the memory has 7 slots, of which 5 are occupied.
IMPOSSIBLE = {
    "twice": ("identities", 1, 0, r"identities must be in one slot each, got 0 in slots"),
    "below none": ("identities", 6, -2, r"identities must be at least 0, or -1 for none, got -2 in slot 6"),
    "nan": ("prototypes", (0, 3), float("nan"), r"prototypes must be of length 1 in occupied slots.*nan in slot 0"),
    "inf": ("prototypes", (2, 0), float("inf"), r"prototypes must be of length 1 .*slot 2"),
    "longer": ("prototypes", 3, torch.ones(DIM), r"prototypes must be of length 1 .*length 2\.82843 in slot 3"),
    "gone": ("prototypes", 1, torch.zeros(DIM), r"prototypes must be of length 1 .*length 0 in slot 1"),
    "row in an empty slot": ("prototypes", 6, torch.ones(DIM), r"prototypes must be zero in empty slots.*slot 6"),
    "floats": ("identities", None, lambda t: t.float(), r"identities must be int64.* got torch.float32"),
    "stamps of int32": ("stamps", None, lambda t: t.int(), r"stamps must be int64, got torch.int32"),
    "cursor past the end": ("cursor", None, lambda t: t * 0 + 7, r"cursor must be in \[0, 7\), got 7"),
    "cursor below": ("cursor", None, lambda t: t * 0 - 1, r"cursor must be in \[0, 7\), got -1"),
    "clock": ("clock", None, lambda t: t * 0 - 3, r"clock must be at least 0, got -3"),
    "stamp from the future": ("stamps", 0, 99, r"stamps must be in \[0, clock\], clock being 3, got 99 in slot 0"),
    "shape": ("stamps", None, lambda t: t[:3], r"stamps must have shape \(7,\)"),
    "integer rows": ("prototypes", None, lambda t: t.long(), r"prototypes must be floating point"),
    "a list": ("stamps", None, lambda t: t.tolist(), r"stamps (is a list, no tensor|must be a tensor of shape)"),
}
each_impossible = pytest.mark.parametrize(("name", "index", "value", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)


@each_impossible
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_validate_names_the_tensor_and_the_rule(name, index, value, words, dtype):
    state = filled(dtype=dtype).state_dict()
    MemoryState(**state).validate()
    corrupt(state, name, index, value)
    with pytest.raises((TypeError, ValueError), match=rf"^state\.{words}"):
        MemoryState(**state).validate()


@each_impossible
def test_a_state_that_cannot_be_is_refused_and_nothing_is_loaded(name, index, value, words):
    loss_fn = full_head()
    loss_fn(*batch())
    bad = full_head()
    for step in range(3):
        bad(*batch(step))
    bad = copy.deepcopy(bad.state_dict())
    corrupt(bad, f"memory.{name}", index, value)
    before = oracles.snapshot(loss_fn)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"state_dict in 'memory\.' holds no state of PrototypeMemory: {words}"):
            loss_fn.load_state_dict(bad, strict=strict)
        assert oracles.same(before, loss_fn.state_dict())
    alone = {key.removeprefix("memory."): v for key, v in bad.items() if key.startswith("memory.")}
    with pytest.raises(RuntimeError, match=rf"state_dict holds no state of PrototypeMemory: {words}"):
        loss_fn.memory.load_state_dict(alone)
    assert oracles.same(before, loss_fn.state_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("margin.mean", float("nan")),
        ("margin.mean", -1.0),
        ("margin.std", float("inf")),
        ("mining.t", 1.5),
        ("mining.t", float("nan")),
        ("quality.unrecognizable", float("nan")),
        ("quality.unrecognizable", 7.0),
    ],
)
def test_statistics_that_cannot_be_are_refused_before_anything_is_loaded(key, value):
    loss_fn, other = full_head(), full_head()
    other(*batch())
    bad = copy.deepcopy(other.state_dict())
    bad[key].fill_(value)
    before = oracles.snapshot(loss_fn)
    with pytest.raises(RuntimeError, match=rf"{key.partition('.')[2]} must be finite and in \["):
        loss_fn.load_state_dict(bad)
    assert oracles.same(before, loss_fn.state_dict())
    head = MarginSoftmaxLoss(5, DIM, margin=AdaFace())
    state = copy.deepcopy(head.state_dict())
    state["weight"] += 1
    state["margin.mean"].fill_(torch.nan)
    before = oracles.snapshot(head)
    with pytest.raises(RuntimeError, match="mean must be finite"):
        head.load_state_dict(state)
    assert oracles.same(before, head.state_dict())


def test_a_part_of_a_memory_is_refused():
    memory, state = filled(), filled(5).state_dict()
    del state["identities"], state["stamps"]
    before = oracles.snapshot(memory)
    with pytest.raises(RuntimeError, match="five tensors must come together, identities, stamps lack"):
        memory.load_state_dict(state, strict=False)
    assert oracles.same(before, memory.state_dict())
    assert memory.load_state_dict({}, strict=False).missing_keys


def test_an_average_of_buffers_is_noticed_and_a_copy_of_them_is_not():
    loss_fn = full_head()
    model = nn.ModuleDict({"encoder": nn.Linear(1, 1), "loss": loss_fn})  # AveragedModel asks for a parameter
    averaged, copied = AveragedModel(model, use_buffers=True), AveragedModel(model)
    for step in range(4):
        e, labels = batch(step, size=6, identities=40)
        loss_fn(e, labels)
        averaged.update_parameters(model)
        copied.update_parameters(model)
    e, labels = batch(3, size=6, identities=40)
    assert torch.isfinite(copied.module["loss"].eval()(e, labels))
    for call in (lambda m: m(e, labels), lambda m: m.memory.lookup(labels), lambda m: m.memory.update(e, labels)):
        with pytest.raises(ValueError, match=r"memory\.\w+ must be"):
            call(averaged.module["loss"].eval())
    with pytest.raises(RuntimeError, match="holds no state of PrototypeMemory"):
        full_head().load_state_dict(averaged.module["loss"].state_dict())


def test_a_memory_that_others_write_is_validated_once(monkeypatch):
    times = []
    validate = MemoryState.validate
    monkeypatch.setattr(MemoryState, "validate", lambda *args: (times.append(1), validate(*args)))
    loss_fn, (e, labels) = full_head(), batch()
    for _ in range(3):
        loss_fn(e, labels)
        loss_fn.memory.lookup(labels)
    loss_fn.memory.reset()
    loss_fn.half().float()
    loss_fn(e, labels)
    assert times == []  # its own work costs nothing
    loss_fn.memory.identities[6] = 1234
    with pytest.raises(ValueError, match=r"memory\.prototypes must be of length 1 in occupied"):
        loss_fn(e, labels)
    loss_fn.memory.identities[6] = -1
    for _ in range(3):
        loss_fn(e, labels)
    assert len(times) == 2


# starting over


@pytest.mark.parametrize("make", [full_head, lambda: MarginSoftmaxLoss(5, DIM, margin=AdaFace())])
def test_every_module_with_tensors_of_its_own_starts_over_after_to_empty(make):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.fill_(123)
    for part in module.modules():
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            part.reset_parameters()
    torch.manual_seed(0)
    fresh = make()
    state = {k: v for k, v in module.state_dict().items() if k != "weight"}  # drawn at random
    assert oracles.same(state, {k: v for k, v in fresh.state_dict().items() if k != "weight"})


def test_every_stateful_module_of_the_package_says_how_it_starts_over():
    def subclasses(kind):
        return {kind}.union(*(subclasses(c) for c in kind.__subclasses__()))

    for kind in subclasses(StatefulModule) - {StatefulModule}:
        assert kind.reset_parameters is not StatefulModule.reset_parameters, kind


# generators


def elastic(seed=7):
    return PrototypeMemoryLoss(DIM, 7, margin=ElasticFace(generator=torch.Generator().manual_seed(seed)))


def through_state_dict(loss_fn):
    twin, stream = elastic(seed=1), io.BytesIO()
    torch.save(loss_fn.state_dict(), stream)
    stream.seek(0)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    return twin


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "state_dict": through_state_dict,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_margin_with_its_own_generator_draws_on(copied):
    loss_fn = elastic()
    for step in range(3):
        loss_fn(*batch(step))
    twin = copied(loss_fn)
    for step in range(3):
        a, b = loss_fn(*batch(step)), twin(*batch(step))
        assert torch.equal(a, b)
    assert not torch.equal(loss_fn(*batch(0)), elastic(seed=8)(*batch(0)))


def test_the_generators_state_is_asked_for_and_only_where_there_is_one():
    assert "margin.generator_state" in elastic().state_dict()
    plain = PrototypeMemoryLoss(DIM, 7, margin=ElasticFace())
    assert not [key for key in plain.state_dict() if key.startswith("margin")]
    with pytest.raises(RuntimeError, match=r"Missing key.*margin\.generator_state"):
        elastic().load_state_dict(plain.state_dict())
    loss_fn = elastic()
    for wrong in (None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)):
        before, other = oracles.snapshot(loss_fn), elastic()
        other(*batch())
        with pytest.raises(RuntimeError, match=r"generator_state must be \(\d+,\) of torch.uint8.* got"):
            loss_fn.load_state_dict({**other.state_dict(), "margin.generator_state": wrong})
        assert oracles.same(before, loss_fn.state_dict())
    margin = ElasticFace(generator=torch.Generator().manual_seed(5))
    first = margin(torch.zeros(4), torch.ones(4))
    margin.reset_parameters()
    assert torch.equal(first, margin(torch.zeros(4), torch.ones(4)))
