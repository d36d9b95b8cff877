"""States that cannot be: refused with nothing changed, or harmless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import LAST, Draw
from tests.fuzz.places import small, somewhere
from tests.fuzz.subjects.enqueue import copied, draw_prototypes, draw_state, same_bits
from tests.fuzz.verdict import refused, require

Saved = dict[str, Any]


def wild(draw: Draw) -> int:
    return draw.pick(-1, -2, -(2**63), LAST, 2**31, 2**32 + 1, 10**9, draw.integer(-LAST, LAST))


def broken_states(draw: Draw) -> None:
    """A ``MemoryState`` with anything in it: no crash, no slot out of range, no write outside; or an error."""
    with somewhere(draw) as place:
        slots, columns = draw.integer(1, 9 if small(place) else 70), draw.columns()
        pool = draw.identities(slots + 5)
        state = draw_state(draw, slots, columns, draw.dtype(), pool)
        for _ in range(draw.integer(1, 3)):
            field = draw.pick(*state._fields)
            tensor = getattr(state, field)
            if field == "prototypes":
                tensor[draw.integer(0, slots - 1)] = draw.pick(float("nan"), float("inf"), 0.0, 3.0, -1e4)
            elif tensor.ndim == 0:
                tensor.fill_(wild(draw))
            else:
                for _ in range(draw.integer(1, 4)):
                    tensor[draw.integer(0, slots - 1)] = draw.pick(wild(draw), pool[0], pool[-1])
            draw.note(broken=f"{draw.notes.get('broken', '')} {field}".strip())
        for _ in range(2):
            rows = min(slots, draw.integer(0, 8))
            prototypes, identities = draw_prototypes(draw, rows, state), draw.labels(rows, pool)
            before = copied(state)
            policy = draw.pick("fifo", "lru")
            try:
                done = pmk.enqueue_(
                    state, prototypes, identities, policy=policy, refresh_ratio=draw.pick(0.2, 0.0, 1.0)
                )
            except (TypeError, ValueError, RuntimeError):
                same_bits("broken MemoryState: a refused call changes nothing", before, state)
                return
            inside = bool(((done.slots >= -1) & (done.slots < slots)).all())
            require("broken MemoryState: slots in range", inside, f"{done.slots.tolist()} of {slots}, {policy}")
            touched = torch.zeros(slots, dtype=torch.bool)
            touched[done.slots[done.slots >= 0]] = True
            same = torch.equal(state.prototypes[~touched].nan_to_num(), before[0][~touched].nan_to_num())
            require("broken MemoryState: other rows keep every bit", same)
        memory = pmk.PrototypeMemory(slots, columns, dtype=state.prototypes.dtype)
        with torch.no_grad():
            for name, tensor in zip(state._fields, state, strict=True):
                getattr(memory, name).copy_(tensor)
        for call in (
            lambda: memory.doppelgangers(identities, 2),
            lambda: memory.lookup(identities),
            lambda: repr(memory),
        ):
            try:
                call()
            except (TypeError, ValueError, RuntimeError):
                continue


# What is done to a checkpoint, and the word that the error has to name; None: it may be refused or harmless.
def _identity_twice(draw: Draw, saved: Saved) -> str | None:
    taken = (saved["identities"] >= 0).nonzero()[:, 0].tolist()
    if len(taken) < 2:
        return None
    a, b = draw.some(taken, 2)
    saved["identities"][a] = saved["identities"][b]
    return "identities"


def _broken_row(draw: Draw, saved: Saved) -> str | None:
    taken = (saved["identities"] >= 0).nonzero()[:, 0].tolist()
    if not taken:
        return None
    row = saved["prototypes"][draw.pick(*taken)]
    what = draw.pick("nan", "inf", "long", "short", "zero")
    if what in ("nan", "inf"):
        row[draw.integer(0, len(row) - 1)] = float(what)
    else:
        row *= {"long": 1.5, "short": 0.5, "zero": 0.0}[what]
    return "prototypes"


def _float_identities(draw: Draw, saved: Saved) -> str | None:
    saved["identities"] = saved["identities"].to(draw.pick(torch.float32, torch.float64)) + draw.pick(0.0, 0.5)
    return "identities"


def _cursor(draw: Draw, saved: Saved) -> str | None:
    saved["cursor"].fill_(draw.pick(-1, len(saved["identities"]), 2**40, -(2**63), LAST))
    return "cursor"


def _clock(draw: Draw, saved: Saved) -> str | None:
    saved["clock"].fill_(draw.pick(-1, -(2**63)))
    return "clock"


def _stamps(draw: Draw, saved: Saved) -> str | None:
    saved["stamps"].fill_(wild(draw))
    return None


def _negative_identity(draw: Draw, saved: Saved) -> str | None:
    saved["identities"][draw.integer(0, len(saved["identities"]) - 1)] = draw.pick(-2, -(2**63))
    return None


def _missing(draw: Draw, saved: Saved) -> str | None:
    name = draw.pick(*saved)
    del saved[name]
    return name


def _unexpected(draw: Draw, saved: Saved) -> str | None:
    saved["labels"] = torch.zeros(3)
    return "labels"


def _shape(draw: Draw, saved: Saved) -> str | None:
    name = draw.pick("prototypes", "identities", "stamps")
    saved[name] = saved[name][:-1] if draw.chance(0.5) else torch.cat([saved[name], saved[name][:1]])
    return name


def _no_tensor(draw: Draw, saved: Saved) -> str | None:
    name = draw.pick(*saved)
    saved[name] = draw.pick(None, "text", [1, 2], 3)
    return name


def _other_integers(draw: Draw, saved: Saved) -> str | None:
    saved[draw.pick("stamps", "cursor", "clock")] = torch.zeros(())
    return None


def _rubbish_in_empty_slots(draw: Draw, saved: Saved) -> str | None:
    saved["prototypes"][saved["identities"] < 0] = draw.pick(float("nan"), 1.0)
    return None


WAYS: tuple[Callable[[Draw, Saved], str | None], ...] = (
    _identity_twice,
    _broken_row,
    _float_identities,
    _cursor,
    _clock,
    _stamps,
    _negative_identity,
    _missing,
    _unexpected,
    _shape,
    _no_tensor,
    _other_integers,
    _rubbish_in_empty_slots,
)


def broken_checkpoints(draw: Draw) -> None:
    """``load_state_dict`` of a state that cannot be: refused by name with nothing changed, or harmless."""
    with somewhere(draw):
        slots, columns = draw.integer(1, 12), draw.columns()
        dtype = draw.pick(torch.float32, draw.dtype())
        in_loss = draw.chance(0.4)

        def make() -> torch.nn.Module:
            if in_loss:
                return pmk.PrototypeMemoryLoss(columns, slots, dtype=dtype, margin=pmk.AdaFace())
            return pmk.PrototypeMemory(slots, columns, dtype=dtype)

        pool = draw.identities(slots + 4)
        source, target = make(), make()
        for module in (source, target):
            _memory(module).update(draw.normal(slots, columns), torch.tensor(draw.some(pool, slots)))
        prefix = "memory." if in_loss else ""
        saved = {name.removeprefix(prefix): value.clone() for name, value in source.state_dict().items()}
        rest = {name: saved.pop(name) for name in list(saved) if name.startswith("margin")}
        way = draw.pick(*WAYS)
        word = way(draw, saved)
        draw.note(way=way.__name__, slots=slots, columns=columns, dtype=dtype, in_loss=in_loss)
        broken = {f"{prefix}{name}": value for name, value in saved.items()} | rest
        before = {name: value.clone() for name, value in target.state_dict().items()}

        if word is not None:
            rule = f"load_state_dict: {way.__name__.strip('_').replace('_', ' ')}"
            refused(rule, lambda: target.load_state_dict(broken), word)
            # A name too many PyTorch finds after it has loaded the others: a whole state, and no half of one.
            whole = way is _unexpected and torch.equal(_memory(target).prototypes, broken[f"{prefix}prototypes"])
            _unchanged(rule, broken if whole else before, target)
            return
        try:
            target.load_state_dict(broken)
        except (TypeError, ValueError, RuntimeError):
            _unchanged("load_state_dict: refused", before, target)
            return
        memory = _memory(target)
        kinds = [tensor.dtype for tensor in memory.state]
        require("load_state_dict: dtypes stay", kinds == [dtype] + 4 * [torch.int64], f"{kinds}")
        _harmless(draw, memory, pool)


def _memory(module: torch.nn.Module) -> pmk.PrototypeMemory:
    return module.memory if isinstance(module, pmk.PrototypeMemoryLoss) else module  # type: ignore[return-value]


def _unchanged(rule: str, before: dict[str, Tensor], module: torch.nn.Module) -> None:
    for name, value in module.state_dict().items():
        require(rule, torch.equal(value, before[name]), f"refused, but {name} changed")


def _harmless(draw: Draw, memory: pmk.PrototypeMemory, pool: list[int]) -> None:
    for _ in range(3):
        labels = torch.tensor([draw.pick(*pool) for _ in range(draw.integer(0, memory.capacity))], dtype=torch.int64)
        targets = memory.update(draw.normal(len(labels), memory.embedding_dim), labels)
        inside = bool(((targets >= -1) & (targets < memory.capacity)).all())
        require("load_state_dict: harmless", inside, f"targets {targets.tolist()}")
        taken = memory.identities[memory.occupied].tolist()
        require("load_state_dict: harmless", len(taken) == len(set(taken)), f"identities {taken}")
        rows = memory.prototypes[memory.occupied]
        require("load_state_dict: harmless", bool(rows.isfinite().all()), "rows that are not finite")
