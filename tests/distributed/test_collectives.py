"""How many collectives a step takes, rule by rule, and how many bytes: the table and the formula of the docs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import protomem_kernels as pmk
from protomem_kernels.distributed import data_parallel
from tests.distributed import cases
from tests.distributed.pool import Pool

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
FORWARD, BACKWARD = {"all_gather": 2, "all_reduce": 1}, {"all_gather": 1, "reduce_scatter": 1}


def count(group: Any, options: dict[str, Any], mode: str = "train", batch: int = 8, dim: int = cases.DIM) -> Any:
    """Return the collectives of a step's forward, of its backward, and the bytes of both."""
    given = {"capacity": 60, "scale": 8.0, **cases.made(options)}
    stats = given.pop("return_stats", False)
    loss_fn = pmk.PrototypeMemoryLoss(dim, process_group=group, **given)
    if loss_fn.prototype_gradient == "memory":
        loss_fn.attach_optimizer(torch.optim.SGD(loss_fn.parameters(), lr=0.1))
    loss_fn.train(mode == "train")
    ranks: Any = loss_fn.ranks
    for _ in range(2):  # equal_batches=True agrees on a size once
        e = torch.randn(batch, dim, requires_grad=True)
        ranks.calls.clear()
        ranks.bytes.clear()
        loss = loss_fn(e, torch.arange(batch), return_stats=stats)
        loss = loss[0] if stats else loss
        forward = dict(ranks.calls)
        loss.sum().backward()
        backward = {name: calls - forward.get(name, 0) for name, calls in ranks.calls.items()}
    return forward, {name: calls for name, calls in backward.items() if calls}, dict(ranks.bytes)


RULES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "no reshaping rule": ({}, {}, {}),
    "MVSoftmax": ({"mining": "mv"}, {"all_reduce": 1}, {}),
    "NoisyNegativeFilter": ({"mining": "noisy"}, {"all_reduce": 1}, {}),
    "CurricularFace": ({"mining": "curricular"}, {"all_reduce": 1}, {}),
    "HardestNegatives": ({"mining": "hardest"}, {"all_gather": 1}, {}),
    "HardSamples": ({"mining": "samples"}, {}, {}),
    "ElasticFace": ({"margin": "elastic"}, {"broadcast": 1}, {}),
    "AdaFace, MagFace, DSoftmax, others": ({"margin": "ada"}, {}, {}),
    "a running maximum": ({"scale": 90.0}, {"all_reduce": 1}, {}),
    "quality estimators": ({"quality": "center"}, {}, {}),
    '`prototype_gradient="fresh"`': ({"prototype_gradient": "fresh"}, {}, {}),
    '`prototype_gradient="memory"`': ({"prototype_gradient": "memory"}, {}, {"all_reduce": 1}),
    '`reduction="none"`': ({"reduction": "none"}, {}, {}),
    "`equal_batches=True`": ({"equal_batches": True}, {"all_gather": -1}, {}),
    "`return_stats=True`": ({"return_stats": True}, {"all_gather": 1, "all_reduce": 1}, {}),
}


def plus(counted: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: counted.get(name, 0) + more.get(name, 0) for name in counted.keys() | more.keys()}


@pytest.mark.parametrize("rule", RULES)
def test_collectives_of_a_rule(pool: Pool, rule: str) -> None:
    options, forward, backward = RULES[rule]
    for there, back, _ in pool.run(2, count, options):
        assert there == plus(FORWARD, forward)
        assert back == plus(BACKWARD, backward)


def test_eval_mode_takes_no_more(pool: Pool) -> None:
    for there, back, _ in pool.run(2, count, {}, "eval"):
        assert there == FORWARD
        assert back == BACKWARD


def test_the_table_of_the_docs_says_so() -> None:
    """Each rule has a line, "rule | forward | backward", where a step without rules is what the first line says."""
    text = PAGE.read_text()
    for rule, (_, forward, backward) in RULES.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {rule} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rule == "no reshaping rule":
            assert parsed(cells[1]) == FORWARD, line
            assert parsed(cells[2]) == BACKWARD, line
        else:
            assert parsed(cells[1]) == forward, line
            assert parsed(cells[2]) == backward, line


def parsed(cell: str) -> dict[str, int]:
    """Read "+1 all-gather, 2 all-reduce"."""
    return {
        name.replace("-", "_"): int(number) for number, name in re.findall(r"([+-]?\d+) ([a-z]+(?:-[a-z]+)?)", cell)
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_those_of_the_cost_model(pool: Pool, ranks: int) -> None:
    batch, dim = 24, 256
    for _, _, sizes in pool.run(ranks, count, {"capacity": 400}, "train", batch, dim):
        model = predicted(batch, dim, ranks)
        assert sum(sizes.values()) == pytest.approx(sum(model.values()), rel=0.05)
        for name, size in model.items():
            assert sizes[name] == pytest.approx(size, rel=0.05), name


def predicted(batch: int, dim: int, ranks: int) -> dict[str, float]:
    """The formula of docs/distributed.md, in bytes per rank and step of ``batch`` samples per rank."""
    return {
        "all_gather": batch * (4 * dim + 8) * (ranks - 1) + 16 * (ranks - 1) + 4 * (ranks - 1),
        "reduce_scatter": batch * 4 * dim * (ranks - 1),
        "all_reduce": 12 * batch * ranks,
    }


def silent(group: Any) -> Any:
    """Heads without a process group; how many collectives the world saw meanwhile, and the warnings."""
    data_parallel._warn_once.cache_clear()
    world = dist.group.WORLD
    dist.all_reduce(torch.ones(1))
    dist.barrier()
    before = world._get_sequence_number_for_group()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss_fn = pmk.PrototypeMemoryLoss(4, 8, mining=pmk.CurricularFace(), margin=pmk.AdaFace())
            loss_fn(torch.randn(2, 4, requires_grad=True), torch.arange(2)).backward()
            loss_fn.memory.doppelgangers(torch.arange(2), 1)
            pmk.MarginSoftmaxLoss(8, 4)(torch.randn(2, 4), torch.arange(2))
    after = world._get_sequence_number_for_group()
    dist.all_reduce(torch.ones(1))
    return before, after, world._get_sequence_number_for_group(), [(str(w.message), w.filename) for w in caught]


def test_without_a_process_group_there_is_one_warning_and_no_collective(pool: Pool) -> None:
    for before, after, one_more, ((message, file),) in pool.run(pool.size, silent):
        assert before == after < one_more
        assert f"process_group is None in a process group of {pool.size} ranks: every rank keeps a prototype" in message
        assert file == __file__
