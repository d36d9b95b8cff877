"""``enqueue_``: some steps in the life of a memory of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import ENDS, Draw, accumulation
from tests.fuzz.oracles.memory import Slots, blended, write
from tests.fuzz.places import small, somewhere
from tests.fuzz.verdict import Judge, Values, exact, refused, require


def draw_state(draw: Draw, slots: int, columns: int, dtype: torch.dtype, pool: list[int]) -> pmk.MemoryState:
    """Return a memory as it may stand after any life: its cursor and stamps anywhere, some slots empty."""
    filled = draw.pick(0, slots, draw.integer(0, slots))
    filled = min(filled, len(pool))
    where = sorted(draw.some(range(slots), filled))
    rows = draw.unit(slots, columns, torch.float64)
    rows[~rows.any(dim=1)] = torch.eye(1, columns, dtype=torch.float64)
    empty = torch.ones(slots, dtype=torch.bool)
    empty[where] = False
    rows[empty] = 0
    identities = torch.full((slots,), -1)
    identities[where] = torch.tensor(draw.some(pool, filled), dtype=torch.int64)
    clock = draw.pick(0, draw.integer(0, 50), 2**40)
    stamps = torch.tensor([draw.integer(0, clock) if not empty[s] else 0 for s in range(slots)], dtype=torch.int64)
    lay = draw.layout if draw.chance(0.4) else lambda x: x
    return pmk.MemoryState(
        lay(rows.to(dtype)),
        lay(identities),
        lay(stamps),
        torch.tensor(draw.integer(0, max(slots - 1, 0)) if slots else 0),
        torch.tensor(clock),
    )


def copied(state: pmk.MemoryState) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state]


def same_bits(rule: str, before: list[Tensor], state: pmk.MemoryState) -> None:
    for name, a, b in zip(state._fields, before, state, strict=True):
        equal = torch.equal(a, b.detach()) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))
        require(rule, equal, f"{name} changed")


def enqueue(draw: Draw) -> None:
    with somewhere(draw) as place:
        slots = max(1, min(draw.slots(), 12 if small(place) else 9000))
        columns, dtype = draw.columns(), draw.dtype()
        if slots > 1000:
            columns = min(columns, 8)
        pool = draw.identities(min(slots, 60) + draw.integer(0, 9))
        policy, ratio = draw.pick("fifo", "lru"), draw.pick(0.2, 0.2, 0.0, 1.0, 0.5, draw.uniform(1).item())
        state = draw_state(draw, slots, columns, dtype, pool)
        draw.note(slots=slots, columns=columns, dtype=dtype, policy=policy, ratio=ratio)
        for _ in range(draw.integer(1, 4)):
            step(draw, state, pool, policy, ratio)


def draw_prototypes(draw: Draw, rows: int, state: pmk.MemoryState) -> Tensor:
    memory = state.prototypes
    if rows and draw.chance(0.05):
        return memory[:rows]  # the memory's own rows, read while they are written
    dtype = draw.dtype()
    near = memory.double()[: 8 if draw.chance(0.5) else 0]
    x = draw.rows(rows, memory.shape[1], dtype, near=near)
    limit = ENDS[torch.float64 if memory.dtype == torch.float64 else torch.float32]
    return x.clamp(-limit, limit) if dtype == torch.float64 and memory.dtype != torch.float64 else x


def step(draw: Draw, state: pmk.MemoryState, pool: list[int], policy: str, ratio: float) -> None:
    slots, columns = state.prototypes.shape
    kind = accumulation(state.prototypes.dtype)
    rows = min(draw.pick(0, 1, 2, draw.integer(0, 12), slots), slots, 60)
    if draw.chance(0.05):
        before = copied(state)
        too_many = draw.normal(slots + 1, columns).to(state.prototypes.dtype)
        refused(
            "enqueue_: more rows than slots",
            lambda: pmk.enqueue_(state, too_many, torch.arange(slots + 1), refresh_ratio=ratio, policy=policy),
            "prototypes",
        )
        same_bits("enqueue_: a refused call changes nothing", before, state)
        return
    prototypes = draw_prototypes(draw, rows, state)
    identities = draw.labels(rows, pool)
    draw.note(rows=rows, prototypes=prototypes.dtype)

    p = prototypes.detach().double().clone()
    if kind == torch.float32:
        p = p.float().double()
    usable = (p.isfinite().all(dim=1) & p.any(dim=1)).tolist()
    usable = [ok and identity >= 0 for ok, identity in zip(usable, identities.tolist(), strict=True)]
    model = Slots.of(state.identities, state.stamps, state.cursor, state.clock)
    before = copied(state)
    right = write(model, identities.tolist(), usable, policy)

    done = pmk.enqueue_(state, prototypes, identities, refresh_ratio=ratio, policy=policy)

    exact("enqueue_: slots", done.slots, right.slots)
    exact("enqueue_: evicted", done.evicted, right.evicted)
    exact("enqueue_: identities", state.identities, model.identities)
    exact("enqueue_: stamps", state.stamps, model.stamps)
    exact("enqueue_: cursor", [int(state.cursor)], [model.cursor])
    exact("enqueue_: clock", [int(state.clock)], [model.clock])
    known = torch.tensor(right.known, dtype=torch.bool)
    leads = torch.tensor(right.leads, dtype=torch.bool)
    at = torch.tensor(right.slots, dtype=torch.int64)
    untouched = torch.ones(slots, dtype=torch.bool)
    untouched[at[leads]] = False
    require(
        "enqueue_: other rows keep every bit",
        torch.equal(state.prototypes[untouched], before[0][untouched]),
        f"slots {untouched.nonzero()[:, 0].tolist()[:9]}",
    )
    if not bool(leads.any()):
        return
    at, known, p = at[leads], known[leads], p[leads]
    now, old = state.prototypes[at], before[0][at]
    if ratio == 0:
        require("enqueue_: ratio 0 keeps every bit", torch.equal(now[known], old[known]))
    _, length = blended(old.double(), known, p, ratio)
    eps = torch.finfo(kind).eps
    sure = (length > 1e-4) | (length < 1e-7)

    def oracle(old: Tensor, p: Tensor) -> Values:
        rows, _ = blended(old, known, p, ratio)
        return {"rows": torch.where(known[:, None] & (ratio == 0), old, rows)}

    judge = Judge(draw, oracle, [old, p], kind)
    judge.close("enqueue_: rows", "rows", now, torch.where(length > 1e-4, 1 / length, 1)[:, None], sure[:, None])
    off = (now.double().norm(dim=1) - 1).abs()
    bound = (torch.finfo(state.prototypes.dtype).eps + 8 * eps) * (1 if ratio else 2)
    require(
        "enqueue_: rows of unit length", bool((off[~known | (ratio > 0)] <= bound).all()), f"off by {off.max():.3g}"
    )
