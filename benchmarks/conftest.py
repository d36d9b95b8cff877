"""Options, marks and fixtures of the suite.

``python -m pytest benchmarks --sizes tiny`` is a quick try; ``python -m benchmarks`` passes every option on.

A benchmark that asks for ``size`` runs at every size, one that asks for ``peer`` for every peer; the marks ``centre``,
``peers`` and ``regimes`` narrow or widen that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks import inputs
from benchmarks.inputs import IDENTITIES, REGIMES, SIZES, Problem, Size
from benchmarks.peers import OURS, PEERS, Peer, our_peer

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS_ON = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "chunked", "reference")}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("protomem")
    default = os.environ.get("PROTOMEM_BENCH_SIZES") or "moderate"
    if default not in SIZES:  # argparse looks at no default
        raise pytest.UsageError(f"PROTOMEM_BENCH_SIZES must be one of {', '.join(SIZES)}, got {default!r}")
    group.addoption("--sizes", choices=list(SIZES), default=default, help="which sizes to measure (inputs.py)")
    group.addoption("--device", default="cpu", help="where to measure")
    group.addoption("--dtype", choices=DTYPES, default=DTYPES[0], help="of the embeddings and the prototypes")
    group.addoption("--backend", default="", help="our backend; default: each in comparisons, else what dispatch takes")
    group.addoption("--threads", type=int, default=0, help="CPU threads; 0: as many as PyTorch sees fit")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "centre: only at the first size")
    config.addinivalue_line("markers", "peers(*names): only for these peers and ours")
    config.addinivalue_line("markers", "regimes: for every regime of the data, not for fresh data alone")
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option, mark = metafunc.config.getoption, metafunc.definition.get_closest_marker
    backends = (
        [option("--backend")]
        if option("--backend")
        else BACKENDS_ON.get(option("--device").split(":")[0], ["reference"])
    )
    names = mark("peers").args if mark("peers") else [name for name, peer in PEERS.items() if peer not in OURS]
    values = {
        "identities": IDENTITIES[option("--sizes")],
        "size": SIZES[option("--sizes")][: 1 if mark("centre") else None],
        "regime": REGIMES if mark("regimes") else REGIMES[:1],
        "peer": [*(PEERS[name] for name in names), *map(our_peer, backends)],
    }
    for name, choices in values.items():  # what comes first varies slowest: one problem serves all peers
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                name, choices, ids=lambda value: getattr(value, "name", str(value)), indirect=name == "peer"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip, with its reason, where one of our backends lacks an operator or refuses the tensors."""
    try:
        return (yield)
    except RuntimeError as error:
        first, *reasons = str(error).splitlines()
        if "cannot serve" not in first:
            raise
        mine = [line.split(maxsplit=1)[1] for line in reasons if first.startswith(f"backend {line.split()[0]!r}")]
        pytest.skip(f"{first} {mine[0]}")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--threads")


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--dtype")


@pytest.fixture
def ours(request: pytest.FixtureRequest) -> Peer:
    """Return ours on the backend asked for, or on what dispatch chooses."""
    return our_peer(request.config.getoption("--backend"))


@pytest.fixture
def peer(request: pytest.FixtureRequest, size: Size, device: str) -> Peer:
    """Return the peer, with nothing compiled before; skip with its reason if it cannot serve the size."""
    if refusal := request.param.refusal(size, device):
        pytest.skip(f"{request.param.name}: {refusal}")
    torch.compiler.reset()
    return request.param


@pytest.fixture
def problem(size: Size, regime: str, device: str, dtype: str) -> Problem:
    return inputs.problem(size, regime, device, getattr(torch, dtype))
