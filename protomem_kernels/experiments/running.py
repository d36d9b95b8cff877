"""A trial from its images to its figures."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from protomem_kernels.experiments.ages import Ages
from protomem_kernels.experiments.heads import Head, build_head
from protomem_kernels.experiments.images import Images, Sets, damaged, read_sets
from protomem_kernels.experiments.trial import Trial
from protomem_kernels.training.augmentation import augment, standardise
from protomem_kernels.training.encoders import build_encoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.loop import batches
from protomem_kernels.training.steps import rate_factor, stream
from protomem_kernels.training.unrecognizable import show_unrecognizable

SIMULATED = "simulated"
FAR = (1e-2, 1e-3, 1e-4)
EMBED_BATCH = 512
WARM_UP = 5  # steps that are not timed


def run(
    trial: Trial,
    seed: int,
    *,
    ages: bool = False,
    told: Callable[[int], None] = lambda steps: None,
    sets: Sets | None = None,
) -> dict[str, float]:
    """Train one method with one seed; return its figures by name, on identities that it has never seen.

    They are a function of the trial, the seed, the machine and the number of threads.

    Args:
        trial: the method.
        seed: of the initialisation, the batches and whatever else is random.
        ages: hold stored prototypes against re-computed ones on the way.
        told: is called with 1 after every step.
        sets: the images, if they are read already.

    Raises:
        RunError, DatasetError: the trial cannot be run.
    """
    before = peak_memory()
    sets = None if trial.data == SIMULATED else sets or read_sets(trial)
    labels = None
    if sets is not None:
        names, labels = sets.train.labels.unique(return_inverse=True)
        trial = trial.model_copy(update={"identities": len(names)})
    config = trial.train.model_copy(update={"seed": seed, "image_size": trial.image_size})
    trial = trial.model_copy(update={"train": config})
    torch.manual_seed(stream(seed, "initialisation"))
    encoder = build_encoder(
        config.encoder,
        channels=1 if sets is None else sets.train.pixels.shape[1],
        image_size=trial.image_size,
        embedding_dim=config.embedding_dim,
        width=config.width,
        dropout=config.dropout,
    )
    head = build_head(trial, encoder, torch.arange(trial.identities))
    average = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(config.averaging), use_buffers=True).eval()
    schedules = [LambdaLR(optimizer, partial(rate_factor, steps=config.steps)) for optimizer in head.optimizers]
    steps, watched = simulated(trial), None
    if sets is not None and labels is not None:
        steps = drawn(trial, head, sets.train, labels)
        watched = Ages(sets.train, labels, config.steps) if ages else None
    spent, loss = list[float](), math.nan
    for step, (images, owners, quality) in enumerate(steps):
        generator = torch.Generator().manual_seed(stream(seed, "augmentation", step))
        torch.manual_seed(stream(seed, "step", step))
        show_unrecognizable(head.loss, encoder, images, generator)
        seen = augment(images, generator, config.augmentation) if config.augmentation else standardise(images)
        encoder.train()
        began = time.process_time()
        result = head(encoder(seen), owners, quality if trial.weights == "true" else None)
        for optimizer in head.optimizers:
            optimizer.zero_grad()
        result.backward()
        head.before_step()
        nn.utils.clip_grad_norm_(encoder.parameters(), 5.0)
        for optimizer, schedule in zip(head.optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        spent.append(time.process_time() - began)
        average.update_parameters(encoder)
        loss = float(result.detach())
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} in step {step + 1}")
        if watched is not None:
            watched.look(step, owners, encoder, head)
        told(1)
    costs = {
        "loss": loss,
        "ms_per_step": 1e3 * statistics.median(spent[WARM_UP:] or spent),
        "head_mib": head.held_bytes / 2**20,
        "peak_mib": (peak_memory() - before) / 2**20,
    }
    if sets is None:
        return costs
    rates = measured(average, getattr(sets, trial.measured_on), trial.degraded)
    return {**rates, **costs, **(watched.figures() if watched is not None else {})}


def drawn(trial: Trial, head: Head, images: Images, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the images of every step, their labels in [0, identities) and their quality."""
    for batch in batches(head.sampler(trial, labels, trial.train.seed), 0, trial.train.steps):
        chosen = torch.tensor(batch)
        yield images.floats(chosen), labels[chosen], images.quality[chosen]


def simulated(trial: Trial) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of noise with as many identities as one likes: what a step costs does not hang on what it sees."""
    config = trial.train
    for step in range(config.steps):
        generator = torch.Generator().manual_seed(stream(config.seed, SIMULATED, step))
        some = torch.randint(trial.identities, (config.identities_per_batch,), generator=generator)
        labels = some.repeat_interleave(config.images_per_identity)
        yield torch.rand(len(labels), 1, *trial.image_size, generator=generator), labels, torch.ones(len(labels))


def measured(encoder: nn.Module, images: Images, degraded: float) -> dict[str, float]:
    """Return the figures of an encoder; where images were damaged for training, those of damaged ones as well."""
    figures = verified(embed(encoder, images), images.labels)
    if degraded:
        worse = damaged(images, degraded)
        figures |= {f"damaged_{name}": value for name, value in verified(embed(encoder, worse), images.labels).items()}
    return figures


def verified(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, true accept rates and rank-1 of (N, D) embeddings."""
    from protomem_kernels.data.evaluation import evaluate

    result = evaluate(embeddings, labels.unique(return_inverse=True)[1], resamples=1)
    curve = result.roc
    tars = {f"tar_at_far_{far:.0e}".replace("e-0", "e-"): float(curve.tar[curve.far <= far].max()) for far in FAR}
    return {
        "accuracy": result.verification_accuracy,
        **tars,
        "rank1": float(result.rank1 or 0.0),
        "impostor_pairs": float(result.impostor_pairs),
    }


@torch.no_grad()
def embed(encoder: nn.Module, images: Images) -> Tensor:
    """Return (N, D) unit embeddings of images as they are."""
    encoder.eval()
    parts = torch.arange(len(images.labels)).split(EMBED_BATCH)
    return torch.cat([F.normalize(encoder(standardise(images.floats(part)))) for part in parts])


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
