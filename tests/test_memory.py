"""``PrototypeMemory`` beside a plain list of slots (``oracles.DictMemory``), and all that a module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from protomem_kernels import PrototypeMemory, use_backend
from tests import oracles
from tests.ops.cases import each_backend_of_batches, interpreted

POLICIES = pytest.mark.parametrize("policy", ["fifo", "lru"])
HUGE = 2**63 - 1


def batches(steps, *, size=9, dim=5, identities=14, seed=0, dtype=torch.float64):
    """Random batches with ignored samples, repeated and huge identities."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        labels = torch.randint(-2, identities, (size,), generator=generator)
        labels = torch.where(labels == identities - 1, HUGE, labels)
        yield torch.randn(size, dim, generator=generator, dtype=torch.float64).to(dtype), labels


def filled(capacity=6, dim=4, *, steps=3, **kwargs):
    memory = PrototypeMemory(capacity, dim, **kwargs)
    for e, labels in batches(steps, size=4, dim=dim, dtype=torch.float32):
        memory.update(e, labels)
    return memory


@each_backend_of_batches
@POLICIES
@pytest.mark.parametrize("ratio", [0.2, 0.0, 1.0])
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32])
def test_update_and_lookup_are_those_of_the_list(backend, policy, ratio, labels_dtype):
    memory = PrototypeMemory(10, 5, refresh_ratio=ratio, policy=policy, dtype=torch.float64)
    model = oracles.DictMemory(10, 5, ratio=ratio, policy=policy)
    for e, labels in batches(4 if interpreted(backend) else 12):  # four batches fill it twice; the interpreter is slow
        labels = labels.clamp(max=2**31 - 1).to(labels_dtype)
        with use_backend(backend):
            targets = memory.update(e, labels)
        want = model.step(e, labels)
        assert targets.dtype == torch.int64
        assert torch.equal(targets, want)
        model.equals(memory, rtol=0, atol=1e-12)
        asked = [-1, -7, *range(14), 2**31 - 1]
        assert memory.lookup(torch.tensor(asked, dtype=labels_dtype)).tolist() == [model.slot(i) for i in asked]
        assert torch.equal(memory.occupied, model.occupied)
        assert len(memory) == sum(i >= 0 for i in model.identity)


@each_backend_of_batches
@POLICIES
def test_weights_shape_the_prototypes(backend, policy):
    memory = PrototypeMemory(20, 5, policy=policy, dtype=torch.float64)
    model = oracles.DictMemory(20, 5, policy=policy)
    generator = torch.Generator().manual_seed(4)
    for e, labels in batches(6):
        weights = torch.rand(9, generator=generator) * (torch.rand(9, generator=generator) < 0.7)
        with use_backend(backend):
            memory.update(e, labels, weights)
        model.step(e, labels, weights)
        model.equals(memory, rtol=0, atol=1e-7)  # the weights came in float32


def test_an_update_writes_in_eval_mode_and_never_tracks_gradient():
    memory = PrototypeMemory(4, 2).eval()
    targets = memory.update(torch.eye(2, requires_grad=True), torch.tensor([5, 6]))
    assert targets.tolist() == [0, 1]
    assert not memory.prototypes.requires_grad
    assert memory.identities.tolist() == [5, 6, -1, -1]


def test_broken_and_antipodal_identities_get_no_slot():
    memory = PrototypeMemory(6, 2)
    e = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [float("nan"), 1.0], [0.0, 0.0], [0.0, 2.0], [float("inf"), 1.0]])
    assert memory.update(e, torch.tensor([1, 1, 2, 3, 4, 5])).tolist() == [-1, -1, -1, -1, 0, -1]
    assert memory.identities.tolist() == [4, -1, -1, -1, -1, -1]
    assert torch.isfinite(memory.prototypes).all()


@POLICIES
def test_identities_of_one_batch_never_evict_each_other_even_if_one_is_antipodal(policy):
    """Operator 2: the ring passes over slots whose identity is in this batch, whatever came in."""
    memory = PrototypeMemory(2, 2, policy=policy)
    memory.update(torch.eye(2), torch.tensor([1, 2]))
    memory.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]), torch.tensor([1, 1, 3]))
    assert memory.identities.tolist() == [1, 3]


def test_fifo_passes_over_the_batch_and_wraps():
    memory = PrototypeMemory(3, 2)
    memory.update(torch.rand(3, 2) + 0.1, torch.tensor([10, 11, 12]))
    assert memory.update(torch.rand(2, 2) + 0.1, torch.tensor([10, 20])).tolist() == [0, 1]
    assert (memory.identities.tolist(), int(memory.cursor)) == ([10, 20, 12], 2)
    assert memory.update(torch.rand(2, 2) + 0.1, torch.tensor([31, 30])).tolist() == [0, 2]
    assert (memory.identities.tolist(), int(memory.cursor)) == ([31, 20, 30], 1)


def test_lru_takes_what_was_written_longest_ago():
    memory = PrototypeMemory(3, 2, policy="lru")
    for label in (10, 11, 12, 10):
        memory.update(torch.ones(1, 2), torch.tensor([label]))
    assert memory.update(torch.ones(1, 2), torch.tensor([20])).tolist() == [1]
    assert (memory.identities.tolist(), int(memory.cursor)) == ([10, 20, 12], 0)


@POLICIES
def test_more_identities_than_slots_is_refused_and_changes_nothing(policy):
    memory = filled(3, 4, steps=1, policy=policy)
    before = oracles.snapshot(memory)
    with pytest.raises(ValueError, match=r"at least 4, the number of identities in labels, got 3"):
        memory.update(torch.randn(5, 4), torch.tensor([1, 2, 3, 4, -1]))
    assert oracles.same(before, memory.state_dict())


def test_more_samples_than_slots_is_fine():
    memory, model = PrototypeMemory(2, 3, dtype=torch.float64), oracles.DictMemory(2, 3)
    for seed in range(3):
        e = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        labels = torch.tensor([4, 8, 4, 4, -9, 8, 8, 8, -9]) + seed
        assert torch.equal(memory.update(e, labels), model.step(e, labels))
        model.equals(memory, rtol=0, atol=1e-12)


def test_an_empty_batch_only_moves_the_clock():
    memory = filled()
    before = oracles.snapshot(memory)
    assert memory.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    after = oracles.snapshot(memory)
    assert int(after.pop("clock")) == int(before.pop("clock")) + 1
    assert oracles.same(before, after)
    assert memory.lookup(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_doppelgangers_by_sorting_all_pairs(k, dtype):
    memory = PrototypeMemory(12, 4, dtype=dtype)
    for e, labels in batches(3, dim=4, identities=9):
        memory.update(e, labels)
    w, ids = memory.prototypes.double(), memory.identities.tolist()
    asked = [3, HUGE, -1, 1234, *[i for i in ids if i >= 0]]
    cosines, found = memory.doppelgangers(torch.tensor(asked), k)
    assert cosines.shape == found.shape == (len(asked), k)
    for row, identity in enumerate(asked):
        want = []
        if identity >= 0 and identity in ids:
            at = ids.index(identity)
            others = [s for s in range(12) if s != at and ids[s] >= 0]
            query = w[at] / w[at].norm()
            want = sorted(((float(query @ w[s]), -s) for s in others), reverse=True)[:k]
        assert found[row].tolist() == [ids[-s] for _, s in want] + [-1] * (k - len(want))
        got = cosines[row].double()
        assert torch.isinf(got[len(want) :]).all()
        torch.testing.assert_close(
            got[: len(want)], torch.tensor([c for c, _ in want], dtype=torch.float64), rtol=0, atol=2e-7
        )


def test_doppelgangers_of_an_empty_memory_and_of_no_labels():
    memory = PrototypeMemory(3, 2)
    cosines, identities = memory.doppelgangers(torch.tensor([1, 2]), 2)
    assert cosines.tolist() == [[float("-inf")] * 2] * 2
    assert identities.tolist() == [[-1, -1]] * 2
    cosines, identities = filled().doppelgangers(torch.zeros(0, dtype=torch.int64), 2)
    assert cosines.shape == identities.shape == (0, 2)


def test_reset_is_a_new_memory():
    memory = filled()
    state = memory.state
    memory.reset()
    assert oracles.same(memory.state_dict(), PrototypeMemory(6, 4).state_dict())
    assert all(a is b for a, b in zip(state, memory.state, strict=True))  # in place: whoever holds the tensors sees it
    assert len(memory) == 0


def test_length_truth_and_repr():
    memory = PrototypeMemory(6, 4, policy="lru", refresh_ratio=0.75)
    assert len(memory) == 0
    assert bool(memory)
    assert (
        repr(memory) == "PrototypeMemory(0/6 identities, embedding_dim=4, refresh_ratio=0.75, policy='lru', "
        "dtype=torch.float32)"
    )
    memory.update(torch.ones(1, 4), torch.tensor([5]))
    assert "1/6 identities" in repr(memory)
    assert (memory.capacity, memory.embedding_dim) == (6, 4)
    assert "?/6 identities" in repr(memory.to("meta"))


def test_defaults_are_those_of_the_contract():
    memory = PrototypeMemory(2, 3)
    assert (memory.refresh_ratio, memory.policy, memory.prototypes.dtype) == (0.5, "fifo", torch.float32)
    assert set(memory.state_dict()) == {"prototypes", "identities", "stamps", "cursor", "clock"}
    assert list(memory.parameters()) == []


# What a module must survive


@POLICIES
@pytest.mark.parametrize("through", ["state_dict", "file", "deepcopy", "pickle"])
def test_a_copy_continues_bit_for_bit(policy, through, tmp_path):
    memory = filled(5, 5, policy=policy, steps=4)
    if through == "deepcopy":
        twin = copy.deepcopy(memory)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(memory))
    else:
        state = memory.state_dict()
        if through == "file":
            torch.save(state, tmp_path / "memory.pt")
            state = torch.load(tmp_path / "memory.pt", weights_only=True)
        twin = PrototypeMemory(5, 5, policy=policy)
        twin.load_state_dict(state)
    assert oracles.same(memory.state_dict(), twin.state_dict())
    assert int(memory.clock) == 4
    for e, labels in batches(8, size=5, seed=9, dtype=torch.float32):
        assert torch.equal(memory.update(e, labels), twin.update(e, labels))
        assert oracles.same(memory.state_dict(), twin.state_dict())
        assert twin.prototypes.data_ptr() != memory.prototypes.data_ptr()


def test_a_state_dict_of_another_capacity_is_refused():
    with pytest.raises(RuntimeError, match=r"prototypes must have shape \(5, 4\) like this memory's, got \(6, 4\)"):
        PrototypeMemory(5, 4).load_state_dict(filled(6, 4).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@POLICIES
@each_backend_of_batches
def test_every_dtype_keeps_unit_rows(backend, dtype, policy):
    memory = PrototypeMemory(10, 16, dtype=dtype, policy=policy)
    model = oracles.DictMemory(10, 16, policy=policy)
    for e, labels in batches(4 if interpreted(backend) else 10, dim=16, dtype=dtype):
        with use_backend(backend):
            memory.update(e, labels)
        model.step(e.double(), labels)
        # The model refreshes the rounded row, as the memory does.
        one_rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
        model.equals(memory, rtol=0, atol=max(one_rounding, 1e-6 if dtype != torch.float64 else 0))
        model.row = [row.clone() for row in memory.prototypes.double()]
        assert memory.prototypes.dtype == dtype
        lengths = memory.prototypes.double().norm(dim=1)
        assert (lengths[memory.occupied] - 1).abs().max() <= 2 * torch.finfo(dtype).eps + 1e-7
        assert (lengths[~memory.occupied] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype_converts_the_rows_alone(dtype):
    memory = filled()
    before = oracles.snapshot(memory)
    assert memory.to(dtype) is memory
    after = memory.state_dict()
    rows, old = after.pop("prototypes"), before.pop("prototypes")
    if dtype == torch.float64:  # what was rounded to float32 is of unit length to float64 now
        torch.testing.assert_close(rows, oracles.unit(old.double()), rtol=0, atol=1e-15)
    else:
        assert torch.equal(rows, old.to(dtype))
    assert oracles.same(before, after)
    assert memory.update(torch.randn(2, 4), torch.tensor([90, 91])).min() >= 0
    assert memory.prototypes.dtype == dtype


def test_refresh_ratio_zero_keeps_every_bit():
    memory = PrototypeMemory(3, 4, refresh_ratio=0.0, dtype=torch.bfloat16)
    memory.update(torch.randn(2, 4), torch.tensor([1, 2]))
    before = memory.prototypes.clone()
    memory.update(torch.randn(2, 4), torch.tensor([1, 2]))
    assert torch.equal(before, memory.prototypes)
    assert memory.stamps.tolist() == [2, 2, 0]


def test_learnable_prototypes_are_a_parameter_that_updates_write():
    memory = PrototypeMemory(4, 2, learnable=True)
    assert isinstance(memory.prototypes, nn.Parameter)
    assert [name for name, _ in memory.named_parameters()] == ["prototypes"]
    assert "prototypes" in memory.state_dict()
    parameter = memory.prototypes
    memory.update(torch.tensor([[3.0, 4.0]]), torch.tensor([7]))
    assert memory.prototypes is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    torch.testing.assert_close(parameter[0].detach(), torch.tensor([0.6, 0.8]))
    _, identities = memory.doppelgangers(torch.tensor([7]), 1)
    assert identities.tolist() == [[-1]]
    memory.reset()
    assert not memory.prototypes.detach().any()


def test_two_memories_serialised_into_one_stream_do_not_share():
    memory = filled()
    stream = io.BytesIO()
    torch.save(memory.state_dict(), stream)
    memory.reset()
    stream.seek(0)
    twin = PrototypeMemory(6, 4)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    assert len(twin) > 0


E, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PrototypeMemory(0, 4), ValueError, "capacity must be at least 1, got 0"),
        (lambda: PrototypeMemory(4.0, 4), TypeError, "capacity must be an int, got float"),
        (lambda: PrototypeMemory(True, 4), TypeError, "capacity must be an int, got bool"),
        (lambda: PrototypeMemory(4, -1), ValueError, "embedding_dim must be at least 1, got -1"),
        (lambda: PrototypeMemory(4, 4, refresh_ratio=1.5), ValueError, r"refresh_ratio must be in \[0, 1\], got 1.5"),
        (lambda: PrototypeMemory(4, 4, refresh_ratio="1"), TypeError, "refresh_ratio must be a number, got str"),
        (lambda: PrototypeMemory(4, 4, policy="lifo"), ValueError, "policy must be one of 'fifo', 'lru', got 'lifo'"),
        (lambda: PrototypeMemory(4, 4, dtype=torch.int64), TypeError, "dtype must be a floating point type, got"),
        (
            lambda: PrototypeMemory(4, 5).update(E, Y),
            ValueError,
            r"embeddings must have shape \(B, 5\) to match the memory's embedding_dim, got \(3, 4\)",
        ),
        (
            lambda: PrototypeMemory(4, 4).update(E, Y[:2]),
            ValueError,
            r"labels must have shape \(3,\) to match embeddings \(3, 4\), got \(2,\)",
        ),
        (lambda: PrototypeMemory(4, 4).update(E.long(), Y), TypeError, "embeddings must be floating point"),
        (lambda: PrototypeMemory(4, 4).update(E, Y.double()), TypeError, "labels must be int64 or int32"),
        (lambda: PrototypeMemory(4, 4).update(E[0], Y), ValueError, r"embeddings must have shape \(B, D\), got \(4,\)"),
        (lambda: PrototypeMemory(4, 4).update([1.0], Y), TypeError, "embeddings must be a tensor"),
        (
            lambda: PrototypeMemory(4, 4).update(E, Y, torch.ones(2)),
            ValueError,
            r"weights must have shape \(3,\) to match embeddings",
        ),
        (
            lambda: PrototypeMemory(4, 4).update(E, Y, torch.tensor([1.0, -2.0, 1.0])),
            ValueError,
            "weights must be finite and not negative, got -2.0 at index 1",
        ),
        (
            lambda: PrototypeMemory(4, 4).update(E, Y, torch.tensor([1.0, 1.0, float("nan")])),
            ValueError,
            "weights must be finite and not negative, got nan at index 2",
        ),
        (lambda: PrototypeMemory(4, 4).update(E, Y, Y), TypeError, "weights must be floating point"),
        (lambda: PrototypeMemory(4, 4).lookup(Y[0]), ValueError, r"labels must have shape \(B,\), got \(\)"),
        (lambda: PrototypeMemory(4, 4).lookup("ann"), TypeError, "labels must be a tensor"),
        (lambda: PrototypeMemory(4, 4).doppelgangers(Y, 0), ValueError, "k must be at least 1, got 0"),
        (lambda: PrototypeMemory(4, 4).doppelgangers(Y, 1.5), TypeError, "k must be an int, got float"),
        (lambda: PrototypeMemory(4, 4).doppelgangers(Y.float(), 1), TypeError, "labels must be int64 or int32"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "bad", [(E, Y[:2], None), (E[:, :2], Y, None), (E, Y, torch.full((3,), -1.0)), (E, Y.float(), None)]
)
def test_a_refused_call_changes_nothing(bad):
    memory = filled()
    before = oracles.snapshot(memory)
    with pytest.raises((TypeError, ValueError)):
        memory.update(*bad)
    assert oracles.same(before, memory.state_dict())


def test_rows_of_a_bfloat16_memory_stay_near_those_of_a_float32_one():
    """Rounding adds up only as far as refreshing forgets: benchmarks/memory_dtype.py measures more of it."""
    generator = torch.Generator().manual_seed(0)
    directions, labels = torch.randn(20, 64, generator=generator), torch.arange(20)
    exact, rounded = (PrototypeMemory(20, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for _ in range(60):
        images = directions + torch.randn(20, 64, generator=generator)
        exact.update(images, labels)
        rounded.update(images, labels)
    apart = 1 - torch.cosine_similarity(exact.prototypes.double(), rounded.prototypes.double())
    assert apart.max() < 2e-5
    assert apart.max() > 1e-7  # it is kept in 16 bits
