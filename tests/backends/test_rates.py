"""Which engine is asked first: by products times predicted rate, or by trial."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels.backends import choice, rates, trial
from protomem_kernels.backends.choice import BACKENDS, preference
from protomem_kernels.backends.operators import MEMORY, OPERATORS
from protomem_kernels.backends.protocol import Backend
from protomem_kernels.backends.rates import RATES

ENGINES = ("triton", "cuda", "chunked")
X, W = torch.zeros(4, 512), torch.zeros(9, 512)
FORWARD, BACKWARD = "negative_logsumexp", "negative_logsumexp_backward_"
ON_MEMORY = [name for name, works_through in OPERATORS.items() if works_through == MEMORY]


def products(engine: str, operator: str, dtype: torch.dtype, dim: int = 512, architecture: int = 90) -> tuple:
    return tuple(BACKENDS[engine].products(operator, dtype, dim, architecture) or ())


def test_products_are_those_of_the_kernels() -> None:
    """As their design notes and docs/static.md count them: per tile of 64 x 32, Triton's three forms of one product."""
    assert products("triton", FORWARD, torch.float32) == (15, "tf32")  # the first one once per 128 of 512 columns
    assert products("triton", FORWARD, torch.float32, dim=128) == (6, "tf32")
    assert products("cuda", FORWARD, torch.float32) == (6, "tf32")
    assert products("chunked", FORWARD, torch.float32) == (2, "float32")
    assert products("triton", FORWARD, torch.bfloat16) == products("cuda", FORWARD, torch.bfloat16) == (3, "half")
    assert products("triton", BACKWARD, torch.bfloat16) == (10, "half")
    assert products("triton", BACKWARD, torch.bfloat16, architecture=100) == (4, "half")
    assert products("cuda", BACKWARD, torch.bfloat16) == (3, "half")
    assert products("chunked", BACKWARD, torch.bfloat16) == (4, "half")
    assert products("cuda", FORWARD, torch.float64) == ()


@pytest.mark.parametrize(("word", "forward", "backward"), [("highest", 3, 4), ("high", 3, 4), ("medium", 2, 2)])
def test_products_follow_the_precision(word: str, forward: int, backward: int) -> None:
    with pmk.matmul_precision(word):
        assert products("chunked", FORWARD, torch.bfloat16) == (forward, "half")
        assert products("triton", FORWARD, torch.bfloat16) == (forward, "half")
        assert products("chunked", BACKWARD, torch.bfloat16) == (backward, "half")
        assert products("triton", FORWARD, torch.float32) == ((15 if word == "highest" else 5), "tf32")
        assert products("chunked", FORWARD, torch.float32) == (2, "float32" if word == "highest" else "tf32")
        assert products("cuda", FORWARD, torch.bfloat16) == (3, "half")  # always exact


def first(operator: str, architecture: int, memory: torch.Tensor) -> str:
    return preference(operator, [X, memory], architecture)[0]


def test_the_fewest_products_come_first_where_rates_are_alike() -> None:
    assert first(FORWARD, 90, W) == "cuda"  # 6 against 15
    assert first(BACKWARD, 90, W.bfloat16()) == "cuda"  # 3 against 10
    assert first(FORWARD, 90, W.bfloat16()) == "triton"
    assert preference(FORWARD, [X, W], 90)[:3] == ("cuda", "chunked", "triton")
    with pmk.matmul_precision("high"):
        assert first(FORWARD, 90, W) == "chunked"  # 2 against 6 and 5


def test_small_embeddings_do_not_pay_for_the_way_of_logits() -> None:
    """With D a product shrinks, and what a logit costs besides does not."""
    x, w = X[:, :64], W[:, :64]
    with pmk.matmul_precision("high"):
        assert preference(FORWARD, [x, w], 90)[0] == "triton"


def test_orders_without_tensors_or_without_a_gpu_are_as_ever() -> None:
    assert preference(FORWARD) == preference(FORWARD, [X, W]) == ("triton", "cuda", "chunked", "cpu", "reference")
    assert preference("enqueue_", [X], 90)[0] == "cuda"


@pytest.mark.parametrize("architecture", sorted(RATES))
def test_every_engine_has_a_rate_for_what_it_multiplies(architecture: int) -> None:
    for operator in ON_MEMORY:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for word in ("highest", "medium"):
                with pmk.matmul_precision(word):
                    for engine in ENGINES:
                        formed = BACKENDS[engine].products(operator, dtype, 512, architecture)
                        if formed is not None:
                            assert 0 < rates.predicted(engine, formed, 512, architecture) < rates.NEVER, (
                                operator,
                                engine,
                            )


def test_architectures_without_a_column_have_a_neighbour_s() -> None:
    assert [rates.column(of) for of in (80, 86, 87, 89, 90, 100, 103, 120)] == [80, 86, 80, 86, 90, 100, 100, 86]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Two backends of which the preferred one is slow, on a CPU that is taken for a GPU."""
    log: list[str] = []

    def engine(name: str, seconds: float) -> Backend:
        def kernel(*args: Any) -> str:
            log.append(name)
            time.sleep(seconds)
            return name

        return Backend(name, {FORWARD: kernel})

    monkeypatch.setenv("PROTOMEM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "may_be_tried", lambda operator, tensors: True)
    monkeypatch.setattr(choice, "BACKENDS", {"triton": engine("triton", 0.02), "cuda": engine("cuda", 0.0)})
    monkeypatch.setattr(choice, "preference", lambda *_: ("triton", "cuda"))
    trial.forget()
    return log


def test_trial_takes_the_fastest_and_remembers(tried: list[str]) -> None:
    assert choice.select(FORWARD, [X, W], (X, W))() == "cuda"
    assert tried.count("triton") == tried.count("cuda") - 1 == trial.TIMES + 1
    trial.forget()  # another process
    tried.clear()
    assert choice.select(FORWARD, [X, W], (X, W))() == "cuda"
    assert tried == ["cuda"]
    with pmk.matmul_precision("medium"):  # another bucket
        choice.select(FORWARD, [X, W], (X, W))
    assert len(tried) == 1 + 2 * (trial.TIMES + 1)


def test_trial_times_again_what_a_broken_file_held(tried: list[str]) -> None:
    choice.select(FORWARD, [X, W], (X, W))
    trial.cache_file(X.device).write_text("{")
    trial.forget()
    tried.clear()
    assert choice.select(FORWARD, [X, W], (X, W))() == "cuda"
    assert "triton" in tried


def test_an_engine_that_raises_is_the_slowest(tried: list[str]) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no")

    choice.BACKENDS["cuda"].add(FORWARD, broken)
    assert choice.select(FORWARD, [X, W], (X, W))() == "triton"


def test_nothing_is_tried_on_a_cpu_or_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTOMEM_AUTOTUNE", "1")
    assert not choice.may_be_tried(FORWARD, [X, W])
