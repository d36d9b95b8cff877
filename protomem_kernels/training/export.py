"""A trained encoder for other programs: written, read back by the program's own runtime, compared, and only then there.

The contract is one for all formats, and stands beside the file as JSON. ONNX and torch.export hold everything from
pixels in [0, 1] to the embedding that the run verified: standardisation, the ten views, their mean, its length of 1.
safetensors holds the encoder's weights alone; the JSON says how the encoder is built and what is to be done around it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from protomem_kernels import __version__
from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.encoders import build_encoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.extras import needed
from protomem_kernels.training.files import written_whole
from protomem_kernels.training.preprocessing import GREY, Transform
from protomem_kernels.training.quiet import errors_alone
from protomem_kernels.training.thresholds import read_thresholds
from protomem_kernels.training.trained import encoder_of, read_encoder

TOLERANCE = 1e-4  # of each number of an embedding of length 1; float32 in another order of sums is off by some 1e-7
BATCHES = 1, 3  # images that are compared; the exported batch is of any size

INPUT, OUTPUT = "images", "embeddings"
Embed: TypeAlias = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A format: the suffix of its files, how one is written, and how its own runtime reads it back."""

    suffix: str
    write: Callable[[Path, VerifiedEncoder, Tensor], None]
    read: Callable[[Path, VerifiedEncoder, dict[str, Any]], Embed]
    whole: bool  # pixels to embeddings; else the weights alone


def export(run: Path, form: str, out: Path | None = None, *, all_views: bool = True) -> tuple[Path, Path, float]:
    """Write a run's encoder in a format of ``FORMATS``, and beside it ``<out>.json``, which says how to use it.

    Args:
        run: the run's folder.
        form: the name of the format.
        out: the file to write; None: ``encoder`` with the format's suffix, in the run's folder.
        all_views: the mean over the ten views that the run verified; False: one view, at a tenth of the cost.

    Returns:
        The file, the JSON, and the largest difference between what the file computes and what the run's encoder does.

    Raises:
        RunError: the run or the format cannot be used, a library is missing, it cannot be written, or what was written
            computes something else; then there is no file.

    """
    if form not in FORMATS:
        raise RunError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    kind = FORMATS[form]
    out = run / f"encoder{kind.suffix}" if out is None else out
    if out.suffix != kind.suffix:
        raise RunError(f"out must end in {kind.suffix} for {form}, got {out}")
    content = read_encoder(run)
    (encoder, transform), built = encoder_of(content, run), content["built"]
    embedder = VerifiedEncoder(encoder, all_views).eval()
    generator = torch.Generator().manual_seed(0)
    examples = [torch.rand(n, len(transform.mode), *transform.image_size, generator=generator) for n in BATCHES]
    beside = out.with_name(out.name + ".json")
    contract = _contract(run, form, kind, embedder, transform, built, embedder(examples[0]).shape[1])
    with written_whole(out) as temporary:
        with _quiet(), torch.no_grad():
            try:
                kind.write(temporary, embedder, examples[-1])
                again = kind.read(temporary, embedder, built)
                difference = max(_difference(again(images), embedder(images)) for images in examples)
            except (RunError, OSError):
                raise
            except Exception as error:  # exporters and runtimes raise what they like
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RunError(f"the encoder of {run} cannot be exported as {form}: {reason}") from error
        if not difference <= TOLERANCE:
            raise RunError(
                f"{out} was not written: what {form} computes is off by {difference:.2g}, more than {TOLERANCE:g}"
            )
        with written_whole(beside) as description:
            description.write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    return out, beside, difference


def _difference(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        raise RunError(f"the exported encoder returns shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
    return float((theirs - ours).abs().max())


def _contract(
    run: Path,
    form: str,
    kind: Format,
    embedder: VerifiedEncoder,
    transform: Transform,
    built: dict[str, Any],
    dimensions: int,
) -> dict[str, Any]:
    """Return all that whoever uses the file has to know."""
    height, width = transform.image_size
    grey = f"{GREY[0]} R + {GREY[1]} G + {GREY[2]} B"
    before = [
        "decode the image, turn it upright by its EXIF orientation, drop alpha, bring it to 8 bits",
        f"make it grey: {grey}" if transform.mode == "L" else "make it RGB, in this order",
        "cut it to the aspect ratio of the size below, in the middle",
        f"resize it to {height} x {width} (height x width), bilinear, antialiased, as Pillow does",
        "divide by 255; order the axes as batch, channel, row, column",
    ]
    inside = [
        *(
            [
                "take ten views: the image, and moved by a twenty-fourth of each side (rounded, at least one pixel) "
                "down, up, right and left with borders repeated; and the mirror images of these five"
            ]
            if embedder.all_views
            else []
        ),
        "standardise each image: subtract its mean, divide by its standard deviation (over all its pixels and "
        "channels) + 0.001",
        "encode",
        *(["scale each view's embedding to length 1, take the mean over the views"] if embedder.all_views else []),
        "scale to length 1",
    ]
    contract: dict[str, Any] = {
        "format": form,
        "run": run.resolve().name,
        "input": {
            "name": INPUT,
            "shape": ["batch", len(transform.mode), height, width],
            "dtype": "float32",
            "range": [0, 1],
            "channels": transform.mode,
        },
        "output": {"name": OUTPUT, "shape": ["batch", dimensions], "dtype": "float32", "length": 1},
        "before_the_model": before,
        "in_the_model" if kind.whole else "around_the_weights": inside,
        "compare": "the dot product of two embeddings is their cosine; one identity if it reaches a threshold",
        **_thresholds(run, embedder.all_views),
        "versions": {"protomem_kernels": __version__, "torch": torch.__version__},
    }
    return contract if kind.whole else {**contract, "encoder": built}


def _thresholds(run: Path, measured: bool) -> dict[str, Any]:
    """Return what the run's validation says of thresholds, which holds for what it measured alone."""
    if not measured:
        return {"operating_points": [], "no_operating_points": "the run measured the mean over ten views, not one"}
    try:
        thresholds = read_thresholds(run)
    except RunError as error:
        return {"operating_points": [], "no_operating_points": str(error)}
    points = [
        {**point._asdict(), "enough_pairs": not thresholds.doubt(point.far)}
        for point in thresholds.points
        if point.threshold is not None
    ]
    return {"operating_points": points, "impostor_pairs": thresholds.impostor_pairs}


def _program(embedder: VerifiedEncoder, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(embedder, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write_program(path: Path, embedder: VerifiedEncoder, images: Tensor) -> None:
    with path.open("wb") as file:
        torch.export.save(_program(embedder, images), file)


def _read_program(path: Path, embedder: VerifiedEncoder, built: dict[str, Any]) -> Embed:
    with path.open("rb") as file:
        module: Embed = torch.export.load(file).module()
    return module


def _write_onnx(path: Path, embedder: VerifiedEncoder, images: Tensor) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needed(module, what="--format onnx", extra="export")
    program = torch.onnx.export(
        _program(embedder, images),
        (images,),
        dynamo=True,
        verbose=False,
        external_data=False,  # one file, weights and all
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    assert program is not None
    program.save(path)


def _read_onnx(path: Path, embedder: VerifiedEncoder, built: dict[str, Any]) -> Embed:
    runtime = needed("onnxruntime", what="--format onnx", extra="export")
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_weights(path: Path, embedder: VerifiedEncoder, images: Tensor) -> None:
    safetensors = needed("safetensors.torch", what="--format safetensors", extra="export")
    weights = {name: value.contiguous() for name, value in embedder.encoder.state_dict().items()}
    path.write_bytes(safetensors.save(weights, metadata={"format": "pt"}))  # save_file keeps it from all but the owner


def _read_weights(path: Path, embedder: VerifiedEncoder, built: dict[str, Any]) -> Embed:
    safetensors = needed("safetensors.torch", what="--format safetensors", extra="export")
    encoder: nn.Module = build_encoder(**built)
    encoder.load_state_dict(safetensors.load_file(path))
    return VerifiedEncoder(encoder, embedder.all_views).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what torch's exporters say of torchvision and of torch's own deprecations."""
    with errors_alone("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx, whole=True),
    "safetensors": Format(".safetensors", _write_weights, _read_weights, whole=False),
    "torch.export": Format(".pt2", _write_program, _read_program, whole=True),
}
