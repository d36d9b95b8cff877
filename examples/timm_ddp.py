"""A timm model by name under DistributedDataParallel, its prototypes spread over the processes.

    torchrun --standalone --nproc-per-node=2 examples/timm_ddp.py [--model resnet10t] [--pretrained] [--steps 60]

Shows: any timm model and one linear layer as the encoder, wrapped by DistributedDataParallel; one memory over all
processes beside it; verification of ten people never trained on (ORL faces, 30 others train).
Needs: ``pip install 'protomem-kernels[train,timm]'``. Without --nproc-per-node, plain ``python``, it is one process.
Takes: half a minute on two cores (57 seconds of CPU time, both processes and their imports).
Prints: the loss from 1.11 over 0.06 at step 20 to 0.01, and verification accuracy 0.851 on ten unseen people, from
scratch (raw pixels: 0.836). The encoders of both processes stay the same to the last bit.

On a machine with GPUs each process takes one of them, over NCCL. That is written, and no GPU has run it yet.
"""

from __future__ import annotations

import argparse
import os
import time

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import protomem_kernels as pmk
from protomem_kernels.data.evaluation import evaluate
from protomem_kernels.data.images import orl_faces, split_by_fold
from protomem_kernels.data.sampling import IdentityBatchSampler

DIM = 128


def main(model: str, pretrained: bool, steps: int) -> float | None:
    """Train for some steps; return the verification accuracy on ten unseen people (on the first process)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    several = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    train, unseen = split_by_fold(orl_faces(image_size=(56, 46)), fold=3)
    images = train.load_all().float().to(device) / 255 - 0.5
    labels = train.labels.to(device)

    torch.manual_seed(0)  # the same weights everywhere
    # Without timm's global average: faces come aligned, so where a feature stands says as much as what it is.
    backbone = timm.create_model(model, pretrained=pretrained, in_chans=1, num_classes=0, global_pool="").to(device)
    with torch.no_grad():
        features = backbone.eval()(images[:1]).flatten(1).shape[1]
    encoder = nn.Sequential(backbone, nn.Flatten(), nn.Linear(features, DIM)).to(device).train()
    # The head stays outside of DistributedDataParallel. With a process group it sees the batches of all processes, and
    # hands back the embeddings' gradient of their common loss so that averaging the encoder's is right.
    loss_fn = pmk.PrototypeMemoryLoss(
        DIM,
        capacity=32 * ranks,  # of all processes together
        margin=pmk.ArcFace(0.3),
        scale=24.0,
        device=device,
        process_group=dist.group.WORLD if several else None,
    )
    wrapped = DistributedDataParallel(encoder) if several else encoder
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    # Every process draws the whole batch and takes its share, so that a run is the same on any number of them (but for
    # BatchNorm, which sees its process's images alone).
    sampler = IdentityBatchSampler(
        train.labels, identities_per_batch=16, images_per_identity=4, num_replicas=1, rank=0, drop_last=True
    )
    draws = torch.Generator().manual_seed(0)

    step = 0
    while step < steps:
        sampler.set_epoch(step)
        for batch in sampler:
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=draws) < 0.5
            mine = torch.tensor(batch)[rank::ranks]
            pixels = images[mine]
            pixels = torch.where(mirrored[rank::ranks].to(device), pixels.flip(3), pixels)
            loss = loss_fn(wrapped(pixels), labels[mine])  # the mean over all processes, on each of them
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if rank == 0 and (step % 20 == 0 or step in (1, steps)):
                gradient = nn.utils.get_total_norm([parameter.grad for parameter in encoder.parameters()])
                print(f"step {step}: loss {loss.item():.4f}, gradient {gradient.item():.4f}", flush=True)
            if step == steps:
                break

    accuracy = None
    if several:  # the encoders stayed one, since the gradients did
        mine = torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
        first = mine.clone()
        dist.broadcast(first, src=0)
        apart = (mine - first).abs().max()
        dist.all_reduce(apart, op=dist.ReduceOp.MAX)
        if rank == 0:
            print(f"the encoders of {ranks} processes differ by {apart.item():.1e}")
    if rank == 0:
        people = unseen.load_all().float() / 255 - 0.5
        with torch.no_grad():
            embeddings = encoder.eval()(people.to(device)).cpu()
        accuracy = evaluate(embeddings, unseen.labels).verification_accuracy
        plain = evaluate(people.flatten(1), unseen.labels).verification_accuracy
        print(f"verification accuracy on ten unseen people: {accuracy:.3f}, of raw pixels {plain:.3f}", flush=True)
    if several:
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads let go of their tensors, or abort a process that ends before (PyTorch 2.13)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet10t", help="any name that timm.list_models() has")
    parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights, downloaded once")
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
