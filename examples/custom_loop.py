"""A training loop of your own: ORL faces, a small encoder, verification on people never trained on.

    python examples/custom_loop.py [steps]

Shows: batches of several images per person, the loss with quality weights, what its statistics say, and verification.
Needs: ``pip install 'protomem-kernels[train]'`` (the images and the metrics); the loss itself needs torch alone.
Takes: 20 seconds of one core, a third of them imports.
Prints: the loss from 0.06 at step 50 to 0.00, and verification accuracy 0.888 on ten unseen people (raw pixels: 0.836).
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import protomem_kernels as pmk
from protomem_kernels.data.evaluation import evaluate
from protomem_kernels.data.images import orl_faces, split_by_fold
from protomem_kernels.data.sampling import IdentityBatchSampler


def main(steps: int = 150) -> float:
    """Train for some steps and return the verification accuracy on ten unseen people."""
    torch.manual_seed(0)
    train, unseen = split_by_fold(orl_faces(image_size=(56, 46)), fold=3)
    images = train.load_all().float() / 255 - 0.5

    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 7 * 6, 128)),
    )
    # Few people: a small margin and scale. With millions, ArcFace(0.5) and scale=64 are the usual start.
    loss_fn = pmk.PrototypeMemoryLoss(128, capacity=30, margin=pmk.ArcFace(0.3), scale=24.0, quality=pmk.NormQuality())
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.05)
    sampler = IdentityBatchSampler(train.labels, identities_per_batch=16, images_per_identity=4)

    step = 0
    while step < steps:
        sampler.set_epoch(step)
        for batch in sampler:
            pixels = images[batch]
            pixels = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, pixels, pixels.flip(3))
            loss, stats = loss_fn(encoder(pixels), train.labels[batch], return_stats=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0 or step == steps:
                print(
                    f"step {step}: loss {loss.item():.3f}, target cosine {stats.target_cosine.mean():.2f}, "
                    f"hardest other {stats.hardest_cosine.mean():.2f}, {len(loss_fn.memory)} identities in the memory"
                )
            if step == steps:
                break

    with torch.no_grad():
        embeddings = encoder.eval()(unseen.load_all().float() / 255 - 0.5)
    accuracy = evaluate(embeddings, unseen.labels).verification_accuracy
    print(f"verification accuracy on ten unseen people: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
