"""The end of a run: embed the unseen identities, measure, leave the encoder, ``metrics.json`` and the pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from protomem_kernels import __version__
from protomem_kernels.data.images import ImageDataset
from protomem_kernels.training import runs
from protomem_kernels.training.augmentation import standardise
from protomem_kernels.training.embedding import embed
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.files import written_whole
from protomem_kernels.training.measuring import hardest, measure
from protomem_kernels.training.pictures import Curve, Pair, draw_pairs, draw_roc
from protomem_kernels.training.steps import Training
from protomem_kernels.training.thresholds import operating_points
from protomem_kernels.training.trained import read_encoder, save_encoder

if TYPE_CHECKING:
    from protomem_kernels.data.evaluation import VerificationResult

PAIRS_SHOWN = 8
PICTURE_HEIGHT = 168  # pixels; more than the encoder sees, for the human eye


def report(folder: Path, faces: Faces, training: Training, best_step: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the averaged encoder on what verifies it, write the run's files, and return the metrics.

    Where ``best_step`` is not 0, that is the encoder of that step, which was found best on the way. The metrics hold
    ``more`` too, what the run itself knows. Where nothing verifies there are no figures and no pictures.

    Two baselines take the encoder's input itself, standardised pixels, as the embedding, under the same protocol: the
    images as they are (``baseline_raw_pixels``), and the mean of the same ten views that the encoder gets
    (``baseline_ten_views``), which shows how much of the gain is learned.
    """
    if best_step:
        training.average.module.load_state_dict(read_encoder(folder)["weights"])
    else:
        save_encoder(folder / runs.ENCODER, training, faces.transform)
    if faces.unseen is None:
        metrics = {"cautions": ["nothing verified the encoder (--validation none)"], **_facts(faces, training), **more}
        _write(folder, metrics)
        return metrics
    embeddings = embed(training.average, (images for images, _ in faces.unseen_batches()), training.device)
    ours = measure(embeddings, faces)
    # Pixels are many numbers: those of one baseline at a time.
    baseline = measure(torch.cat([standardise(images).flatten(1) for images, _ in faces.unseen_batches()]), faces)
    viewed = (images for images, _ in faces.unseen_batches())
    ten_views = measure(embed(nn.Flatten(), viewed, torch.device("cpu")), faces)

    metrics = {
        "verification_accuracy": ours.verification_accuracy,
        "verification_accuracy_std": ours.verification_accuracy_std,
        "baseline_raw_pixels": baseline.verification_accuracy,
        "verification_accuracy_low": ours.verification_accuracy_low,  # 95 %
        "verification_accuracy_high": ours.verification_accuracy_high,
        "tar_at_far_1e-2_low": ours.tar_at_far_1e_2_low,
        "tar_at_far_1e-2_high": ours.tar_at_far_1e_2_high,
        "tar_at_far_1e-3_low": ours.tar_at_far_1e_3_low,
        "tar_at_far_1e-3_high": ours.tar_at_far_1e_3_high,
        "cautions": ours.cautions(),
        "gain": ours.verification_accuracy - baseline.verification_accuracy,
        **_rates(ours, ""),
        **_rates(baseline, "baseline_"),
        "baseline_ten_views": ten_views.verification_accuracy,
        "baseline_ten_views_auc": ten_views.auc,
        "genuine_pairs": ours.genuine_pairs,
        "impostor_pairs": ours.impostor_pairs,
        "genuine_pairs_in_all": ours.genuine_pairs_in_all,
        "impostor_pairs_in_all": ours.impostor_pairs_in_all,
        "rank1_probes": ours.rank1_probes,
        "operating_points": operating_points(ours.roc),
        "best_step": best_step or training.step,
        **_facts(faces, training),
        **more,
    }
    if best_step:
        metrics["cautions"].append(f"step {best_step} was chosen by these figures: expect a little less on others")
    _write(folder, metrics)

    subtitle = f"{faces.config.validation or faces.source}, {who_verifies(metrics)}, {metrics['best_step']} steps"
    draw_roc(
        folder / runs.ROC,
        Curve("Prototype Memory", ours.roc.far, ours.roc.tar, ours.verification_accuracy, ours.auc),
        Curve(
            "raw pixels, ten views",
            ten_views.roc.far,
            ten_views.roc.tar,
            ten_views.verification_accuracy,
            ten_views.auc,
        ),
        Curve("raw pixels", baseline.roc.far, baseline.roc.tar, baseline.verification_accuracy, baseline.auc),
        subtitle=subtitle,
    )
    worst = hardest(embeddings, faces, PAIRS_SHOWN)
    draw_pairs(
        folder / runs.PAIRS,
        [_pair(faces, *pair) for pair in worst.false_accepts],
        [_pair(faces, *pair) for pair in worst.false_rejects],
        subtitle,
    )
    return metrics


def who_verifies(metrics: Mapping[str, Any]) -> str:
    """Return the words for what a run's figures are of."""
    pairs, identities = metrics["listed_pairs"], metrics["unseen_identities"]
    if identities is None:
        return f"{pairs} pairs"
    whom = f"{identities} identities never trained on"
    return whom if pairs is None else f"{pairs} pairs among {whom}"


def _facts(faces: Faces, training: Training) -> dict[str, Any]:
    """Return what the figures are of."""
    config = training.config
    unseen = 0 if faces.unseen is None else len(faces.unseen.identities)
    return {
        "train_identities": len(faces.train.identities),
        "unseen_identities": unseen if faces.identities_known else None,
        "listed_pairs": None if faces.pairs is None else len(faces.pairs.same),
        "data": faces.source,
        "validation": config.validation,
        "held_out": config.held_out,
        "pairs": config.pairs,
        "fold": config.fold,
        "inner_fold": config.inner_fold,
        "seed": config.seed,
        "steps": training.step,
        "parameters": sum(p.numel() for p in training.encoder.parameters()),
        "device": str(training.device),
        "threads": torch.get_num_threads(),
        "versions": {"protomem_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _write(folder: Path, metrics: Mapping[str, Any]) -> None:
    with written_whole(folder / runs.METRICS) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _rates(result: VerificationResult, prefix: str) -> dict[str, float | None]:
    return {
        f"{prefix}tar_at_far_1e-2": result.tar_at_far_1e_2,
        f"{prefix}tar_at_far_1e-3": result.tar_at_far_1e_3,
        f"{prefix}rank1": result.rank1,
        f"{prefix}auc": result.auc,
    }


def _pair(faces: Faces, first: int, second: int, cosine: float) -> Pair:
    """Return a pair of unseen images with what stands below them."""
    assert faces.unseen is not None
    paths = [faces.unseen.paths[index] for index in (first, second)]
    names = [f"{path.parent.name}/{path.stem}" if isinstance(path, Path) else str(path) for path in paths]
    height, width = faces.image_size
    size = (PICTURE_HEIGHT, max(1, PICTURE_HEIGHT * width // height))
    shown = ImageDataset(paths, [0, 1], names, image_size=size, mode=faces.unseen.mode)
    return Pair(shown[0][0], shown[1][0], (names[0], names[1]), cosine)
