"""``MarginSoftmaxLoss`` and ``DSoftmaxLoss`` with classes spread over ranks, beside one process with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.distributed import cases
from tests.distributed.cases import DIM, cut, part
from tests.distributed.pool import Pool

CLASSES = 31  # 2 and 3 ranks have one more than another


def make(options: dict[str, Any], group: Any = None) -> Any:
    kind = pmk.DSoftmaxLoss if options.get("margin") == "d-softmax" else pmk.MarginSoftmaxLoss
    given = {
        name: value for name, value in cases.made(options).items() if name != "margin" or kind is not pmk.DSoftmaxLoss
    }
    return kind(CLASSES, DIM, dtype=torch.float64, process_group=group, **given)


def rows_of(head: Any) -> slice:
    return slice(head.first_class, head.first_class + len(head.weight))


def train(group: Any, options: dict[str, Any], data: Any, sizes: Sequence[int], weights: Tensor, seed: int) -> Any:
    """Run steps with SGD; return losses, gradients, statistics, the rows that were sampled, and the weights."""
    torch.manual_seed(seed)
    head = make(options, group)
    with torch.no_grad():
        head.weight.copy_(weights[rows_of(head)])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
    seen: list[Any] = []
    for step, (e, labels) in enumerate(data):
        rank = head.ranks.rank
        mine, own = part(e, sizes, rank).requires_grad_(), part(labels, sizes, rank)  # type: ignore[union-attr]
        optimizer.zero_grad()
        torch.manual_seed(100 * seed + 10 * step + rank)
        sampled = head.sampled_classes(where_of(labels, head)) + head.first_class
        torch.manual_seed(100 * seed + 10 * step + rank)
        loss, stats = head(mine, own, return_stats=True)
        loss.backward((1 + rank) * torch.ones_like(loss))
        optimizer.step()
        seen.append((loss.detach(), mine.grad, [value.clone() for value in stats], sampled))
    with torch.no_grad():
        evaluated = head.eval()(part(data[0][0], sizes, rank), part(data[0][1], sizes, rank))
    return seen, rows_of(head), head.weight.detach(), evaluated


def where_of(labels: Tensor, head: Any) -> Tensor:
    rows = labels - head.first_class
    return torch.where((labels >= 0) & (rows >= 0) & (rows < len(head.weight)), rows, -1)


def alone(options: dict[str, Any], data: Any, sizes: Sequence[int], weights: Tensor, drawn: Any) -> Any:
    """The same over one parameter, each step over the classes ``drawn``, by autograd over rows picked out."""
    options = {name: value for name, value in cases.made(options).items() if name not in ("sample_rate",)}
    reduction = options.pop("reduction", "mean")
    if isinstance(options["margin"], pmk.DSoftmax):
        options.setdefault("scale", 30.0)
    weights = weights.clone().requires_grad_()
    upstream = torch.repeat_interleave(torch.arange(1.0, len(sizes) + 1, dtype=torch.float64), torch.tensor(sizes))
    seen = []

    def loss_of(e: Tensor, labels: Tensor, rows: Tensor) -> Any:
        place = {int(row): at for at, row in enumerate(rows)}
        targets = torch.tensor([place.get(int(label), -1) for label in labels])
        assert ((targets >= 0) == (labels >= 0)).all()
        return pmk.margin_softmax_loss(
            e, weights[rows], targets, normalize_prototypes=True, reduction="none", return_stats=True, **options
        )

    for (e, labels), rows in zip(data, drawn, strict=True):
        mine = e.clone().requires_grad_()
        losses, stats = loss_of(mine, labels, rows)
        count = max(int((labels >= 0).sum()), 1)
        if isinstance(options.get("mining"), pmk.HardSamples):
            count = int((losses != 0).sum())
        scale = 1 / count if reduction == "mean" else 1
        weights.grad = None
        (losses * upstream * scale).sum().backward()
        with torch.no_grad():
            weights -= 0.3 * weights.grad
        shown = losses.detach() if reduction == "none" else losses.detach().sum() * scale
        seen.append((shown, mine.grad, stats))
    for part_ in (options.get("mining"), options["margin"]):
        if isinstance(part_, torch.nn.Module):
            part_.eval()
    with torch.no_grad():
        losses, _ = loss_of(*data[0], torch.arange(CLASSES))
        count = (
            (labels_of(data[0]) >= 0).sum()
            if not isinstance(options.get("mining"), pmk.HardSamples)
            else (losses != 0).sum()
        )
    evaluated = losses if reduction == "none" else losses.sum() / (count if reduction == "mean" else 1)
    return seen, weights.detach(), evaluated


def labels_of(batch: Any) -> Tensor:
    return batch[1]


def check(pool: Pool, ranks: int, raggedness: str, total: int = 18, **options: Any) -> None:
    options = {"margin": "arc", **options}
    if options["margin"] != "d-softmax":
        options.setdefault("scale", 8.0)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    data = []
    for _ in range(3):
        labels = torch.randint(CLASSES, (total,), generator=generator)
        e = weights[labels] + torch.randn(total, DIM, generator=generator, dtype=torch.float64)
        data.append((e, torch.where(torch.arange(total) == 3, -1, labels)))
    sizes = cut(total, ranks, raggedness)
    factor = 1 if options.get("average_gradients") is False else ranks
    ours = pool.run(ranks, train, options, data, sizes, weights, 7)
    options.pop("average_gradients", None)
    drawn = [torch.cat([seen[step][3] for seen, *_ in ours]) for step in range(3)]
    if "sample_rate" in options:
        assert all(len(rows) < CLASSES for rows in drawn)
        assert not torch.equal(drawn[0], drawn[1])
    wanted, final, evaluated = alone(options, data, sizes, weights, drawn)
    for rank, (seen, rows, weight, in_eval) in enumerate(ours):
        for (loss, grad, stats, _), (want, want_grad, want_stats) in zip(seen, wanted, strict=True):
            near(loss, want if want.ndim == 0 else part(want, sizes, rank))
            near(grad, factor * part(want_grad, sizes, rank))  # type: ignore[operator]
            for a, b in zip(stats, want_stats, strict=True):
                near(a, part(b, sizes, rank))
        near(weight, final[rows])
        near(in_eval, evaluated if evaluated.ndim == 0 else part(evaluated, sizes, rank))
    assert sum(len(weight) for _, _, weight, _ in ours) == CLASSES


def near(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mining", cases.MININGS)
@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_mining_rules(pool: Pool, mining: str, rate: float) -> None:
    check(
        pool, 2, "ragged", total=18 if rate == 1 else 8, mining=mining, **({} if rate == 1 else {"sample_rate": rate})
    )


@pytest.mark.parametrize("margin", [name for name in cases.MARGINS if name != "elastic"])
def test_margins(pool: Pool, margin: str) -> None:
    check(pool, 3, "empty", margin=margin)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_the_factor(pool: Pool, reduction: str) -> None:
    check(pool, 3, "ragged", reduction=reduction, average_gradients=False)


def initial(group: Any) -> Tensor:
    torch.manual_seed(0)
    return pmk.MarginSoftmaxLoss(CLASSES, DIM, process_group=group).weight.detach()


def test_shards_begin_with_different_rows(pool: Pool) -> None:
    weights = torch.cat(pool.run(3, initial))
    assert len(weights.unique(dim=0)) == CLASSES
    assert abs(float(weights.std()) - 0.01) < 0.002
    assert pool.run(3, initial)[1].equal(weights[11:21])


def test_sampling_in_one_process() -> None:
    torch.manual_seed(0)
    head = pmk.MarginSoftmaxLoss(1000, DIM, sample_rate=0.1, dtype=torch.float64)
    e, labels = torch.randn(20, DIM, dtype=torch.float64), torch.arange(20) * 50
    labels[3] = -1
    torch.manual_seed(1)
    rows = head.sampled_classes(labels)
    torch.manual_seed(1)
    loss = head(e, labels)
    loss.backward()
    assert len(rows) == 100
    assert rows.tolist() == sorted(set(rows.tolist()) | set(labels.tolist()) - {-1})
    targets = torch.where(labels >= 0, torch.searchsorted(rows, labels), -1)
    wanted = pmk.margin_softmax_loss(e, head.weight.detach()[rows], targets, normalize_prototypes=True)
    torch.testing.assert_close(loss, wanted)
    touched = (head.weight.grad != 0).any(dim=1).nonzero()[:, 0]
    assert touched.equal(rows)
    torch.testing.assert_close(
        head.eval()(e, labels), pmk.margin_softmax_loss(e, head.weight, labels, normalize_prototypes=True)
    )
    assert "sample_rate=0.1" in repr(head)


def test_as_many_classes_as_samples_are_drawn_at_least() -> None:
    head = pmk.MarginSoftmaxLoss(100, DIM, sample_rate=0.01)
    assert len(head.sampled_classes(torch.arange(40))) == 40
    assert len(head.sampled_classes(torch.full((3,), -1))) == 3
    assert len(head.sampled_classes(torch.arange(100).repeat(2))) == 100


@pytest.mark.parametrize("rate", [0, 1.5, "half"])
def test_a_wrong_rate(rate: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="sample_rate must be"):
        pmk.MarginSoftmaxLoss(5, 2, sample_rate=rate)
