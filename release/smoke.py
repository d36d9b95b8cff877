"""Whether an installed wheel works: run by the Python of an empty environment, far from any checkout.

    python smoke.py native|pure

The README's ten lines, the contract of each operator at a small size against formulas in float64, and ``protomem env``.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import protomem_kernels as pmk


def ten_lines() -> None:
    """Do what the README shows; the loss falls on a batch that is met again."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 128))
    loss_fn = pmk.PrototypeMemoryLoss(embedding_dim=128, capacity=10_000, quality=pmk.NormQuality())
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 2**62, (32,)).repeat(2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_fn(encoder(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def operators() -> None:
    """Compare each operator with its formula."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 8, generator=generator, requires_grad=True)
    w = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator))
    slots = torch.tensor([3, 7, 7, 0, 39, 21])
    scale, margin = 16.0, 0.3

    cosines = torch.nn.functional.normalize(x.double()) @ w.double().T
    margined = torch.cos(torch.acos(cosines.gather(1, slots[:, None])) + margin)
    logits = scale * cosines.scatter(1, slots[:, None], margined)
    expected = torch.nn.functional.cross_entropy(logits, slots)
    loss = pmk.margin_softmax_loss(x, w, slots, scale=scale, margin=pmk.ArcFace(margin))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (ours,), (truth,) = (torch.autograd.grad(value, x, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)

    negatives = cosines.detach().scatter(1, slots[:, None], -2.0)
    found, indices = pmk.hardest_negatives(x.detach(), w, slots, k=3)[:2]
    values, places = negatives.topk(3)
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, places)

    labels = torch.tensor([5, 9, 5, 9, 9, 1])
    made = pmk.aggregate_prototypes(x.detach(), labels)
    unit = torch.nn.functional.normalize(x.detach().double())
    sums = torch.stack([unit[labels == label].sum(0) for label in (5, 9, 1)])
    by_label = {int(label): row for label, row in zip(made.identities, made.prototypes, strict=True)}
    for label, row in zip((5, 9, 1), torch.nn.functional.normalize(sums), strict=True):
        torch.testing.assert_close(by_label[label].double(), row, rtol=1e-5, atol=1e-5)


def main() -> None:
    """Run it all, and say what served."""
    kind = sys.argv[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ten_lines()
        operators()
    serving = next(choice.backend for choice in pmk.explain("negative_logsumexp", torch.zeros(1, 1)) if choice.chosen)
    assert serving == {"native": "cpu", "pure": "reference"}[kind], serving
    slower = [str(warning.message) for warning in caught if "without its compiled part" in str(warning.message)]
    assert len(slower) == (kind == "pure"), slower
    told = subprocess.run([Path(sys.executable).with_name("protomem"), "env"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    assert pmk.__version__ in told.stdout, told.stdout
    print(f"{kind}: Python {platform.python_version()}, torch {torch.__version__}: served by {serving}, all right")


if __name__ == "__main__":
    main()
