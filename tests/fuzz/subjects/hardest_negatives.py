"""``hardest_negatives``: the exact top k, in order, and its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import Draw, accumulation
from tests.fuzz.oracles.rows import directions, lengths
from tests.fuzz.places import small, somewhere
from tests.fuzz.subjects.bank import draw_bank
from tests.fuzz.verdict import Judge, Values, require


def hardest_negatives(draw: Draw) -> None:
    with somewhere(draw) as place:
        bank = draw_bank(draw, small(place))
        slots = bank.prototypes.shape[0]
        k = draw.pick(1, 2, draw.integer(1, 9), max(1, slots), max(1, slots - 1), slots + draw.integer(1, 5))
        if slots > 1000:
            k = min(k, draw.pick(40, slots))
        draw.note(k=k)
        x = bank.embeddings.detach().requires_grad_(draw.chance(0.7))
        w = bank.prototypes.detach().requires_grad_(draw.chance(0.5))
        named = draw.chance(0.8)
        draw.note(targets_given=named)
        ours = pmk.hardest_negatives(
            x,
            w,
            bank.targets if named else None,
            k=k,
            occupied=bank.occupied,
            normalize_prototypes=bank.normalize,
        )
        targets = bank.targets.long() if named else torch.full_like(bank.targets.long(), -1)
        negative = bank.present & (torch.arange(slots) != targets[:, None])
        check(draw, bank.embeddings, bank.clean(None), negative, k, bank.normalize, ours)
        gradient(draw, x, w, bank.clean(None), k, bank.normalize, ours)


def check(
    draw: Draw,
    embeddings: Tensor,
    prototypes: Tensor,
    negative: Tensor,
    k: int,
    normalize: bool,
    ours: pmk.HardestNegativesResult,
) -> None:
    kind = accumulation(embeddings.dtype)
    batch, slots = negative.shape
    require("hardest_negatives: dtype", ours.cosines.dtype == kind and ours.slots.dtype == torch.int64)
    shape = tuple(ours.cosines.shape)
    require("hardest_negatives: shape", shape == tuple(ours.slots.shape) == (batch, k), f"{shape}, not {(batch, k)}")
    broken = ~embeddings.isfinite().all(dim=1)
    values, found = ours.cosines.detach(), ours.slots
    require(
        "hardest_negatives: (nan, -1) for a broken row",
        bool(values[broken].isnan().all() and (found[broken] == -1).all()),
    )
    values, found, negative = values[~broken], found[~broken], negative[~broken]
    e = embeddings[~broken]
    if e.shape[0] == 0:
        return
    number = negative.sum(dim=1)
    real = torch.arange(k) < number[:, None]
    require(
        "hardest_negatives: as many as there are negatives", bool(((found >= 0) == real).all()), f"{found.tolist()}"
    )
    require("hardest_negatives: -inf for the rest", bool((values[~real] == -math.inf).all()))
    require("hardest_negatives: slots in range", bool((found < slots).all()))
    if slots == 0:
        return
    at = found.clamp(min=0)
    require("hardest_negatives: negatives alone", bool(negative.gather(1, at)[real].all()))
    counted = torch.zeros(e.shape[0], slots, dtype=torch.int64).scatter_add_(1, at, real.long())
    require("hardest_negatives: no slot twice", bool((counted <= 1).all()))
    a, b = values[:, :-1], values[:, 1:]
    both = real[:, 1:]
    ordered = (a > b) | ((a == b) & (found[:, :-1] < found[:, 1:]))
    if not bool(ordered[both].all()):
        row, column = (both & ~ordered).nonzero()[0].tolist()
        pair = (values[row, column : column + 2].tolist(), found[row, column : column + 2].tolist())
        require("hardest_negatives: descending, ties to the lower slot", False, f"row {row}: {pair}")

    def oracle(e: Tensor, w: Tensor) -> Values:
        cosines = directions(e) @ (directions(w) if normalize else w).T
        kth = torch.where(negative, cosines, -math.inf).sort(dim=1, descending=True).values
        kth = torch.nn.functional.pad(kth, (0, max(0, k - slots)), value=-math.inf)[:, :k]
        return {"cosines": cosines.gather(1, at), "sorted": kth}

    judge = Judge(draw, oracle, [e, prototypes], e.dtype)
    judge.close("hardest_negatives: cosines", "cosines", torch.where(real, values, 0), 1.0, real)
    judge.close("hardest_negatives: the largest", "sorted", values)


def gradient(
    draw: Draw, x: Tensor, w: Tensor, clean: Tensor, k: int, normalize: bool, ours: pmk.HardestNegativesResult
) -> None:
    if not (x.requires_grad or w.requires_grad) or not ours.cosines.requires_grad:
        return
    sound = x.detach().isfinite().all(dim=1)
    real = (ours.slots >= 0) & sound[:, None]
    upstream = torch.where(real, draw.normal(*ours.slots.shape), 0)
    torch.where(real, ours.cosines, 0).backward(upstream.to(ours.cosines.dtype))
    at = ours.slots.clamp(min=0)

    def oracle(e: Tensor, p: Tensor) -> Values:
        e, p = (t.detach().clone().requires_grad_() for t in (e, p))
        cosines = directions(e) @ (directions(p) if normalize else p).T
        if p.shape[0]:
            cosines.gather(1, at).backward(upstream.to(e.dtype))
        return {
            "x": torch.zeros_like(e) if e.grad is None else e.grad,
            "w": torch.zeros_like(p) if p.grad is None else p.grad,
        }

    judge = Judge(draw, oracle, [torch.where(sound[:, None], x.detach(), 0), clean], x.dtype)
    size = lengths(x.detach().double())
    if x.requires_grad and x.grad is not None:
        natural = upstream.abs().sum(dim=1) / torch.where(size > 0, size, 1)
        judge.close("hardest_negatives: gradient of embeddings", "x", x.grad, natural[:, None], sound[:, None])
    if w.requires_grad and w.grad is not None:
        size = lengths(clean.double()) if normalize else torch.ones(len(clean), dtype=torch.float64)
        total = torch.zeros(max(1, len(clean)), dtype=torch.float64).index_add_(
            0, at.flatten(), upstream.abs().flatten()
        )
        natural = total[: len(clean)] / torch.where(size > 0, size, 1)
        judge.close("hardest_negatives: gradient of prototypes", "w", w.grad, natural[:, None])
