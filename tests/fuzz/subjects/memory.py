"""``PrototypeMemory``: a life of updates, look-ups, resets, copies, checkpoints and changes of dtype."""

from __future__ import annotations

import copy
import io
import math
import pickle

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import DTYPES, Draw, accumulation
from tests.fuzz.oracles.aggregate import aggregate
from tests.fuzz.oracles.memory import Slots, blended, write
from tests.fuzz.places import observing, small, somewhere
from tests.fuzz.subjects.aggregate_prototypes import draw_weights
from tests.fuzz.subjects.enqueue import same_bits
from tests.fuzz.verdict import Judge, Values, exact, require


def prototype_memory(draw: Draw) -> None:
    with somewhere(draw) as place:
        slots = draw.pick(1, 2, draw.integer(1, 8), draw.integer(1, 12 if small(place) else 80))
        columns, dtype = draw.columns(), draw.dtype()
        ratio, policy = draw.pick(0.2, 0.0, 1.0, 0.5), draw.pick("fifo", "lru")
        memory = pmk.PrototypeMemory(
            slots, columns, refresh_ratio=ratio, policy=policy, dtype=dtype, learnable=draw.chance(0.2)
        )
        draw.note(slots=slots, columns=columns, dtype=dtype, ratio=ratio, policy=policy)
        life = Life(draw, memory, draw.identities(draw.integer(1, 2 * slots + 2)))
        deeds = (life.update, life.update, life.update, life.look_up, life.doppelgangers, life.copy, life.other_dtype)
        for _ in range(draw.integer(1, 7)):
            deed = draw.pick(*deeds, life.reset) if draw.chance(0.3) else life.update
            life.history.append(deed.__name__)
            deed()
            life.invariants()
            draw.note(life=", ".join(life.history))


class Life:
    """A memory and the model beside it. Rows are checked step by step against the rows that stood there before."""

    def __init__(self, draw: Draw, memory: pmk.PrototypeMemory, pool: list[int]) -> None:
        self.draw, self.memory, self.pool = draw, memory, pool
        self.model = Slots([-1] * memory.capacity, [0] * memory.capacity)
        self.coarsest = torch.finfo(memory.prototypes.dtype).eps
        self.history: list[str] = []

    def invariants(self) -> None:
        memory, model = self.memory, self.model
        exact("PrototypeMemory: identities", memory.identities, model.identities)
        exact("PrototypeMemory: stamps", memory.stamps, model.stamps)
        exact("PrototypeMemory: cursor and clock", [int(memory.cursor), int(memory.clock)], [model.cursor, model.clock])
        taken = [identity for identity in model.identities if identity >= 0]
        require("PrototypeMemory: an identity stands in one slot", len(taken) == len(set(taken)))
        require("PrototypeMemory: len", len(memory) == len(taken), f"{len(memory)}, not {len(taken)}")
        rows = memory.prototypes.detach().double()
        require("PrototypeMemory: empty rows are zero", not bool(rows[~memory.occupied].any()))
        off = (rows[memory.occupied].norm(dim=1) - 1).abs()
        bound = 2 * self.coarsest + 1e-6 if self.coarsest > 1e-12 else 1e-12
        require("PrototypeMemory: rows of unit length", bool((off <= bound).all()), f"{off.max() if len(off) else 0}")

    def update(self) -> None:
        draw, memory = self.draw, self.memory
        batch = draw.batch()
        x = draw.rows(batch, memory.embedding_dim, draw.dtype(), near=memory.prototypes.detach().double()[:6])
        labels = draw.labels(batch, self.pool)
        weights = draw_weights(draw, batch)
        made = aggregate(x.double(), labels.tolist(), None if weights is None else weights.double())
        eps = torch.finfo(accumulation(x.dtype)).eps
        if bool(made.doubtful(eps).any()):
            return
        before = [tensor.detach().clone() for tensor in memory.state]
        if len(made.identities) > memory.capacity:
            try:
                memory.update(x, labels, weights)
            except ValueError as error:
                require("PrototypeMemory: more identities than slots", "capacity" in str(error), str(error))
            else:
                require("PrototypeMemory: more identities than slots", False, "taken")
            same_bits("PrototypeMemory: a refused update changes nothing", before, memory.state)
            return
        model = copy.deepcopy(self.model)
        right = write(model, made.identities, made.exists.tolist(), memory.policy)
        with observing(draw):
            targets = memory.update(x, labels, weights)
        self.model = model
        exact("PrototypeMemory: targets", targets, [right.slots[at] if at >= 0 else -1 for at in made.index])
        exact("PrototypeMemory: identities after an update", memory.identities, model.identities)
        self.rows(x, labels, weights, made.condition, made.exists, right.known, right.slots, before[0])

    def rows(
        self,
        x: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        condition: Tensor,
        exists: Tensor,
        known: list[bool],
        slots: list[int],
        before: Tensor,
    ) -> None:
        if not bool(exists.any()):
            return
        at = torch.tensor(slots)[exists]
        was_known = torch.tensor(known)[exists]
        ratio = self.memory.refresh_ratio

        def oracle(old: Tensor, e: Tensor, *q: Tensor) -> Values:
            made = aggregate(e, labels.tolist(), q[0] if q else None)
            rows, _ = blended(old, was_known, made.prototypes[exists], ratio)
            return {"rows": torch.where(was_known[:, None] & (ratio == 0), old, rows)}

        kind = torch.float32 if accumulation(x.dtype) == torch.float32 else accumulation(self.memory.prototypes.dtype)
        given = [before[at], x] if weights is None else [before[at], x, weights]
        judge = Judge(self.draw, oracle, given, kind)
        made = aggregate(x.double(), labels.tolist(), None if weights is None else weights.double())
        _, length = blended(before[at].double(), was_known, made.prototypes[exists], ratio)
        sure = (length > 1e-3) | (ratio == 0)
        natural = condition[exists] / torch.where(length > 1e-3, length, 1)
        now = self.memory.prototypes.detach()[at]
        judge.close("PrototypeMemory: rows", "rows", now, natural[:, None], sure[:, None])

    def look_up(self) -> None:
        labels = self.draw.labels(self.draw.batch(), [*self.pool, 5, 2**40])
        exact(
            "PrototypeMemory: lookup", self.memory.lookup(labels), [self.model.find(label) for label in labels.tolist()]
        )

    def doppelgangers(self) -> None:
        draw, memory = self.draw, self.memory
        labels = draw.labels(draw.integer(0, 6), [*self.pool, 5])
        k = draw.pick(1, 2, memory.capacity, memory.capacity + 2)
        cosines, identities = memory.doppelgangers(labels, k)
        require("doppelgangers: shape", tuple(cosines.shape) == tuple(identities.shape) == (len(labels), k))
        rows = memory.prototypes.detach().double()
        rows = rows / torch.where(rows.any(dim=1, keepdim=True), rows.norm(dim=1, keepdim=True), 1)
        bound = 64 * torch.finfo(accumulation(memory.prototypes.dtype)).eps + 4 * self.coarsest
        for label, values, found in zip(labels.tolist(), cosines.tolist(), identities.tolist(), strict=True):
            own = self.model.find(label)
            others = [s for s in range(memory.capacity) if self.model.identities[s] >= 0 and s != own]
            right = sorted((float(rows[own] @ rows[s]) for s in others), reverse=True)[:k] if own >= 0 else []
            right += [-math.inf] * (k - len(right))
            real = [identity for identity in found if identity >= 0]
            require("doppelgangers: how many", len(real) == sum(v > -math.inf for v in right), f"{found} of {label}")
            require(
                "doppelgangers: others alone", label not in real and len(set(real)) == len(real), f"{found} of {label}"
            )
            off = [abs(a - b) if a != b else 0.0 for a, b in zip(values, right, strict=True)]
            require("doppelgangers: cosines", max(off, default=0.0) <= bound, f"{values}, not {right}")
            for value, identity in zip(values, found, strict=True):
                if identity >= 0:
                    off_by = abs(float(rows[own] @ rows[self.model.find(identity)]) - value)
                    require("doppelgangers: whose cosine", off_by <= bound, f"{identity} off by {off_by}")

    def reset(self) -> None:
        self.memory.reset()
        self.model = Slots([-1] * self.memory.capacity, [0] * self.memory.capacity)
        require("PrototypeMemory: reset", not bool(self.memory.prototypes.any()) and len(self.memory) == 0)

    def copy(self) -> None:
        """Go on with a copy: of the object, of its pickle, or of a new one that loads its state."""
        memory = self.memory
        way = self.draw.pick("deepcopy", "pickle", "state_dict", "torch.save")
        self.history[-1] = way
        before = [tensor.detach().clone() for tensor in memory.state]
        if way == "deepcopy":
            self.memory = copy.deepcopy(memory)
        elif way == "pickle":
            self.memory = pickle.loads(pickle.dumps(memory))
        else:
            saved = memory.state_dict()
            if way == "torch.save":
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            learnable = isinstance(memory.prototypes, torch.nn.Parameter)
            self.memory = pmk.PrototypeMemory(
                memory.capacity,
                memory.embedding_dim,
                refresh_ratio=memory.refresh_ratio,
                policy=memory.policy,
                dtype=memory.prototypes.dtype,
                learnable=learnable,
            )
            self.memory.load_state_dict(saved)
        same_bits("PrototypeMemory: a copy holds the same bits", before, self.memory.state)
        require(
            "PrototypeMemory: a copy has memory of its own",
            self.memory.prototypes.data_ptr() != memory.prototypes.data_ptr(),
        )

    def other_dtype(self) -> None:
        dtype = self.draw.pick(*DTYPES)
        self.history[-1] = f"to {dtype}"
        self.memory = self.memory.to(dtype)
        self.coarsest = max(self.coarsest, torch.finfo(dtype).eps)
        kinds = [tensor.dtype for tensor in self.memory.state]
        require("PrototypeMemory: dtypes after .to(dtype)", kinds == [dtype] + 4 * [torch.int64], f"{kinds}")
