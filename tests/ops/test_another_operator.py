"""An operator from outside, with a reference alone: nothing in the package is edited for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import OPERATORS, file_of
from protomem_kernels.ops.schemas import SCHEMAS
from tests.ops.cases import PLACES

# In a process of its own, as an operator stays registered.
SCRIPT = """
import json
import torch
import protomem_kernels as pmk
from protomem_kernels.ops.call import call
from protomem_kernels.ops.register import register


def nearest(x, prototypes):
    return (x @ prototypes.T).max(dim=1).values


def fake(x, prototypes):
    return x.new_empty(x.shape[0])


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    x, prototypes = ctx.saved_tensors
    return grad[:, None] * prototypes[(x @ prototypes.T).argmax(dim=1)], None


def refuse_strangers(x, prototypes):
    if x.shape[1] != prototypes.shape[1]:
        raise ValueError("x must be as wide as prototypes")


register(
    "nearest",
    "(Tensor x, Tensor prototypes) -> Tensor cosines",
    fake=fake,
    check_values=refuse_strangers,
    setup_context=setup_context,
    backward=backward,
    kernels={"reference": nearest},
)
x, w = torch.randn(5, 3, requires_grad=True), torch.eye(3)
eager = call("nearest", x, w)
(grad,) = torch.autograd.grad(eager.sum(), x, retain_graph=True, create_graph=True)
try:
    torch.autograd.grad(grad.sum(), x)
except RuntimeError as problem:
    twice = str(problem)
compiled = torch.compile(lambda x: call("nearest", x, w) * 2, fullgraph=True, backend="aot_eager")(x)
with pmk.use_backend("reference"):
    pinned = call("nearest", x, w)
try:
    call("nearest", x, torch.eye(4))
except ValueError as problem:
    refusal = str(problem)
print(json.dumps({
    "right": torch.equal(eager, x.max(dim=1).values) and torch.equal(eager, pinned),
    "gradient": grad.sum().item(),
    "twice": twice,
    "compiled": torch.equal(compiled, 2 * eager),
    "opcheck": torch.library.opcheck(torch.ops.protomem.nearest.default, (x, w)),
    "explained": {choice.backend: [choice.chosen, choice.reason] for choice in pmk.explain("nearest", x, w)},
    "on a GPU": [choice.backend for choice in pmk.explain("nearest", x, w, architecture=90) if choice.chosen],
    "refusal": refusal,
}))
"""


@pytest.mark.slow
def test_it_dispatches_explains_compiles_and_takes_opcheck() -> None:
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout.splitlines()[-1])
    assert told["right"]
    assert told["compiled"]
    assert told["gradient"] == 5
    assert "nearest can be differentiated once" in told["twice"]
    assert set(told["opcheck"].values()) == {"SUCCESS"}
    assert told["explained"].pop("reference") == [True, None]
    assert not any(chosen for chosen, _ in told["explained"].values())
    for name, (_, reason) in told["explained"].items():
        assert reason == (BACKENDS[name].unavailable() or "has no kernel for nearest")
    assert told["on a GPU"] == ["reference"]
    assert told["refusal"] == "x must be as wide as prototypes"


def test_every_layer_has_every_operator() -> None:
    """A layer that lacks one has to be named here."""
    few_launches = {"prepare_samples", "prepare_samples_backward", "reduce_losses"}  # for GPUs alone, in Triton
    lacking = {"cpu": few_launches, "cuda": few_launches}
    assert [*OPERATORS] == [*SCHEMAS]
    served = {backend for backend, _ in PLACES.values()}
    for name in served:
        missing = {operator for operator in OPERATORS if BACKENDS[name].kernel(operator) is None}
        assert missing == lacking.get(name, set()), name


def test_every_layer_has_every_operators_file() -> None:
    """Where a backend cannot be used here, its sources say what it has."""
    root = Path(__file__).parents[2]
    for operator in {file_of(operator) for operator in OPERATORS}:
        for place in (
            f"protomem_kernels/ops/{operator}.py",
            f"protomem_kernels/backends/reference/{operator}.py",
            f"protomem_kernels/backends/triton/{operator}.py",
        ):
            assert (root / place).exists(), place
        for place in (f"csrc/cpu/{operator}.cpp", f"csrc/cuda/{operator}.cu"):
            assert (root / place).exists() != (operator in ("prepare_samples", "reduce_losses")), place
