"""``PrototypeMemoryLoss``: steps of training and looks in between, for each of the three prototype gradients."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import Draw, accumulation
from tests.fuzz.oracles.aggregate import Made, aggregate
from tests.fuzz.oracles.memory import Slots, Written, blended, write
from tests.fuzz.oracles.rows import lengths
from tests.fuzz.oracles.softmax import Softmax, reduced, softmax
from tests.fuzz.places import small, somewhere
from tests.fuzz.subjects.aggregate_prototypes import draw_weights
from tests.fuzz.subjects.loss import slope, sure_samples
from tests.fuzz.subjects.objective import draw_objective
from tests.fuzz.verdict import Judge, Values, exact, require, scales_up


def prototype_memory_loss(draw: Draw) -> None:
    with somewhere(draw) as place:
        slots = draw.pick(2, 3, draw.integer(1, 8), draw.integer(8, 14 if small(place) else 80))
        columns = draw.columns()
        gradient = draw.pick("none", "fresh", "memory")
        objective = draw_objective(draw, slots)
        power = draw.pick(None, None, 1.0, 2.0)
        loss_fn = pmk.PrototypeMemoryLoss(
            columns,
            slots,
            **objective.options,
            refresh_ratio=draw.pick(0.2, 0.0, 1.0, 0.5),
            policy=draw.pick("fifo", "lru"),
            prototype_gradient=gradient,
            quality=None if power is None else pmk.NormQuality(power),
            reduction=draw.pick("mean", "none", "sum"),
            dtype=draw.pick(torch.float32, draw.dtype()),
        )
        draw.note(slots=slots, columns=columns, quality=power, gradient=gradient, reduction=loss_fn.reduction)
        draw.note(
            ratio=loss_fn.memory.refresh_ratio, policy=loss_fn.memory.policy, memory=loss_fn.memory.prototypes.dtype
        )
        training = Training(draw, loss_fn, objective)
        for _ in range(draw.integer(2, 7) if gradient == "memory" else draw.integer(1, 4)):  # long enough to evict
            deed = draw.pick(training.step, training.step, training.step, training.look, training.two_at_once)
            training.history.append(deed.__name__)
            draw.note(steps=", ".join(training.history))
            deed()


class Batch:
    """A batch: embeddings, labels, weights or None. ``power``: of the norms that weigh where no weights are given."""

    def __init__(
        self, draw: Draw, columns: int, pool: list[int], slots: int, memory: Tensor, power: float | None
    ) -> None:
        size, self.power = draw.batch(), power
        near = memory.detach().double()[:6]
        self.x = draw.rows(size, columns, draw.dtype(), near=near, ends=power is None)
        self.labels = draw.labels(size, draw.some(pool, min(len(pool), slots)))
        self.weights = draw_weights(draw, size) if draw.chance(0.4) else None
        self.finite = self.x.isfinite().all(dim=1)
        self.counts = self.labels.long() >= 0

    def weighing(self, x: Tensor) -> Tensor | None:
        """Return the weights (B,) that count, made of ``x`` if none are given: (|x| / the largest |x|)^power."""
        if self.weights is not None:
            return self.weights.to(x.dtype)
        if self.power is None:
            return None
        norm = lengths(x.detach())
        usable = self.counts & norm.isfinite()
        largest = torch.where(usable, norm, 0).max() if len(norm) else norm.new_ones(())
        return torch.where(usable, (norm / torch.where(largest > 0, largest, 1)) ** self.power, 0)

    def made(self, x: Tensor) -> Made:
        return aggregate(x, self.labels.tolist(), self.weighing(x))


class Training:
    """A loss with its memory, the model of the memory beside it, and an optimiser where one is needed."""

    def __init__(self, draw: Draw, loss_fn: pmk.PrototypeMemoryLoss, objective: object) -> None:
        self.draw, self.loss_fn, self.objective = draw, loss_fn, objective
        self.memory = loss_fn.memory
        self.power = None if loss_fn.quality is None else loss_fn.quality.power
        self.pool = draw.identities(draw.integer(1, 2 * self.memory.capacity))
        self.model = Slots([-1] * self.memory.capacity, [0] * self.memory.capacity)
        self.optimizer: torch.optim.Optimizer | None = None
        self.history: list[str] = []
        if loss_fn.prototype_gradient == "memory":
            make = draw.pick(
                lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4),  # the default is 0 in float16
                lambda p: torch.optim.SGD(p, lr=0.1),
            )
            self.optimizer = make(loss_fn.parameters())
            loss_fn.attach_optimizer(self.optimizer)

    def batch(self) -> Batch | None:
        """Return a batch of which rounding decides nothing, or None."""
        memory = self.memory
        batch = Batch(self.draw, memory.embedding_dim, self.pool, memory.capacity, memory.prototypes, self.power)
        doubtful = batch.made(batch.x.double()).doubtful(torch.finfo(accumulation(batch.x.dtype)).eps)
        return None if bool(doubtful.any()) else batch

    def write(self, batch: Batch) -> tuple[Made, Written]:
        made = batch.made(batch.x.double())
        return made, write(self.model, made.identities, made.exists.tolist(), self.memory.policy)

    def step(self) -> None:
        batch = self.batch()
        if batch is None:
            return
        self.loss_fn.train()
        before, statistics = copy.deepcopy(self.memory.state), self.objective.state()
        old = before.prototypes.detach().clone()
        made, right = self.write(batch)
        x = batch.x.detach().requires_grad_()
        resumed = self.resumed() if self.draw.chance(0.15) else None
        loss = self.loss_fn(x, batch.labels, batch.weights)
        self.agrees()
        if resumed is not None:
            again = resumed(batch.x, batch.labels, batch.weights)
            same = torch.equal(loss.detach().nan_to_num(), again.detach().nan_to_num())
            require("PrototypeMemoryLoss: goes on bit for bit from its state_dict", same, f"{loss}, then {again}")
            mine, other = self.loss_fn.state_dict(), resumed.state_dict()
            for name in mine:
                same = torch.equal(mine[name].nan_to_num(), other[name].nan_to_num())
                require("PrototypeMemoryLoss: the same state from its state_dict", same, name)
        check = StepCase(self, batch, made, right, old, statistics)
        check.value(loss)
        check.gradients(loss, x)
        if self.optimizer is not None:
            self.optimize(made, right)

    def resumed(self) -> pmk.PrototypeMemoryLoss:
        """Return another loss of the same settings that has loaded this one's state, by way of a file."""
        file = io.BytesIO()
        torch.save(self.loss_fn.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(self.loss_fn)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        if self.optimizer is not None:
            other.attach_optimizer(torch.optim.SGD(other.parameters(), lr=0.1))
        return other

    def agrees(self) -> None:
        exact("PrototypeMemoryLoss: identities", self.memory.identities, self.model.identities)
        exact("PrototypeMemoryLoss: stamps", self.memory.stamps, self.model.stamps)
        place = [int(self.memory.cursor), int(self.memory.clock)]
        exact("PrototypeMemoryLoss: cursor and clock", place, [self.model.cursor, self.model.clock])

    def optimize(self, made: Made, right: Written) -> None:
        assert self.optimizer is not None
        prototypes = self.memory.prototypes
        slots = [s for s, known in zip(right.slots, right.known, strict=True) if s >= 0 and not known]
        for name, value in self.optimizer.state.get(prototypes, {}).items():
            if isinstance(value, Tensor) and value.shape == prototypes.shape:
                require("attach_optimizer: a new identity's state is zero", not bool(value[slots].any()), name)
        if prototypes.grad is None or not bool(prototypes.grad.isfinite().all()):
            self.optimizer.zero_grad()
            return
        idle = ~prototypes.grad.any(dim=1) & ~self.memory.occupied
        self.optimizer.step()
        self.optimizer.zero_grad()
        rows = prototypes.detach().double()
        off = (rows[self.memory.occupied].norm(dim=1) - 1).abs()
        bound = 2 * torch.finfo(prototypes.dtype).eps + 1e-6
        require("attach_optimizer: rows of unit length after a step", bool((off <= bound).all()), f"{off}")
        require("attach_optimizer: empty rows stay zero", not bool(rows[idle].any()))

    def look(self) -> None:
        """In eval mode the memory is read alone, and who is not in it is ignored."""
        batch = self.batch()
        if batch is None:
            return
        self.loss_fn.eval()
        before = {name: value.detach().clone() for name, value in self.loss_fn.state_dict().items()}
        known = [self.model.find(label) for label in batch.labels.tolist()]
        nothing = not any(s >= 0 for s in known)
        x = batch.x.detach().requires_grad_(self.draw.chance(0.5))
        try:
            loss, stats = self.loss_fn(x, batch.labels, return_stats=True)
        except (ValueError, RuntimeError) as error:
            if not nothing or "cannot serve" in str(error):
                raise
            require("PrototypeMemoryLoss: eval of nothing names the reason", "label" in str(error), str(error))
            return
        for name, value in self.loss_fn.state_dict().items():
            require("PrototypeMemoryLoss: eval writes nothing", torch.equal(value, before[name]), name)
        require("PrototypeMemoryLoss: counts in eval", int(stats.entered + stats.refreshed + stats.left) == 0)
        if nothing:
            return  # what a mean over nothing is, tests of the loss say
        case = StepCase(self, batch, None, None, self.memory.prototypes.detach(), self.objective.state(), known)
        case.value(loss)

    def two_at_once(self) -> None:
        """(loss(a) + loss(b)).backward(): right, or PyTorch's own error; never a gradient that is silently another."""
        first, second = self.batch(), self.batch()
        if first is None or second is None or self.loss_fn.reduction == "none":
            return
        self.loss_fn.train()
        if not bool(first.finite.all() and second.finite.all()):
            return
        cases, losses, leaves = [], [], []
        for batch in (first, second):
            old, statistics = self.memory.prototypes.detach().clone(), self.objective.state()
            made, right = self.write(batch)
            x = batch.x.detach().requires_grad_()
            losses.append(self.loss_fn(x, batch.labels, batch.weights))
            leaves.append(x)
            cases.append(StepCase(self, batch, made, right, old, statistics))
        self.agrees()
        total = losses[0].double() + losses[1].double()
        try:
            total.backward()
        except RuntimeError as error:
            own = "modified by an inplace operation" in str(error)
            require("PrototypeMemoryLoss: (loss(a) + loss(b)).backward()", own, str(error))
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            return
        for case, x in zip(cases, leaves, strict=True):
            case.hold_embeddings(x, torch.ones(()), "PrototypeMemoryLoss: (loss(a) + loss(b)).backward(), embeddings")
        if self.optimizer is None:
            return
        if all(case.sure for case in cases):
            self.both(cases)
        self.optimizer.zero_grad()

    def both(self, cases: list[StepCase]) -> None:
        grad = self.memory.prototypes.grad
        right = sum(case.right_gradient_of_prototypes() for case in cases)
        if grad is None:
            grad = torch.zeros_like(self.memory.prototypes)
        rounding = 4 * torch.finfo(grad.dtype).eps + 64 * max(torch.finfo(case.kind()).eps for case in cases)
        scale = 4 * self.objective.scale * sum(case.upstream_total() for case in cases)
        off = (grad.double() - right).abs().max() if right.numel() else torch.zeros(())
        require(
            "PrototypeMemoryLoss: (loss(a) + loss(b)).backward(), prototypes",
            float(off) <= rounding * scale,
            f"off by {float(off):.3g}, the largest is {float(right.abs().max()):.3g}",
        )


class StepCase:
    """One forward pass, and what is right for it: over the rows as the memory held them then."""

    def __init__(
        self,
        training: Training,
        batch: Batch,
        made: Made | None,
        right: Written | None,
        old: Tensor,
        statistics: dict[str, float],
        slots: list[int] | None = None,
    ) -> None:
        self.training, self.batch, self.made, self.written, self.old = training, batch, made, right, old
        self.draw, self.loss_fn, self.objective = training.draw, training.loss_fn, training.objective
        self.statistics = training.objective.state()
        self.stored = training.memory.prototypes.detach().clone()
        self.occupied = training.memory.occupied.clone()
        if slots is None:
            assert made is not None
            assert right is not None
            slots = [right.slots[at] if at >= 0 else -1 for at in made.index]
        self.targets = torch.tensor(slots, dtype=torch.int64)
        self.broken = batch.counts & (self.targets < 0) & ~batch.finite
        self.fresh = self.loss_fn.prototype_gradient == "fresh" and made is not None
        self.sound = torch.where(batch.finite[:, None], batch.x.detach(), 0)
        # A sample that is not finite but whose identity stands in memory has its own loss non-finite alone.
        self.shown = batch.counts & ~batch.finite & (self.targets >= 0) | self.broken

    def softmax(self, x: Tensor, stored: Tensor, graph: bool) -> Softmax:
        rows = stored.to(x.dtype)
        if self.fresh:
            assert self.made is not None
            assert self.written is not None
            made = self.batch.made(x if graph else x.detach())
            leads = torch.tensor([s >= 0 for s in self.written.slots], dtype=torch.bool)
            if bool(leads.any()):
                at = torch.tensor(self.written.slots)[leads]
                known = torch.tensor(self.written.known)[leads]
                ratio = self.loss_fn.memory.refresh_ratio
                written, _ = blended(self.old[at].to(x.dtype), known, made.prototypes[leads], ratio)
                rows = rows.index_copy(0, at, written)
        return softmax(
            x,
            rows,
            torch.where(self.shown, -1, self.targets),
            self.occupied,
            margin=self.objective.right_margin,
            mining=self.objective.right_rule,
            scale=self.objective.scale,
            normalize=False,
            before=self.statistics,
            training=False,
        )

    @property
    def clear(self) -> bool:
        """Whether the oracle's batch is the package's: broken samples take part in the aggregation, as NaN."""
        return not bool((~self.batch.finite & self.batch.counts).any())

    def right(self) -> Softmax:
        return self.softmax(self.sound.double(), self.stored.double(), False)

    @property
    def sure(self) -> bool:
        _, slope_sure = sure_samples(self.right(), self.batch.x.dtype)
        return self.clear and bool((slope_sure | (self.targets < 0)).all())

    def kind(self) -> torch.dtype:
        return accumulation(self.batch.x.dtype)

    def value(self, loss: Tensor) -> None:
        require("PrototypeMemoryLoss: dtype", loss.dtype == self.kind(), f"{loss.dtype}")
        reduction = self.loss_fn.reduction
        if bool(self.shown.any()) and self.objective.right_rule.keep is None:
            shown = loss[self.shown] if reduction == "none" else loss
            require("PrototypeMemoryLoss: a broken embedding shows", not bool(shown.isfinite().any()), f"{shown}")
        if not self.clear:
            return
        right = self.right()
        sure, _ = sure_samples(right, self.batch.x.dtype)
        sure = sure | (self.targets < 0)
        if not bool(sure.all()) and reduction != "none":
            require("PrototypeMemoryLoss: finite", bool(loss.isfinite()), f"{loss}")
            return

        def oracle(x: Tensor, stored: Tensor) -> Values:
            with torch.no_grad():
                r = self.softmax(x, stored, False)
                return {"loss": reduced(r.losses, r.kept, reduction)}

        judge = Judge(self.draw, oracle, [self.sound, self.stored], self.batch.x.dtype)
        condition = self.condition() if self.fresh else 1.0
        steep = slope(right, self.batch.x.dtype)
        if reduction != "none":
            steep = steep[self.targets >= 0].max() if bool((self.targets >= 0).any()) else torch.ones(())
        natural = (1 + judge.truth["loss"].abs() + self.objective.scale * steep) * condition
        natural = natural * (max(1, int((self.targets >= 0).sum())) if reduction == "sum" else 1)
        judge.close("PrototypeMemoryLoss: value", "loss", loss, natural, sure if reduction == "none" else None)

    def condition(self) -> float:
        assert self.made is not None
        assert self.written is not None
        exists = self.made.exists
        worst = float(self.made.condition[exists].max()) if bool(exists.any()) else 1.0
        at = torch.tensor(self.written.slots, dtype=torch.int64)[exists]
        known = torch.tensor(self.written.known, dtype=torch.bool)[exists]
        if len(at):
            ratio = self.loss_fn.memory.refresh_ratio
            _, length = blended(self.old[at].double(), known, self.made.prototypes[exists], ratio)
            worst /= max(1e-6, float(length.min()))
        return worst

    def gradients(self, loss: Tensor, x: Tensor) -> None:
        right = self.right()
        _, sure = sure_samples(right, self.batch.x.dtype)
        upstream = self.draw.normal(*loss.shape)
        if self.loss_fn.reduction == "none":
            upstream = torch.where(sure & (self.targets >= 0), upstream, 0)
        if not loss.requires_grad:
            require("PrototypeMemoryLoss: carries a gradient", x.numel() == 0, "loss.requires_grad is False")
            return
        loss.backward(upstream.to(loss.dtype))
        if not self.clear or (self.loss_fn.reduction != "none" and not self.sure):
            return
        self.hold_embeddings(x, upstream, "PrototypeMemoryLoss: gradient of embeddings")
        if self.loss_fn.prototype_gradient == "memory":
            self.hold_prototypes(upstream)

    def upstream_total(self, upstream: Tensor | None = None) -> float:
        kept = max(1, int(self.right().kept.sum()))
        if upstream is None or upstream.ndim == 0:
            one = 1.0 if upstream is None else float(upstream.abs())
            return one * (1 if self.loss_fn.reduction == "mean" else kept)
        return float(upstream.abs().sum())

    def hold_embeddings(self, x: Tensor, upstream: Tensor, rule: str) -> None:
        if not self.sure and self.loss_fn.reduction != "none":
            return

        def oracle(e: Tensor, stored: Tensor) -> Values:
            e = e.detach().clone().requires_grad_()
            r = self.softmax(e, stored, True)
            total = reduced(r.losses, r.kept, self.loss_fn.reduction)
            if total.requires_grad:
                total.backward(upstream.to(total.dtype))
            return {"x": torch.zeros_like(e) if e.grad is None else e.grad}

        judge = Judge(self.draw, oracle, [self.sound, self.stored], self.batch.x.dtype)
        size = lengths(self.sound.double())
        natural = 4 * self.objective.scale * self.upstream_total(upstream) / torch.where(size > 0, size, 1)
        if self.fresh:
            natural = natural * self.condition() ** 2 * max(1.0, self.heaviest())
        if self.right().bound.penalty is not None:
            natural = natural + 4 * self.objective.scale * self.upstream_total(upstream)
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        judge.close(rule, "x", grad, natural[:, None], in_parts=self.fresh, scaled_up=scales_up(upstream))

    def heaviest(self) -> float:
        weights = self.batch.weighing(self.sound.double())
        if weights is None or not len(weights):
            return 1.0
        total: dict[int, float] = {}
        for label, q in zip(self.batch.labels.tolist(), weights.tolist(), strict=True):
            total[label] = total.get(label, 0.0) + q
        least = min((t for t in total.values() if t > 0), default=1.0)
        return float(weights.max()) / least

    def hold_prototypes(self, upstream: Tensor) -> None:
        grad = self.loss_fn.memory.prototypes.grad
        grad = torch.zeros_like(self.stored) if grad is None else grad

        def oracle(e: Tensor, stored: Tensor) -> Values:
            return {"w": self.gradient_of_prototypes(e, stored, upstream)}

        judge = Judge(self.draw, oracle, [self.sound, self.stored], self.batch.x.dtype)
        natural = 4 * self.objective.scale * self.upstream_total(upstream)
        judge.close("PrototypeMemoryLoss: gradient of prototypes", "w", grad, max(natural, 1e-300))

    def gradient_of_prototypes(self, e: Tensor, stored: Tensor, upstream: Tensor) -> Tensor:
        stored = stored.detach().clone().requires_grad_()
        r = self.softmax(e.detach(), stored, False)
        total = reduced(r.losses, r.kept, self.loss_fn.reduction)
        if total.requires_grad:
            total.backward(upstream.to(total.dtype))
        return torch.zeros_like(stored) if stored.grad is None else stored.grad

    def right_gradient_of_prototypes(self) -> Tensor:
        return self.gradient_of_prototypes(
            self.sound.double(), self.stored.double(), torch.ones((), dtype=torch.float64)
        )
