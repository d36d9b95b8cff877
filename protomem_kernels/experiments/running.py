"""A trial from its images to its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from protomem_kernels.experiments.ages import Ages
from protomem_kernels.experiments.images import Images, Sets, damaged, read_sets
from protomem_kernels.experiments.learning import Learner, TrialBatch, embed, peak_memory
from protomem_kernels.experiments.trial import Trial
from protomem_kernels.training.loop import batches
from protomem_kernels.training.steps import stream

SIMULATED = "simulated"
FAR = (1e-2, 1e-3, 1e-4)


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
    if trial.data == SIMULATED:
        learner = Learner(trial, seed, channels=1)
        for batch in simulated(trial, seed):
            learner.learn(batch)
            told(1)
        return learner.costs() | {"peak_mib": peak_memory() - before}
    sets = sets or read_sets(trial)
    names, labels = sets.train.labels.unique(return_inverse=True)
    trial = trial.model_copy(update={"identities": len(names)})
    learner = Learner(trial, seed, channels=sets.train.pixels.shape[1])
    watched = Ages(sets.train, labels, trial.train.steps) if ages else None
    for batch in drawn(learner, sets.train, labels):
        learner.learn(batch)
        if watched is not None:
            watched.look(learner, batch.labels)
        told(1)
    costs = learner.costs() | {"peak_mib": peak_memory() - before}
    rates = measured(learner.average, getattr(sets, trial.measured_on), trial)
    return {**rates, **costs, **(watched.figures() if watched is not None else {})}


def drawn(learner: Learner, images: Images, labels: Tensor) -> Iterator[TrialBatch]:
    """Yield the batches of a trial."""
    sampler = learner.head.sampler(learner.trial, labels, learner.seed)
    for batch in batches(sampler, 0, learner.trial.train.steps):
        chosen = torch.tensor(batch)
        yield TrialBatch(images.floats(chosen), labels[chosen], images.quality[chosen])


def simulated(trial: Trial, seed: int) -> Iterator[TrialBatch]:
    """Yield batches of noise with as many identities as one likes: what a step costs does not hang on what it sees."""
    config = trial.train
    for step in range(config.steps):
        generator = torch.Generator().manual_seed(stream(seed, SIMULATED, step))
        some = torch.randint(trial.identities, (config.identities_per_batch,), generator=generator)
        labels = some.repeat_interleave(config.images_per_identity)
        images = torch.rand(len(labels), 1, *trial.image_size, generator=generator)
        yield TrialBatch(images, labels, torch.ones(len(labels)))


def measured(encoder: nn.Module, images: Images, trial: Trial) -> dict[str, float]:
    """Return the figures of an encoder; where images were damaged for training, those of damaged ones as well."""
    figures = verified(embed(encoder, images), images.labels)
    if trial.degraded:
        worse = damaged(images, trial)
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
