"""Training steps on several ranks beside the same steps in one process, on the same batches cut into parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.distributed.pool import Pool

DIM = 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


class Steps(NamedTuple):
    """Some steps of training.

    Attributes:
        options: of ``PrototypeMemoryLoss``; parts with state are made anew by ``fresh_options``.
        batches: (embeddings (N, D), labels (N,), weights (N,) or None) of all ranks.
        sizes: how many rows of each batch each rank has.
        upstreams: of each rank and step.
        learning_rate: of the rows, with ``prototype_gradient="memory"``.
    """

    options: Mapping[str, Any]
    batches: Sequence[tuple[Tensor, Tensor, Tensor | None]]
    sizes: Sequence[Sequence[int]]
    upstreams: Sequence[Sequence[float]]
    learning_rate: float = 0.5


MARGINS: dict[str, Any] = {
    "arc": lambda: pmk.ArcFace(0.3),
    "straight": lambda: pmk.ArcFace(0.3, straight_through=True),
    "cos": lambda: pmk.CosFace(0.2),
    "combined": lambda: pmk.CombinedMargin(1.2, 0.2, 0.1),
    "sphere": lambda: pmk.SphereFace(1.5),
    "ada": lambda: pmk.AdaFace(0.3, momentum=0.3),
    "mag": lambda: pmk.MagFace(1.0, 8.0, 0.2, 0.5, 2.0),
    "elastic": lambda: pmk.ElasticFace(0.3, 0.05, generator=torch.Generator().manual_seed(5)),
    "d-softmax": lambda: pmk.DSoftmax(0.9),
    "function": lambda: by_norm,
    "labels": lambda: pmk.LabelMargins(by_label),
}
MININGS: dict[str, Any] = {
    "none": lambda: None,
    "mv": lambda: pmk.MVSoftmax(0.3),
    "curricular": lambda: pmk.CurricularFace(0.3),
    "noisy": lambda: pmk.NoisyNegativeFilter(0.3),
    "hardest": lambda: pmk.HardestNegatives(3),
    "samples": lambda: pmk.HardSamples(0.6),
}
QUALITIES: dict[str, Any] = {
    "none": lambda: None,
    "norm": lambda: pmk.NormQuality(1.5),
    "norm, differentiated": lambda: pmk.NormQuality(1.5, detach=False),
    "center": lambda: pmk.CenterQuality(),
    "softmax": lambda: pmk.SoftmaxQuality(pmk.NormQuality(), 0.5),
    "recognizability": lambda: pmk.RecognizabilityQuality(DIM),
}


def by_norm(cosine: Tensor, norm: Tensor) -> Tensor:
    """A margin of the user's own: the norm is not detached."""
    return cosine - 0.05 * norm / (1 + norm)


def by_label(labels: Tensor) -> Tensor:
    """A margin for each identity."""
    return 0.1 + 0.05 * (labels % 7).double()


def made(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with names turned into new parts."""
    built = dict(options)
    for name, choices in (("margin", MARGINS), ("mining", MININGS), ("quality", QUALITIES)):
        if name in built:
            built[name] = choices[built[name]]()
    return built


def head(options: Mapping[str, Any], group: Any = None, learning_rate: float = 0.5) -> pmk.PrototypeMemoryLoss:
    """Make a head; with ``prototype_gradient="memory"`` the optimiser is attached, ``head.optimizer``."""
    given = made(options)
    if group is None:
        given = {name: value for name, value in given.items() if name not in ("average_gradients", "equal_batches")}
    loss_fn = pmk.PrototypeMemoryLoss(DIM, process_group=group, **given)
    loss_fn.optimizer = None  # type: ignore[assignment]
    if loss_fn.prototype_gradient == "memory":
        loss_fn.__dict__["optimizer"] = torch.optim.SGD(loss_fn.parameters(), lr=learning_rate)
        loss_fn.attach_optimizer(loss_fn.optimizer)
    return loss_fn


def batches(
    steps: int,
    total: int,
    *,
    identities: int = 40,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weighted: bool = False,
    ignored: bool = True,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Draw batches of all ranks; some labels negative, in each the first identity broken by antipodes now and then."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(identities, DIM, generator=generator, dtype=torch.float64)
    drawn = []
    for _ in range(steps):
        # At least two images of each: at a cosine of 1 rounding is multiplied by 1e7 on its way to a gradient.
        labels = torch.randperm(identities, generator=generator)[: max(total // 3, 1)]
        labels = labels.repeat(4)[:total][torch.randperm(total, generator=generator)]
        noise = torch.randn(total, DIM, generator=generator, dtype=torch.float64)
        e = (centers[labels] + 0.7 * noise) * (1 + 3 * torch.rand(total, 1, generator=generator, dtype=torch.float64))
        labels = labels * 1_000_003 + 17
        if ignored and total > 6:
            labels[4] = -1
            labels[5:7] = 999  # an identity of its own whose two images cancel: no prototype
            e[6] = -e[5]
        weights = torch.rand(total, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
        drawn.append((e.to(dtype), labels, None if weights is None else weights.to(dtype)))
    return drawn


def cut(total: int, ranks: int, raggedness: str) -> list[int]:
    """Say how many rows each rank has: "even", "ragged" (one more than the next), or "empty" (rank 1 has none)."""
    if raggedness == "empty":
        sizes = [0 if rank == 1 else total // (ranks - 1) for rank in range(ranks)]
    elif raggedness == "ragged":
        weights = [rank + 1 for rank in range(ranks)]
        sizes = [total * w // sum(weights) for w in weights]
    else:
        sizes = [total // ranks] * ranks
    sizes[0] += total - sum(sizes)
    return sizes


def part(values: Tensor | None, sizes: Sequence[int], rank: int) -> Tensor | None:
    return None if values is None else values.split(list(sizes))[rank].clone()


def shares(group: Any, steps: Steps, average: bool | int = False) -> dict[str, Any]:
    """Run the steps on this rank."""
    options = {"average_gradients": average, **steps.options}
    loss_fn = head(options, group, steps.learning_rate)
    rank = loss_fn.ranks.rank
    seen: dict[str, Any] = {"losses": [], "gradients": [], "stats": [], "weights": []}
    for (e, labels, weights), sizes, upstream in zip(steps.batches, steps.sizes, steps.upstreams, strict=True):
        mine = part(e, sizes, rank).requires_grad_()  # type: ignore[union-attr]
        given = part(weights, sizes, rank)
        if given is not None and loss_fn.prototype_gradient == "fresh":
            given.requires_grad_()
        loss, stats = loss_fn(mine, part(labels, sizes, rank), given, return_stats=True)
        if loss_fn.optimizer is not None:
            loss_fn.optimizer.zero_grad()
        loss.backward(upstream[rank] * torch.ones_like(loss))
        if loss_fn.optimizer is not None:
            loss_fn.optimizer.step()
        seen["losses"].append(loss.detach())
        seen["gradients"].append(mine.grad)
        seen["weights"].append(None if given is None or given.grad is None else given.grad)
        seen["stats"].append([value.clone() for value in stats])
    seen |= afterwards(loss_fn, steps, rank)
    return seen


def afterwards(loss_fn: pmk.PrototypeMemoryLoss, steps: Steps, rank: int) -> dict[str, Any]:
    """Return what is seen in eval mode, the memory's rows by identity, the running statistics, and doppelgangers."""
    e, labels, _ = steps.batches[-1]
    labels = torch.where(torch.arange(len(labels)) == 1, 123_456_789, labels)  # somebody unknown
    mine, sizes = part(labels, steps.sizes[-1], rank), steps.sizes[-1]
    with torch.no_grad():
        evaluated = loss_fn.eval()(part(e, sizes, rank), mine)
        known = loss_fn.memory.lookup(mine) >= 0
        cosines, twins = loss_fn.memory.doppelgangers(mine, k=4)
    memory = loss_fn.memory
    there = memory.occupied
    rows = memory.identities[there], memory.prototypes.detach()[there], memory.stamps[there]
    statistics = {name: value.clone() for name, value in loss_fn.named_buffers() if not name.startswith("memory.")}
    return {
        "evaluated": evaluated,
        "known": known,
        "cosines": cosines,
        "twins": twins,
        "rows": rows,
        "statistics": statistics,
        "clock": int(memory.clock),
    }


def alone(steps: Steps) -> dict[str, Any]:
    """Run the steps in one process: each sample's loss with the upstream of the rank that it would be on."""
    reduction = steps.options.get("reduction", "mean")
    loss_fn = head({**steps.options, "reduction": "none"}, None, steps.learning_rate)
    whole = head(steps.options, None, steps.learning_rate)  # for the numbers that the user sees
    seen: dict[str, Any] = {"losses": [], "gradients": [], "stats": [], "weights": []}
    for (e, labels, weights), sizes, upstream in zip(steps.batches, steps.sizes, steps.upstreams, strict=True):
        mine = e.clone().requires_grad_()
        given = None if weights is None else weights.clone()
        if given is not None and loss_fn.prototype_gradient == "fresh":
            given.requires_grad_()
        state = {key: value.clone() for key, value in loss_fn.state_dict().items()}
        whole.load_state_dict(state)
        seen["losses"].append(whole(e, labels, weights).detach())
        losses, stats = loss_fn(mine, labels, given, return_stats=True)
        each = torch.repeat_interleave(torch.tensor(upstream, dtype=losses.dtype), torch.tensor(sizes))
        total = (losses * each).sum()
        if reduction == "mean":
            total = total / counted(loss_fn, losses, stats)
        if loss_fn.optimizer is not None:
            loss_fn.optimizer.zero_grad()
        total.backward()
        if loss_fn.optimizer is not None:
            loss_fn.optimizer.step()
        seen["gradients"].append(mine.grad)
        seen["weights"].append(None if given is None else given.grad)
        seen["stats"].append([value.clone() for value in stats])
    whole.load_state_dict(loss_fn.state_dict())
    sizes = [len(steps.batches[-1][1])]
    seen |= afterwards(whole, steps._replace(sizes=[sizes] * len(steps.batches)), 0)
    return seen


def counted(loss_fn: pmk.PrototypeMemoryLoss, losses: Tensor, stats: Any) -> int:
    """Return over how many samples the mean goes: those with a target, or the hardest of them."""
    counts = stats.target_cosine != 0
    if isinstance(loss_fn.mining, pmk.HardSamples):
        return int((losses.detach() != 0).sum())
    return max(int(counts.sum()), 1)


def compare(ours: Sequence[dict[str, Any]], wanted: dict[str, Any], steps: Steps, factor: float = 1.0) -> float:
    """Hold the ranks' steps to one process's, within the tolerance of the dtype; return the largest difference.

    Of a gradient relative to the largest number in it, of anything else relative to that or 1.
    """
    tolerance, worst = TOLERANCE[steps.batches[0][0].dtype], 0.0

    def close(a: Any, b: Any, what: str, least: float = 1.0, whole: Tensor | None = None) -> None:
        nonlocal worst
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.shape == b.shape, what
        assert torch.equal(a.isfinite(), b.isfinite()), what
        if not b.numel():
            return
        finite = b.isfinite()
        assert torch.equal(a[~finite].nan_to_num(7), b[~finite].nan_to_num(7)), what
        size = max(float((b if whole is None else whole).double().abs().nan_to_num(0, 0, 0).max()), least)
        difference = float((torch.where(finite, a, 0) - torch.where(finite, b, 0)).abs().max()) / size
        assert difference <= tolerance, f"{what}: off by {difference} of {size}"
        worst = max(worst, difference)

    for step, sizes in enumerate(steps.sizes):
        one = wanted["losses"][step]
        for rank, seen in enumerate(ours):
            what = f"step {step}, rank {rank}"
            close(seen["losses"][step], one if one.ndim == 0 else part(one, sizes, rank), f"loss of {what}")
            whole = factor * wanted["gradients"][step]
            close(seen["gradients"][step], part(whole, sizes, rank), f"gradient of {what}", 1e-3, whole)
            if wanted["weights"][step] is not None:
                close(seen["weights"][step], factor * part(wanted["weights"][step], sizes, rank), f"weights of {what}")
            for place, (a, b) in enumerate(zip(seen["stats"][step], wanted["stats"][step], strict=True)):
                close(a, b if b.ndim == 0 else part(b, sizes, rank), f"statistic {place} of {what}")
    sizes = steps.sizes[-1]
    for rank, seen in enumerate(ours):
        one = wanted["evaluated"]
        close(seen["evaluated"], one if one.ndim == 0 else part(one, sizes, rank), "in eval mode")
        assert torch.equal(seen["known"], part(wanted["known"], sizes, rank))  # type: ignore[arg-type]
        close(seen["cosines"], part(wanted["cosines"], sizes, rank), "doppelgangers' cosines")
        assert torch.equal(seen["twins"], part(wanted["twins"], sizes, rank))  # type: ignore[arg-type]
        assert seen["clock"] == wanted["clock"]
        for name, value in wanted["statistics"].items():
            close(seen["statistics"][name], value, name)
    identities, rows, stamps = (torch.cat([seen["rows"][place] for seen in ours]) for place in range(3))
    order, one_order = identities.argsort(), wanted["rows"][0].argsort()
    assert torch.equal(identities[order], wanted["rows"][0][one_order])
    close(rows[order], wanted["rows"][1][one_order], "rows of the memory")
    assert torch.equal(stamps[order], wanted["rows"][2][one_order])
    return worst


def run(
    pool: Pool,
    ranks: int,
    raggedness: str,
    *,
    steps: int = 4,
    total: int = 24,
    identities: int = 40,
    dtype: torch.dtype = torch.float64,
    weighted: bool = False,
    average: bool | int = False,
    memory_dtype: torch.dtype | None = None,
    broken: float | None = None,
    **options: Any,
) -> float:
    """Hold some steps on ``ranks`` ranks to the same in one process; return the largest difference."""
    given = {"capacity": 120, "margin": "arc", "scale": 8.0, "dtype": memory_dtype or dtype}
    options = {**given, "prototype_gradient": "none", **options}
    data = batches(steps, total, dtype=dtype, weighted=weighted, identities=identities)
    if broken is not None:
        for e, _, _ in data[1:]:
            e[9, 3] = broken
    work = Steps(options, data, [cut(total, ranks, raggedness)] * steps, draw_upstreams(steps, ranks))
    ours = pool.run(ranks, shares, work, average)
    return compare(ours, alone(work), work, ranks if average is True else average or 1)


def draw_upstreams(steps: int, ranks: int, seed: int = 0) -> list[list[float]]:
    """Upstream gradients that differ from rank to rank."""
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.rand(steps, ranks, generator=generator)).tolist()
