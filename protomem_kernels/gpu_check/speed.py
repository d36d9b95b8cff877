"""Part 3: what the device can do at most, then how long every operator takes, beside PyTorch's own ways.

A process per size and dtype, the most telling first. The results are looked at too, at sizes that no suite reaches:
beside the same formulas in float32 on the device, where they fit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels.gpu_check import peers
from protomem_kernels.gpu_check.device import backends, found, lost, median_ms, stands_in
from protomem_kernels.gpu_check.processes import GO_ON_IN_A_NEW_ONE, Task
from protomem_kernels.gpu_check.records import Record

# (B, M, D) by the telling: the table's centre, then what differs from it in one way.
SIZES = [
    (512, 100_000, 512),
    (2048, 100_000, 512),
    (512, 1_000_000, 512),
    (512, 100_000, 128),
    (2048, 1_000_000, 512),
    (2048, 100_000, 128),
    (512, 1_000_000, 128),
    (2048, 1_000_000, 128),
]
SMALL = [(8, 64, 32)]  # where a CPU stands in
FORWARD, EMBEDDINGS, PROTOTYPES = "forward", "embeddings' gradient", "prototypes' gradient"  # each with those before
FAR = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
TILE = 16_384  # slots per product of the bare product, whose results stay in L2
COPIED, SIDE = 2**30, 8192  # bytes, and the side of the matrices of the ceilings
ENQUEUED = 16  # calls of enqueue_ with other identities each


class Case(NamedTuple):
    """Something to be timed.

    Attributes:
        name: of it.
        make: returns a function that runs it and returns its floating results.
        ours: whether a failure is ours.
        truth: returns what the results should be.
        far: from the truth, relative to its norm, is no rounding any more.
    """

    name: str
    make: Callable[[], Callable[[], list[Tensor]]]
    ours: bool = False
    truth: Callable[[], list[Tensor]] | None = None
    far: float = 0.0


def tasks(checkout: Path) -> list[Task]:
    """Return the ceilings, then a task per size and dtype."""
    centre, *others = SMALL if stands_in() else SIZES
    order = [(centre, "bfloat16"), *([] if stands_in() else [(centre, "float32")])]
    order += [(size, dtype) for dtype in ("bfloat16", "float32") for size in others]
    names = ["ceilings", *(f"{size[0]} {size[1]} {size[2]} {dtype}" for size, dtype in order)]
    return [Task("speed", name, silence=90, resumes=True) for name in names]


def run(record: Record, name: str, first: int, checkout: Path) -> int:
    """Time one task's cases from the first on, and write each."""
    if name == "ceilings":
        cases, heading = list(_ceilings()), ""
    else:
        *numbers, kind = name.split()
        batch, slots, dim = map(int, numbers)
        heading = f"B {batch} M {slots} D {dim} {kind}: "
        cases = list(Inputs(batch, slots, dim, getattr(torch, kind)).cases())
    for number, case in enumerate(cases[first:], first):
        record.begin(heading + case.name, number)
        if not measure(record, heading, case):
            return GO_ON_IN_A_NEW_ONE
    return 0


def measure(record: Record, heading: str, case: Case) -> bool:
    """Time a case, judge its results and write both; return False if the device is lost to this process."""
    what = heading + case.name
    try:
        run = case.make()
        before = _allocated()
        results = run()
        peak = _peak() - before
        off = _distance(results, case.truth) if case.truth is not None else None
        figures = median_ms(run)
        ok = None if off is None else off <= case.far
        said = f"{figures['ms']:.4g} ms" + ("" if off is None else f", {off:.2g} from float32")
        record.write(what, ok, said, **figures, mib=peak / 2**20, distance=off)
    except torch.OutOfMemoryError as problem:
        torch.cuda.empty_cache()
        record.write(what, None, f"out of memory: {str(problem)[:200]}")
    except Exception as problem:
        wrong = case.ours and "cannot serve" not in str(problem)
        record.write(what, False if wrong else None, f"{type(problem).__name__}: {str(problem)[:1000]}")
        return not lost()
    return True


def _distance(results: list[Tensor], truth: Callable[[], list[Tensor]]) -> float | None:
    """Return how far results are from the truth, relative to its norm, or None where the truth does not fit."""
    try:
        expected = truth()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    pairs = zip(results, expected, strict=True)
    gaps = [float((a.float() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def _allocated() -> int:
    if stands_in():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return 0 if stands_in() else torch.cuda.max_memory_allocated()


class Inputs:
    """A batch and a memory on the device, and everything that is timed with them.

    Args:
        batch: B; x is (B, D), no unit rows.
        slots: M; w is (M, D), unit rows.
        dim: D.
        dtype: of both.
    """

    def __init__(self, batch: int, slots: int, dim: int, dtype: torch.dtype) -> None:
        device = found() or "cpu"
        generator = torch.Generator(device).manual_seed(1)
        self.w = torch.empty(slots, dim, dtype=dtype, device=device)
        for part in self.w.split(100_000):  # a float32 copy of all of it would be twice as large
            rows = torch.randn(part.shape, generator=generator, device=device)
            part.copy_(torch.nn.functional.normalize(rows))
        self.targets = torch.randint(slots, (batch,), generator=generator, device=device)
        near = torch.randn(batch, dim, generator=generator, device=device) / dim**0.5 + self.w[self.targets].float()
        self.x = (20 * near).to(dtype)
        self.labels = torch.arange(batch, device=device) // 2
        self.slots = slots

    def cases(self) -> Iterator[Case]:
        """Yield the cases, the most telling first: our losses, what they are measured beside, the other operators."""
        names = backends()
        yield Case("the bare product", lambda: self._product)
        for what in (EMBEDDINGS, FORWARD, PROTOTYPES):
            truth = functools.partial(self._truth, peers.loss, what)
            yield from self._ours("margin_softmax_loss", _loss, what, truth, names)
            yield self._theirs("eager", peers.loss, what)
            if not stands_in():  # compiling takes longer than a dry run may
                yield self._theirs("torch.compile", lambda *args: peers.compiled()(*args), what)
            if hasattr(torch.nn.functional, "linear_cross_entropy"):
                yield self._theirs("linear_cross_entropy (no margin)", peers.linear_cross_entropy, what)
        for operator, ours, theirs in (
            ("hardest_negatives", _hardest, peers.hardest),
            ("margin_softmax_logits", _logits, peers.logits),
        ):
            for what in (FORWARD, EMBEDDINGS):
                truth = functools.partial(self._truth, theirs, what)
                # Which of two equal cosines is taken is rounding, and changes the gradient by a row.
                judged = None if (operator, what) == ("hardest_negatives", EMBEDDINGS) else truth
                yield from self._ours(operator, ours, what, judged, names)
                yield self._theirs(f"{operator} eager", theirs, what)
        for what in (FORWARD, EMBEDDINGS):
            truth = functools.partial(self._truth, _eager_aggregate, what)
            yield from self._ours("aggregate_prototypes", _aggregate, what, truth, names)
            yield self._theirs("aggregate_prototypes eager", _eager_aggregate, what)
        for policy in ("fifo", "lru"):
            for name in names:
                yield Case(f"enqueue_ {policy} {name}", functools.partial(self._enqueue, policy, name), ours=True)

    def _ours(self, operator: str, function: Any, what: str, truth: Any, names: list[str]) -> Iterator[Case]:
        for name in names:
            make = functools.partial(self._step, function, what, name)
            yield Case(f"{operator} {what} {name}", make, True, truth, FAR[self.x.dtype])

    def _theirs(self, name: str, function: Any, what: str) -> Case:
        return Case(f"{name} {what}", functools.partial(self._step, function, what))

    def _step(self, function: Any, what: str, backend: str | None = None) -> Callable[[], list[Tensor]]:
        x, w = self.x.clone(), self.w.detach()
        given = self.labels if function in (_aggregate, _eager_aggregate) else self.targets

        def run() -> list[Tensor]:
            leaves = [leaf.detach().requires_grad_() for leaf in {FORWARD: [], EMBEDDINGS: [x]}.get(what, [x, w])]
            rows = leaves[0] if leaves else x
            with (
                pmk.use_backend(backend) if backend else contextlib.nullcontext(),
                torch.set_grad_enabled(bool(leaves)),
            ):
                made = function(rows, leaves[1] if len(leaves) > 1 else w, given)
                grads = torch.autograd.grad(made, leaves, torch.ones_like(made)) if leaves else ()
            return [made.detach(), *grads]

        return run

    def _truth(self, function: Any, what: str) -> list[Tensor]:
        """Return the results of a formula in float32, the inputs being what they are in their dtype."""
        needed = 4 * peers.MATRICES * len(self.x) * self.slots
        if not stands_in() and needed > torch.cuda.mem_get_info()[0]:
            raise torch.OutOfMemoryError("the truth does not fit")
        exact = object.__new__(Inputs)
        exact.x, exact.w, exact.targets, exact.labels = self.x.float(), self.w.float(), self.targets, self.labels
        return exact._step(function, what)()

    def _product(self) -> list[Tensor]:
        out = self.x.new_empty(len(self.x), min(TILE, self.slots))
        for rows in self.w.split(TILE):
            torch.mm(self.x, rows.T, out=out[:, : len(rows)])
        return []

    def _enqueue(self, policy: str, backend: str) -> Callable[[], list[Tensor]]:
        """Half of each call's identities are known."""
        batch, device = len(self.x), self.x.device
        state = pmk.MemoryState.empty(self.slots, self.x.shape[1], dtype=self.w.dtype, device=device)
        state.prototypes.copy_(self.w)
        state.identities.copy_(torch.arange(self.slots, device=device))
        known = self.slots - 1 - torch.arange(batch // 2, device=device)
        fresh = torch.arange(self.slots, self.slots + batch - batch // 2, device=device)
        calls, at = [torch.cat([known, fresh + batch * call]) for call in range(ENQUEUED)], 0
        rows = torch.nn.functional.normalize(self.x.float())

        def run() -> list[Tensor]:
            nonlocal at
            at += 1
            with pmk.use_backend(backend):
                pmk.enqueue_(state, rows, calls[at % ENQUEUED], policy=policy)
            return []

        return run


def _loss(x: Tensor, w: Tensor, targets: Tensor) -> Any:
    return pmk.margin_softmax_loss(x, w, targets, margin=pmk.ArcFace(peers.MARGIN), scale=peers.SCALE)


def _hardest(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return pmk.hardest_negatives(x, w, targets, k=peers.K).cosines


def _logits(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return pmk.margin_softmax_logits(x, w, targets, margin=pmk.ArcFace(peers.MARGIN), scale=peers.SCALE)


def _aggregate(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return pmk.aggregate_prototypes(x, labels, max_identities=(len(x) + 1) // 2).prototypes


def _eager_aggregate(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return peers.aggregate(x, labels, (len(x) + 1) // 2)


def _ceilings() -> Iterator[Case]:
    """Yield the bandwidth of a copy, and products of square matrices in bf16, tf32 and float32."""
    device, side = found() or "cpu", 64 if stands_in() else SIDE
    bytes_each = 2**16 if stands_in() else COPIED

    def copy() -> Callable[[], list[Tensor]]:
        a = torch.zeros(bytes_each, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        return lambda: [b.copy_(a)][:0]

    def product(dtype: torch.dtype, precision: str) -> Callable[[], list[Tensor]]:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: [torch.mm(a, b, out=out)][:0]

    yield Case(f"copy of {bytes_each} bytes (read and written)", copy)
    yield Case(f"product of {side} x {side}, bf16", functools.partial(product, torch.bfloat16, "highest"))
    yield Case(f"product of {side} x {side}, tf32", functools.partial(product, torch.float32, "high"))
    yield Case(f"product of {side} x {side}, float32", functools.partial(product, torch.float32, "highest"))
