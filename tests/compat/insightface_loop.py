"""A training loop in insightface's manner, and the numbers that insightface's own classes gave in it.

``train`` takes the two classes; nothing else in it knows whose they are. ``insightface.json`` was written by

    python -m tests.compat.insightface_loop FOLDER COMMIT

with FOLDER holding losses.py and partial_fc_v2.py of recognition/arcface_torch at that commit of
deepinsight/insightface, on gloo, in float64, with ``Tensor.cuda`` left out. It holds numbers alone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NUMBERS = Path(__file__).with_name("insightface.json")
STEPS, BATCH, FEATURES, DIM, CLASSES = 10, 4, 5, 8, 23

# Margins (m1, m2, m3), filter, sample_rate, ranks
CASES: dict[str, tuple[tuple[float, float, float], float, float, int]] = {
    "arcface": ((1.0, 0.5, 0.0), 0.0, 1.0, 1),
    "arcface on two ranks": ((1.0, 0.5, 0.0), 0.0, 1.0, 2),
    "cosface, sampled": ((1.0, 0.0, 0.4), 0.0, 0.4, 1),
    "arcface, sampled, on three ranks": ((1.0, 0.5, 0.0), 0.0, 0.4, 3),
    "cosface, filtered, on two ranks": ((1.0, 0.0, 0.4), 0.3, 1.0, 2),
}


def waves(*shape: int, phase: float) -> Tensor:
    """Return numbers in [-1, 1] that are the same everywhere: no generator is asked."""
    count = torch.Size(shape).numel()
    places = torch.arange(count, dtype=torch.float64)
    return torch.sin(phase + 1.7 * places + 0.013 * places * places).reshape(shape)


def train(partial_fc: Any, margin_loss: Any, name: str, average: Callable[[Tensor], None]) -> dict[str, Any]:
    """Train a linear encoder and the head for ten steps in the default dtype; return this rank's numbers.

    Args:
        partial_fc: the class ``PartialFC_V2``.
        margin_loss: the class ``CombinedMarginLoss``.
        name: of the case.
        average: averages a gradient over the ranks in place, as DistributedDataParallel does.
    """
    (m1, m2, m3), threshold, sample_rate, ranks = CASES[name]
    head = partial_fc(margin_loss(16.0, m1, m2, m3, threshold), DIM, CLASSES, sample_rate, False)
    encoder = torch.nn.Linear(FEATURES, DIM, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(waves(DIM, FEATURES, phase=0.3))
        head.weight.copy_(waves(CLASSES, DIM, phase=1.1)[head.class_start : head.class_start + head.num_local])
    optimizer = torch.optim.SGD(
        [{"params": encoder.parameters()}, {"params": head.parameters()}], lr=0.02, momentum=0.9, weight_decay=5e-4
    )
    features = waves(STEPS, ranks, BATCH, FEATURES, phase=2.2).to(torch.get_default_dtype())
    labels = (torch.arange(STEPS * ranks * BATCH) * 7 % CLASSES).reshape(STEPS, ranks, BATCH)
    losses, sampled = [], []
    for step in range(STEPS):
        torch.manual_seed(100 * step + head.rank)
        loss = head(encoder(features[step, head.rank]), labels[step, head.rank].clone())
        loss.backward()
        assert encoder.weight.grad is not None
        average(encoder.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        sampled.append(head.weight_index.tolist() if sample_rate < 1 else [])
    return {
        "losses": losses,
        "sampled": sampled,
        "encoder": encoder.weight.detach().flatten().tolist(),
        "weight": head.weight.detach().flatten().tolist(),
    }


def _one_rank(rank: int, name: str, folder: str, out: str) -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment,misc]
    ranks = CASES[name][3]
    dist.init_process_group("gloo", init_method=f"file://{out}/init", rank=rank, world_size=ranks)

    def average(gradient: Tensor) -> None:
        dist.all_reduce(gradient)
        gradient /= ranks

    theirs = importlib.import_module("partial_fc_v2").PartialFC_V2, importlib.import_module("losses").CombinedMarginLoss
    numbers = train(*theirs, name, average)
    Path(out, f"{rank}.json").write_text(json.dumps(numbers))
    dist.destroy_process_group()


def main(folder: str, commit: str) -> None:
    """Run insightface's classes and write what came out."""
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {"source": f"deepinsight/insightface {commit}", "torch": torch.__version__, "cases": {}}
    for name, (_, _, _, ranks) in CASES.items():
        with tempfile.TemporaryDirectory() as out:
            torch.multiprocessing.spawn(_one_rank, (name, folder, out), ranks)
            parts = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(ranks)]
        found["cases"][name] = parts
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.12g}"))
    NUMBERS.write_text(json.dumps(rounded, separators=(",", ":")).replace('"losses"', '\n"losses"') + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
