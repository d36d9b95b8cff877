"""The Triton kernels as a kernel for Hugging Face's Hub: laid out, imported by itself, and right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from release import hub_layout

# In an interpreter that cannot see this package: the loss and its gradients beside PyTorch's own, in float64.
ALONE = """
import json, sys
sys.modules["protomem_kernels"] = None
sys.path.insert(0, sys.argv[1])
import torch
import prototype_memory as kernel
generator = torch.Generator().manual_seed(0)
x = torch.randn(5, 16, generator=generator, requires_grad=True)
w = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator)).requires_grad_()
targets = torch.tensor([3, 39, 3, 0, 17])
ours = kernel.arcface_loss(x, w, targets, scale=24.0, margin=0.4)
cosines = torch.nn.functional.normalize(x.double()) @ w.double().T
margined = torch.cos(torch.acos(cosines.gather(1, targets[:, None])) + 0.4)
truth = torch.nn.functional.cross_entropy(24 * cosines.scatter(1, targets[:, None], margined), targets)
gradients = [torch.autograd.grad(loss, (x, w)) for loss in (ours, truth)]
off = [(a - b).abs().max() / b.abs().max() for a, b in zip(*gradients)]
found, slots = kernel.hardest_negatives(torch.nn.functional.normalize(x.detach()), w.detach(), targets, None, 3, False)
best = cosines.detach().scatter(1, targets[:, None], -2.0).topk(3)
print(json.dumps({
    "file": kernel.__file__,
    "loss": (ours - truth).abs().item() / truth.item(),
    "gradients": [value.item() for value in off],
    "cosines": (found - best.values).abs().max().item(),
    "slots": torch.equal(slots, best.indices),
    "missing": [name for name in kernel.__all__ if not callable(getattr(kernel, name))],
}))
"""


def test_it_works_without_this_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    hub_layout.lay_out(tmp_path)
    environment = {"TRITON_INTERPRET": "1", "PROTOMEM_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "torch-ext"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout)
    assert Path(told["file"]).is_relative_to(tmp_path)
    assert max(told["loss"], *told["gradients"], told["cosines"]) < 1e-5
    assert told["slots"]
    assert told["missing"] == []


@pytest.mark.parametrize(
    "line", ["import numpy", "from protomem_kernels import rows", "torch.library.define('a::b', '() -> ()')"]
)
def test_what_the_builder_would_refuse_is_refused(tmp_path: Path, line: str) -> None:
    hub_layout.lay_out(tmp_path)
    file = tmp_path / "torch-ext" / hub_layout.NAME / "rows.py"
    file.write_text(f"{file.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=r"rows\.py:\d+ "):
        hub_layout.check(tmp_path / "torch-ext" / hub_layout.NAME)
