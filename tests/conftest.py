"""Settings that hold for the whole suite."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ops.cases import GPU, MakingTensorsOn

# A mutant only has to fail: looking for the smallest failing example would take most of the time.
if os.environ.get("PROTOMEM_MUTANT"):
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")


def quicken_triton_interpreter() -> None:
    """Have Triton's interpreter prepare the language once per launch instead of at every call of a helper function.

    It replaces some 300 attributes each time, two milliseconds that are most of what a small kernel costs. The second
    time over changes nothing, so it is left out while a kernel runs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang
    running = False

    def prepare_once(fn: Any) -> Any:
        nonlocal running
        if running:
            return None
        scopes = [prepare(tl.zeros.fn), prepare(fn)]  # the first stands for Triton's own helpers, in another module
        running = True

        def restore() -> None:
            nonlocal running
            running = False
            for scope in reversed(scopes):
                scope.restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = prepare_once


def round_products_once_in_triton_interpreter() -> None:
    """Have a product's entry depend on its row and its column alone, as it does on every GPU.

    The interpreter leaves products to numpy, whose BLAS may round an entry at the edge of a tile otherwise than one in
    its middle (OpenBLAS with AVX2 does), so that equal rows would not tie, and results would change with the machine.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        with np.errstate(all="ignore"):
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    quicken_triton_interpreter()
    round_products_once_in_triton_interpreter()


@pytest.fixture(autouse=True)
def tensors_on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a contract test with the mark "gpu" make its tensors there (tests/gpu says its devices itself)."""
    there = request.node.get_closest_marker("gpu")
    with MakingTensorsOn(GPU) if there and GPU else contextlib.nullcontext():
        yield


# Under coverage Python runs at half its speed, above all Triton's interpreter: it is on where lines of the package
# would not run otherwise, once.
NOT_COVERED = (
    "tests/backends/cuda/",
    "tests/cuda_host/",
    "tests/benchmarks/static/",
    "tests/fuzz/",
    "tests/gpu_check/",
)
COVERED_IN_THE_INTERPRETER = ("tests/backends/triton/", "tests/backends/chunked/", "tests/ops/test_registration.py")
COVERED_CASES = 4  # of each test: the others differ in numbers


def _runs_the_same_lines_as_another(item: pytest.Item) -> bool:
    """Say whether this is a contract test on the compiled backend, beside the same one on the reference."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return item.nodeid.startswith("tests/ops/") and parameters.get("backend") == "cpu"


def _is_seen_elsewhere(item: pytest.Item) -> bool:
    """Say whether this is a contract test on the chunked backend that its own tests, or those of Triton's, have.

    They cost the interpreter most. float64 and float16 change nothing there but how numbers are split, and many tiles
    are many chunks (tests/backends/chunked), which bfloat16 cuts no other way; chosen negatives, and what is
    registered, are Triton's or the operators'.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if parameters.get("backend") != "chunked":
        return False
    split = str(parameters.get("dtype")) in ("torch.float64", "torch.float16")
    # The last is found by Triton's kernels alone.
    named = ("many_tiles", "64x9001x8-bfloat16", "chosen", "test_ties_go_to_the_lower_slot")
    whole = item.path.name in ("test_registration.py", "test_versions.py")
    return split or whole or any(name in item.name for name in named)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that none of them is left for one process alone at the end."""
    left_out = {item for item in items if _is_seen_elsewhere(item) and not item.get_closest_marker("gpu")}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not config.pluginmanager.hasplugin("_cov"):
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    cases: Counter[str] = Counter()
    for item in items:
        covered = item.nodeid.startswith(COVERED_IN_THE_INTERPRETER if interpreted else NOT_COVERED) == interpreted
        if not covered or (not interpreted and _runs_the_same_lines_as_another(item)):
            item.add_marker("no_cover")
            continue
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if cases[test] > COVERED_CASES:
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip, with its reason, what a backend refuses to serve on a GPU, such as a dtype that does not compile there."""
    try:
        return (yield)
    except RuntimeError as error:
        for_cuda = item.get_closest_marker("gpu") or "PROTOMEM_CUDA_HOST_BACKEND" in os.environ
        if not for_cuda or "cannot serve" not in str(error):
            raise
        pytest.skip(str(error))


def pytest_configure() -> None:
    """Make sure that ``make sanitize`` runs what it has built, and not the checkout's own package."""
    if "PROTOMEM_SANITIZED" not in os.environ:
        return
    from protomem_kernels.backends import cpu

    folder, sanitized = Path(os.environ["PROTOMEM_SANITIZED"]), cpu.OBJECT
    assert sanitized is not None, cpu.BACKEND.unavailable()
    assert folder in Path(sanitized.path).parents, f"{sanitized.path} is not in {folder}"
    assert "-fsanitize=address,undefined" in sanitized.flags, sanitized.flags


def pytest_report_header() -> str | None:
    if "PROTOMEM_SANITIZED" not in os.environ:
        return None
    from protomem_kernels.backends import cpu

    return f"sanitized object: {cpu.OBJECT.path}, runs {', '.join(cpu.OBJECT.capabilities())}"
