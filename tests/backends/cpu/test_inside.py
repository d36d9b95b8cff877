"""The innermost pieces of the CPU kernels, one by one through pybind11 (inside.cpp): 16-bit numbers and exp."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pybind11 = pytest.importorskip("pybind11")
COMPILER = os.environ.get("CXX", "").split(" ")[0] or "g++"
FLAGS = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast"]
DTYPES = [torch.float16, torch.bfloat16]
EVERY = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the module, compiled for the instructions that this machine has."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    library = tmp_path_factory.mktemp("inside") / f"inside{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    machine = ["-march=native", "-DPROTOMEM_ISA=inside_test"]
    source = Path(__file__).with_name("inside.cpp")
    command = [COMPILER, *FLAGS, *machine, *includes, source, "-o", library]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    spec = importlib.util.spec_from_file_location("inside", library)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def of_bits(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_16_bit_number_is_widened_as_pytorch_does(inside: ModuleType, dtype: torch.dtype) -> None:
    ours = getattr(inside, f"{name_of(dtype)}_to_float")(EVERY)
    np.testing.assert_array_equal(ours, of_bits(EVERY, dtype).float().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_floats_are_rounded_as_pytorch_does(inside: ModuleType, dtype: torch.dtype) -> None:
    """Each 16-bit number, what lies half-way to the next, and the floats next to that; and beyond the range."""
    exact = of_bits(EVERY, dtype).float().numpy()
    exact = np.sort(exact[np.isfinite(exact)])
    middle = (exact[1:].astype(np.float64) + exact[:-1]) / 2
    middle = middle.astype(np.float32)
    beside = [np.nextafter(middle, np.float32(to)) for to in (-np.inf, np.inf)]
    beyond = np.float32([65519.99, 65520, 65536, 1e10, 3.4e38, np.inf])
    values = np.concatenate([exact, middle, *beside, beyond, -beyond])
    ours = of_bits(getattr(inside, f"float_to_{name_of(dtype)}")(values), dtype)
    assert torch.equal(ours, torch.from_numpy(values).to(dtype))
    assert of_bits(getattr(inside, f"float_to_{name_of(dtype)}")(np.float32([np.nan])), dtype).isnan().all()


@pytest.mark.parametrize(("name", "dtype"), [("exp_float", np.float32), ("exp_double", np.float64)])
def test_exp_is_right_to_about_one_unit_in_the_last_place(inside: ModuleType, name: str, dtype: type) -> None:
    exp, information = getattr(inside, name), np.finfo(dtype)
    lowest, highest = np.log(information.tiny) + 1, np.log(information.max) - 0.5
    x = np.random.default_rng(0).uniform(lowest, highest, 300_000).astype(dtype)
    truth = np.exp(x.astype(np.longdouble))
    unit = np.spacing(truth.astype(dtype)).astype(np.longdouble)
    assert np.max(np.abs(exp(x) - truth) / unit) < 1.5
    assert exp(dtype(0)) == 1
    special = exp(np.array([-np.inf, np.inf, np.nan, 2 * lowest, 2 * highest], dtype))
    np.testing.assert_array_equal(special, np.array([0, np.inf, np.nan, 0, np.inf], dtype))
