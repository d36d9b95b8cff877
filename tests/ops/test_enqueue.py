"""Contract of ``enqueue_``, on every backend: a plain-Python memory beside the real one, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels.identities import find_slots
from protomem_kernels.ops.enqueue import POLICIES
from tests.ops.cases import PLACES_OF_BATCHES, each_backend_of_batches, far_apart, interpreted, strided
from tests.ops.properties import RuleBasedStateMachine, initialize, invariant, precondition, rule, settings, st

LAST = 2**63 - 1
each_policy = pytest.mark.parametrize("policy", POLICIES)
EPSILON = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class Slot:
    identity: int = -1
    row: list[float] = field(default_factory=list)
    stamp: int = 0


class Model:
    """The memory as the contract tells it, one identity after the other."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.slots = [Slot() for _ in range(capacity)]
        self.policy = policy
        self.cursor = self.clock = 0

    @staticmethod
    def unit(row: list[float]) -> list[float]:
        length = math.hypot(*row)
        return [v / length for v in row]

    def find(self, identity: int) -> int:
        return next((s for s, slot in enumerate(self.slots) if slot.identity == identity), -1)

    def victim(self, batch: set[int]) -> int:
        free = [s for s, slot in enumerate(self.slots) if slot.identity not in batch]
        if self.policy == "lru":
            return min(free, key=lambda s: (self.slots[s].identity >= 0, self.slots[s].stamp, s))
        while self.cursor not in free:
            self.cursor = (self.cursor + 1) % len(self.slots)
        return self.cursor

    def enqueue(self, rows: list[list[float]], identities: list[int], r: float) -> tuple[list[int], list[int]]:
        self.clock += 1
        usable = [c >= 0 and all(map(math.isfinite, p)) and any(p) for p, c in zip(rows, identities, strict=True)]
        batch = {c for c in identities if c >= 0}
        known = {c: self.find(c) for c in batch}
        slots, evicted, done = [], [], set()
        for row, c, ok in zip(rows, identities, usable, strict=True):
            if not ok:
                slots.append(-1)
                evicted.append(-1)
                continue
            out = -1
            if c not in done:
                done.add(c)
                p = self.unit(row)
                s = known[c]
                if s >= 0:
                    blend = [(1 - r) * a + r * b for a, b in zip(self.slots[s].row, p, strict=True)]
                    new = self.unit(blend) if math.hypot(*blend) > 1e-6 else p
                else:
                    s = self.victim(batch)
                    out = self.slots[s].identity
                    new = p
                    self.cursor = (s + 1) % len(self.slots) if self.policy == "fifo" else self.cursor
                self.slots[s] = Slot(c, new, self.clock)
            slots.append(self.find(c))
            evicted.append(out)
        return slots, evicted


ENTRIES = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0, 3.0])
BROKEN = st.sampled_from([float("nan"), float("inf"), -float("inf")])
TINY_OR_HUGE = st.sampled_from([1e-30, 1e30])


class MemoryMachine(RuleBasedStateMachine):
    """Random batches into a small memory; after every call everything is compared and every invariant checked."""

    backend = "reference"
    policy = "fifo"

    @initialize(
        capacity=st.integers(1, 7),
        dim=st.integers(1, 3),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        r=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    )
    def start(self, capacity: int, dim: int, dtype: torch.dtype, r: float) -> None:
        self.state = pmk.MemoryState.empty(capacity, dim, dtype=dtype)
        self.model = Model(capacity, self.policy)
        self.dim, self.dtype, self.r = dim, dtype, r

    def send(self, rows: list[list[float]], identities: list[int]) -> None:
        expected_slots, expected_evicted = self.model.enqueue(rows, identities, self.r)
        prototypes = torch.tensor(rows, dtype=torch.float64).view(len(rows), self.dim)
        prototypes = prototypes.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        with pmk.use_backend(self.backend):
            slots, evicted = pmk.enqueue_(
                self.state,
                prototypes,
                torch.tensor(identities, dtype=torch.int64),
                refresh_ratio=self.r,
                policy=self.policy,
            )
        assert slots.tolist() == expected_slots
        assert evicted.tolist() == expected_evicted
        for s, slot in enumerate(self.model.slots):  # rounding must not add up over fifty steps
            if slot.identity >= 0:
                actual = self.state.prototypes[s].double().tolist()
                assert actual == pytest.approx(slot.row, abs=EPSILON[self.dtype])
                slot.row = actual

    @rule(data=st.data())
    def batch(self, data: st.DataObject) -> None:
        capacity = len(self.model.slots)
        count = data.draw(st.integers(0, capacity), label="rows")
        people = st.one_of(st.integers(0, 2 * capacity), st.sampled_from([-1, -(2**63), LAST]))
        identities = data.draw(st.lists(people, min_size=count, max_size=count), label="identities")
        rows = data.draw(
            st.lists(st.lists(ENTRIES, min_size=self.dim, max_size=self.dim), min_size=count, max_size=count)
        )
        self.send(rows, identities)

    @rule(data=st.data(), value=st.one_of(BROKEN, TINY_OR_HUGE))
    def odd_row(self, data: st.DataObject, value: float) -> None:
        row = [value] + [0.0] * (self.dim - 1)
        self.send([row], [data.draw(st.integers(0, 3))])

    @precondition(lambda self: any(slot.identity >= 0 for slot in self.model.slots))
    @rule(data=st.data())
    def return_of_the_opposite(self, data: st.DataObject) -> None:
        known = [slot for slot in self.model.slots if slot.identity >= 0]
        slot = data.draw(st.sampled_from(known))
        self.send([[-v for v in slot.row]], [slot.identity])

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "state"):
            return
        state, model = self.state, self.model
        identities = state.identities.tolist()
        assert identities == [slot.identity for slot in model.slots]
        assert state.stamps.tolist() == [slot.stamp for slot in model.slots]
        assert int(state.clock) == model.clock
        assert int(state.cursor) == model.cursor
        held = [c for c in identities if c >= 0]
        assert len(held) == len(set(held))
        norms = state.prototypes.double().norm(dim=1).tolist()
        assert torch.isfinite(state.prototypes).all()
        for c, norm in zip(identities, norms, strict=True):
            assert norm == pytest.approx(1, abs=EPSILON[self.dtype]) if c >= 0 else norm == 0


def machine_test(place: str, policy: str) -> type:
    backend, marks = PLACES_OF_BATCHES[place]
    machine = type(f"{place}_{policy}", (MemoryMachine,), {"backend": backend, "policy": policy})
    case: type = machine.TestCase
    case.pytestmark = [*marks, pytest.mark.no_cover]
    # Triton's interpreter needs some 20 ms per row written: fewer and shorter histories there.
    examples, steps = (20, 20) if interpreted(backend) else (200, 50)
    case.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    return case


globals().update(
    {f"TestMemory_{place}_{policy}": machine_test(place, policy) for place in PLACES_OF_BATCHES for policy in POLICIES}
)


@each_backend_of_batches
def test_worked_example(backend: str) -> None:
    state = pmk.MemoryState.empty(3, 2)
    eye = torch.eye(2)
    with pmk.use_backend(backend):
        assert pmk.enqueue_(state, eye, torch.tensor([10, 11])).slots.tolist() == [0, 1]
        assert state.identities.tolist() == [10, 11, -1]
        # 11 is refreshed where it stands; 12 and 13 take slots 2 and 0, wrapping around.
        rows = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 1.0]])
        slots, evicted = pmk.enqueue_(state, rows, torch.tensor([12, 11, 13]), refresh_ratio=0.75)
    assert slots.tolist() == [2, 1, 0]
    assert evicted.tolist() == [-1, -1, 10]
    assert state.identities.tolist() == [13, 11, 12]
    assert state.stamps.tolist() == [2, 2, 2]
    assert (int(state.cursor), int(state.clock)) == (1, 2)
    half = 0.5**0.5
    torch.testing.assert_close(state.prototypes, torch.tensor([[half, half], [0.0, -1.0], [0.6, 0.8]]))


@each_backend_of_batches
def test_ring_passes_over_the_batch_and_wraps(backend: str) -> None:
    state = pmk.MemoryState.empty(4, 1)
    with pmk.use_backend(backend):
        pmk.enqueue_(state, torch.ones(4, 1), torch.arange(4))
        pmk.enqueue_(state, torch.ones(1, 1), torch.tensor([4]))  # cursor at 1
        slots, evicted = pmk.enqueue_(state, torch.ones(4, 1), torch.tensor([7, 1, 8, 3]))
    assert slots.tolist() == [2, 1, 0, 3]
    assert evicted.tolist() == [2, -1, 4, -1]
    assert int(state.cursor) == 1


@each_backend_of_batches
def test_least_recently_written_leaves_first(backend: str) -> None:
    state = pmk.MemoryState.empty(3, 1)
    with pmk.use_backend(backend):
        for identity in (5, 6, 7, 5):  # 6 is now the oldest
            pmk.enqueue_(state, torch.ones(1, 1), torch.tensor([identity]), policy="lru")
        slots, evicted = pmk.enqueue_(state, torch.ones(2, 1), torch.tensor([8, 9]), policy="lru")
    assert (slots.tolist(), evicted.tolist()) == ([1, 2], [6, 7])
    assert int(state.cursor) == 0


@each_backend_of_batches
def test_lru_takes_empty_slots_first_whatever_the_stamps_say(backend: str) -> None:
    state = pmk.MemoryState.empty(3, 1)
    state.prototypes[1], state.identities[1], state.stamps[2] = 1.0, 5, 7  # written by hand: an occupied slot of age 0
    with pmk.use_backend(backend):
        slots, evicted = pmk.enqueue_(state, torch.ones(3, 1), torch.tensor([6, 7, 8]), policy="lru")
    assert (slots.tolist(), evicted.tolist()) == ([0, 2, 1], [-1, -1, 5])


@each_backend_of_batches
@each_policy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_refresh_ratio_zero_keeps_every_bit(backend: str, policy: str, dtype: torch.dtype) -> None:
    state = pmk.MemoryState.empty(5, 7, dtype=dtype)
    with pmk.use_backend(backend):
        pmk.enqueue_(state, torch.randn(5, 7), torch.arange(5), policy=policy)
        state.prototypes.mul_(1.25)  # scaling such rows anew would show
        before = state.prototypes.clone()
        pmk.enqueue_(state, torch.randn(5, 7), torch.arange(5), refresh_ratio=0.0, policy=policy)
    assert torch.equal(state.prototypes, before)
    assert state.stamps.tolist() == [2] * 5


@each_backend_of_batches
@each_policy
def test_large_strided_int32_and_repeatable(backend: str, policy: str) -> None:
    g = torch.Generator().manual_seed(0)
    # Triton's interpreter needs some 20 ms per row written; test_triton_batch.py walks its loops with smaller blocks.
    batch, capacity = (48, 190) if interpreted(backend) else (256, 1000)
    runs = []
    for _ in range(2):
        g.manual_seed(0)
        state = pmk.MemoryState.empty(capacity, 16)
        model = Model(capacity, policy)
        for _ in range(6):
            rows = torch.randn(batch, 16, generator=g)
            identities = torch.randint(-1, capacity * 3 // 2, (batch,), generator=g, dtype=torch.int32)
            with pmk.use_backend(backend):
                got = pmk.enqueue_(state, strided(rows), strided(identities), policy=policy)
            assert (got.slots.tolist(), got.evicted.tolist()) == model.enqueue(rows.tolist(), identities.tolist(), 0.5)
        runs.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    expected = torch.tensor([slot.row or [0.0] * 16 for slot in model.slots])
    torch.testing.assert_close(state.prototypes, expected, rtol=1e-5, atol=1e-6)


@each_backend_of_batches
@each_policy
def test_rows_past_two_to_the_31_elements(backend: str, policy: str) -> None:
    near = pmk.MemoryState.empty(9, 3, dtype=torch.bfloat16)
    far = pmk.MemoryState(far_apart(near.prototypes), *(tensor.clone() for tensor in near[1:]))
    for identities in ([1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 10], [9, 2]):
        rows = torch.randn(len(identities), 3)
        for state, served_by in ((near, "reference"), (far, backend)):
            with pmk.use_backend(served_by):
                pmk.enqueue_(state, rows, torch.tensor(identities), policy=policy)
        assert torch.equal(near.identities, far.identities)
        torch.testing.assert_close(far.prototypes, near.prototypes, rtol=2e-2, atol=2e-3)
    assert far.prototypes[-1].any()


@each_backend_of_batches
def test_an_empty_batch_only_ticks_the_clock(backend: str) -> None:
    state = pmk.MemoryState.empty(2, 3)
    with pmk.use_backend(backend):
        slots, evicted = pmk.enqueue_(state, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert slots.shape == evicted.shape == (0,)
    assert int(state.clock) == 1
    assert state.identities.tolist() == [-1, -1]


@each_backend_of_batches
def test_nothing_usable_writes_nothing(backend: str) -> None:
    state = pmk.MemoryState.empty(3, 2)
    with pmk.use_backend(backend):
        pmk.enqueue_(state, torch.eye(2), torch.tensor([4, 5]))
        before = [tensor.clone() for tensor in state]
        rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0]])
        slots, evicted = pmk.enqueue_(state, rows, torch.tensor([4, 5, -3]))
    assert slots.tolist() == evicted.tolist() == [-1, -1, -1]
    for old, new in zip(before[:-1], state[:-1], strict=True):
        assert torch.equal(old, new)


def test_find_slots() -> None:
    memory = torch.tensor([9, -1, 4, LAST])
    assert find_slots(memory, torch.tensor([4, 4, -1, 8, LAST, 9], dtype=torch.int64)).tolist() == [2, 2, -1, -1, 3, 0]
    assert find_slots(memory, torch.tensor([4], dtype=torch.int32)).tolist() == [2]
    assert find_slots(memory[:0], torch.tensor([4])).tolist() == [-1]


def good_state() -> pmk.MemoryState:
    state = pmk.MemoryState.empty(3, 2)
    pmk.enqueue_(state, torch.eye(2), torch.tensor([4, 5]))
    return state


P, C = torch.ones(2, 2), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (
            ValueError,
            r"prototypes must have at most 3 rows to fit into .*\(3, 2\), got \(4, 2\)",
            (P.repeat(2, 1), C.repeat(2)),
            {},
        ),
        (
            ValueError,
            r"prototypes must have shape \(2, 2\) to match state.prototypes \(3, 2\), got \(2, 1\)",
            (P[:, :1], C),
            {},
        ),
        (ValueError, r"identities must have shape \(2,\) to match prototypes \(2, 2\), got \(1,\)", (P, C[:1]), {}),
        (TypeError, "identities must be int64 or int32, got torch.float32", (P, C.float()), {}),
        (TypeError, "prototypes must be floating point, got torch.int64", (P.long(), C), {}),
        (ValueError, r"refresh_ratio must be in \[0, 1\], got 1.5", (P, C), {"refresh_ratio": 1.5}),
        (ValueError, r"refresh_ratio must be in \[0, 1\], got nan", (P, C), {"refresh_ratio": float("nan")}),
        (TypeError, "refresh_ratio must be a number, got str", (P, C), {"refresh_ratio": "0.2"}),
        (ValueError, "policy must be one of 'fifo', 'lru', got 'random'", (P, C), {"policy": "random"}),
    ],
)
def test_bad_input_changes_nothing(error: type[Exception], message: str, args: tuple, kwargs: dict) -> None:
    state = good_state()
    before = [tensor.clone() for tensor in state]
    with pytest.raises(error, match=message):
        pmk.enqueue_(state, *args, **kwargs)
    assert all(torch.equal(old, new) for old, new in zip(before, state, strict=True))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "state.stamps must be int64, got torch.int32", {"stamps": torch.zeros(3, dtype=torch.int32)}),
        (
            ValueError,
            r"state.identities must have shape \(3,\) to match state.prototypes",
            {"identities": torch.zeros(2, dtype=torch.int64)},
        ),
        (ValueError, r"state.cursor must have shape \(\), got \(1,\)", {"cursor": torch.zeros(1, dtype=torch.int64)}),
        (TypeError, "state.clock must be a tensor of shape .*, got int", {"clock": 3}),
        (
            ValueError,
            "state.clock must be on cpu like state.prototypes, got meta",
            {"clock": torch.zeros((), dtype=torch.int64, device="meta")},
        ),
    ],
)
def test_bad_state(error: type[Exception], message: str, change: dict) -> None:
    with pytest.raises(error, match=message):
        pmk.enqueue_(good_state()._replace(**change), P, C)


def test_bad_state_type() -> None:
    with pytest.raises(TypeError, match="state must be a MemoryState, got tuple"):
        pmk.enqueue_(tuple(good_state()), P, C)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (ValueError, "capacity must be at least 1, got 0", (0, 2), {}),
        (TypeError, "embedding_dim must be an int, got float", (2, 2.0), {}),
        (TypeError, "dtype must be a floating point type, got torch.int64", (2, 2), {"dtype": torch.int64}),
    ],
)
def test_bad_memory(error: type[Exception], message: str, args: tuple, kwargs: dict) -> None:
    with pytest.raises(error, match=message):
        pmk.MemoryState.empty(*args, **kwargs)
