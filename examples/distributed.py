"""One prototype memory over several processes: the encoder under DistributedDataParallel, the memory sharded.

    torchrun --standalone --nproc-per-node=2 examples/distributed.py [steps]

Needs the ``train`` extra (the images and the metrics). On a machine with GPUs each process takes one of them.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import protomem_kernels as pmk
from protomem_kernels.data.evaluation import evaluate
from protomem_kernels.data.images import orl_faces, split_by_fold
from protomem_kernels.data.sampling import IdentityBatchSampler


def main(steps: int = 150) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same encoder everywhere
    train, unseen = split_by_fold(orl_faces(image_size=(56, 46)), fold=3)
    images = train.load_all().float().to(device) / 255 - 0.5
    labels = train.labels.to(device)

    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 14 * 12, 128)),
    ).to(device)
    model = DistributedDataParallel(encoder)
    # The capacity is that of all ranks together; every rank's images meet the prototypes of all.
    group = dist.group.WORLD
    capacity = 32 * dist.get_world_size()
    loss_fn = pmk.PrototypeMemoryLoss(
        128, capacity, margin=pmk.ArcFace(0.3), scale=24.0, device=device, process_group=group
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    sampler = IdentityBatchSampler(train.labels, identities_per_batch=8, images_per_identity=4)  # this rank's share

    step = 0
    while step < steps:
        sampler.set_epoch(step)
        for batch in sampler:
            loss = loss_fn(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0 or step == steps:
                held = torch.tensor(len(loss_fn.memory), device=device)
                dist.all_reduce(held)
                if rank == 0:
                    ranks = dist.get_world_size()
                    print(f"step {step}: loss {loss.item():.3f}, {held.item()} identities on {ranks} ranks")
            if step == steps:
                break

    if rank == 0:
        with torch.no_grad():
            embeddings = encoder.eval()(unseen.load_all().float().to(device) / 255 - 0.5).cpu()
        accuracy = evaluate(embeddings, unseen.labels).verification_accuracy
        print(f"verification accuracy on ten unseen people: {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
