"""``aggregate_prototypes``: prototypes, identities, index, mass and both gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import Draw, accumulation
from tests.fuzz.oracles.aggregate import aggregate
from tests.fuzz.oracles.rows import lengths
from tests.fuzz.places import small, somewhere
from tests.fuzz.verdict import Judge, Values, exact, refused, require


def draw_weights(draw: Draw, size: int) -> Tensor | None:
    """Return weights (size,) >= 0 or None: some zero, some huge, of a dtype of their own."""
    if draw.chance(0.4):
        return None
    dtype = draw.dtype()
    weights = draw.uniform(size) * draw.pick(1.0, 1.0, 100.0, 1e-3)
    weights[draw.mask(size, draw.pick(0.0, 0.2, 0.6))] = 0
    return draw.layout(weights.to(dtype))


def aggregate_prototypes(draw: Draw) -> None:
    with somewhere(draw) as place:
        batch = min(draw.batch(), 8 if small(place) else 99)
        columns, dtype = draw.columns(), draw.dtype()
        normalize = draw.chance(0.7)
        x = draw.rows(batch, columns, dtype)
        labels = draw.labels(batch, draw.identities(draw.integer(1, 6)))
        weights = draw_weights(draw, batch)
        draw.note(shape=(batch, columns), dtype=dtype, labels=labels.dtype, normalize=normalize)
        draw.note(weights=None if weights is None else weights.dtype)
        check(draw, x, labels, weights, normalize)


def check(draw: Draw, x: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool) -> None:
    kind, eps = accumulation(x.dtype), torch.finfo(accumulation(x.dtype)).eps
    made = aggregate(x.double(), labels.tolist(), None if weights is None else weights.double(), normalize)
    present = len(made.identities)

    most = draw.pick(None, None, present, present + draw.integer(0, 4), max(0, present - 1))
    draw.note(max_identities=most)
    if most is not None and most < present:
        refused(
            "aggregate_prototypes: too many identities",
            lambda: pmk.aggregate_prototypes(x, labels, weights, normalize=normalize, max_identities=most),
            "max_identities",
        )
        return
    e = x.detach().requires_grad_(draw.chance(0.8))
    q = None if weights is None else weights.detach().requires_grad_(draw.chance(0.7))
    ours = pmk.aggregate_prototypes(e, labels, q, normalize=normalize, max_identities=most)
    again = pmk.aggregate_prototypes(e, labels, q, normalize=normalize, max_identities=most)

    rows = present if most is None else most
    require("aggregate_prototypes: dtype", ours.prototypes.dtype == kind, str(ours.prototypes.dtype))
    exact("aggregate_prototypes: identities", ours.identities, made.identities + [-1] * (rows - present))
    exact("aggregate_prototypes: index", ours.index, made.index)
    spare = ours.prototypes[present:].any() or ours.mass[present:].any()
    require("aggregate_prototypes: unused rows are zero", not bool(spare))
    for a, b in zip(ours, again, strict=True):
        require("aggregate_prototypes: the same bits again", torch.equal(a, b))

    upstream = draw.normal(present, x.shape[1])
    of_mass = draw.normal(present)
    doubtful = made.doubtful(eps)
    sound = ~doubtful
    exists = made.exists

    def oracle(e: Tensor, *q: Tensor) -> Values:
        e = e.detach().clone().requires_grad_()
        q = [w.detach().clone().requires_grad_() for w in q]
        made = aggregate(e, labels.tolist(), q[0] if q else None, normalize)
        chosen = torch.where(sound & exists & made.exists, 1.0, 0.0).to(e.dtype)[:, None]
        loss = (made.prototypes * upstream.to(e.dtype) * chosen).sum() + (made.mass * of_mass.to(e.dtype)).sum()
        if loss.requires_grad:
            loss.backward()
        zero = torch.zeros_like
        values = {"prototypes": made.prototypes, "mass": made.mass, "embeddings": zero(e) if e.grad is None else e.grad}
        if q:
            values["weights"] = zero(q[0]) if q[0].grad is None else q[0].grad
        return values

    judge = Judge(draw, oracle, [x] if weights is None else [x, weights], x.dtype)
    lives = ours.prototypes[:present].any(dim=1)
    wrong = (lives != exists) & sound
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        of = [i for i, at in enumerate(made.index) if at == row]
        norms = lengths(x[of].double()).tolist()
        require(
            "aggregate_prototypes: which identities have a prototype",
            False,
            f"{made.identities[row]} of samples with norms {norms}: {bool(lives[row])}, not {bool(exists[row])}",
        )
    condition = made.condition.clamp(1, 1e300)[:, None]
    judge.close("aggregate_prototypes: prototypes", "prototypes", ours.prototypes[:present], condition, sound[:, None])
    judge.close("aggregate_prototypes: mass", "mass", ours.mass[:present], judge.truth["mass"])
    if not (e.requires_grad or (q is not None and q.requires_grad)):
        return

    kept = torch.where(sound & exists, 1.0, 0.0).to(kind)[:, None]
    loss = (ours.prototypes[:present] * upstream.to(kind) * kept).sum() + (ours.mass[:present] * of_mass.to(kind)).sum()
    if loss.requires_grad:
        loss.backward()
    index = torch.tensor(made.index, dtype=torch.int64)
    mine = (index >= 0) & exists[index.clamp(min=0)] if present else torch.zeros(len(index), dtype=torch.bool)
    steep = torch.zeros(len(index), dtype=torch.float64)
    if present:  # |g_c| / |m_c|, magnified where the sum cancels
        steep = upstream.norm(dim=1)[index.clamp(min=0)] / made.size[index.clamp(min=0)].clamp(min=1e-300)
        steep = torch.where(mine, steep * condition[index.clamp(min=0), 0], 0)
    given = torch.ones(len(index), dtype=torch.float64) if weights is None else weights.double()
    given = torch.where(_mass_of_mine(made.mass, index) > 0, given, 1)
    size = lengths(x.double())
    if e.requires_grad and e.grad is not None:
        natural = given * steep / (torch.where(size > 0, size, 1) if normalize else 1)
        zero = ~mine | ~size.isfinite()
        require(
            "aggregate_prototypes: no gradient where no prototype is",
            not bool(e.grad[zero].any()),
            f"rows {zero.nonzero()[:, 0].tolist()}: {e.grad[zero].tolist()}",
        )
        judge.close(
            "aggregate_prototypes: gradient of embeddings", "embeddings", e.grad, natural[:, None], mine[:, None]
        )
    if q is not None and q.requires_grad and q.grad is not None:
        natural = (
            steep * (1 if normalize else torch.where(size.isfinite(), size, 0)) + of_mass.abs()[index.clamp(min=0)]
            if present
            else steep
        )
        judge.close(
            "aggregate_prototypes: gradient of weights", "weights", q.grad, natural.clamp(min=1e-300), index >= 0
        )


def _mass_of_mine(mass: Tensor, index: Tensor) -> Tensor:
    return (
        torch.where(index >= 0, mass[index.clamp(min=0)], 0) if len(mass) else torch.zeros(len(index), dtype=mass.dtype)
    )
