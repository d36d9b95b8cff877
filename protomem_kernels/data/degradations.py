"""Damage of known severity, so that an estimate of an image's quality can be held against the truth.

:func:`blur`, :func:`downscale`, :func:`noise` and :func:`occlude` lower the quality of images by a known amount,
:func:`degrade` does one of them by name or by chance, and :func:`degrade_share` damages a part of a data set. Severity
0 returns the same values, 1 leaves next to nothing to recognise, and more severity is never less damage. The limits
below set what severity 1 means; all are relative to the image, not to a resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from protomem_kernels._checks import check_number

__all__ = ["DEGRADATIONS", "blur", "degrade", "degrade_share", "downscale", "noise", "occlude"]

BLUR_SIGMA = 0.08  # standard deviation of the blur, in image heights
DOWNSCALE_FACTOR = 16.0  # how many times fewer rows and columns
NOISE_SIGMA = 0.5  # standard deviation of the noise, where black is 0 and white is 1
OCCLUDED_AREA = 0.75  # part of the image's area

CHUNK = 4096  # images of a data set that are floats at a time


def _checked_severity(images: Tensor, severity: float | Tensor) -> Tensor:
    """Refuse what is no batch of images in [0, 1]; return the severity of each image (N,)."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be a floating (N, C, H, W) tensor with values in [0, 1], "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    severity = torch.as_tensor(severity, dtype=images.dtype, device=images.device)
    if severity.shape not in ((), images.shape[:1]):
        raise ValueError(
            f"severity must be a number or have shape ({len(images)},) to match images, got {tuple(severity.shape)}"
        )
    # Looked at on the CPU only, where it does not make the host wait for a device.
    if images.device.type == "cpu":
        for name, values in (("images", images), ("severity", severity)):
            if not bool(((values >= 0) & (values <= 1)).all()):
                low, high = float(values.min()), float(values.max())
                raise ValueError(f"{name} must be in [0, 1], got values from {low:g} to {high:g}")
    return severity.expand(len(images))


def _drawn(draw: Callable[..., Tensor], shape: Sequence[int], images: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers from the generator's own device: a CPU generator gives the same picture on every device."""
    return draw(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32).to(images)


def _gaussian_rows(length: int, sigma: Tensor) -> Tensor:
    """Gaussian smoothing along one axis as one matrix per image: (N, length, length), rows summing to 1."""
    place = torch.arange(length, dtype=sigma.dtype, device=sigma.device)
    distance = (place[:, None] - place) / sigma[:, None, None]
    return torch.softmax(-0.5 * distance.square(), dim=-1)


def blur(images: Tensor, severity: float | Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of ``severity`` * 0.08 image heights (9 pixels for 112).

    Near the border the weights that fall outside are left out and the rest is scaled up, so flat areas stay flat.

    Args:
        images: (N, C, H, W) floating, values in [0, 1].
        severity: in [0, 1], a number or one per image (N,). 0 returns the images unchanged.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: wrong shape or dtype; on the CPU also values out of range.

    Example:
        >>> edge = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 1, 4, 4)
        >>> [round(value, 4) for value in blur(edge, 1.0)[0, 0, 0].tolist()]
        [0.0, 0.0075, 0.9925, 1.0]

    """
    severity = _checked_severity(images, severity)
    sigma = (severity * BLUR_SIGMA * images.shape[2]).clamp(min=1e-3)
    rows, columns = (_gaussian_rows(length, sigma)[:, None] for length in images.shape[2:])
    blurred = (rows @ images @ columns.transpose(-1, -2)).clamp(0, 1)
    return torch.where(severity[:, None, None, None] == 0, images, blurred)


def downscale(images: Tensor, severity: float | Tensor) -> Tensor:
    """Lose resolution: scale height and width down by 16 ** ``severity`` (antialiased), then up to the old size.

    Severity 0.25 halves them, 0.5 quarters them; sizes are rounded to whole pixels, at least one.

    Args:
        images: (N, C, H, W) floating, values in [0, 1].
        severity: in [0, 1], a number or one per image (N,). 0 returns the images unchanged.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: wrong shape or dtype; on the CPU also values out of range.

    Example:
        >>> stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 1, 16, 16)
        >>> downscale(stripes, 1.0).unique()  # one pixel is left
        tensor([0.5000])

    """
    severity = _checked_severity(images, severity)
    height, width = images.shape[2:]
    factor = DOWNSCALE_FACTOR ** severity.double()
    sizes = torch.stack([(length / factor).round().clamp(min=1) for length in (height, width)], dim=1)
    result = images.clone()
    for size in torch.unique(sizes, dim=0):  # as many turns as there are different sizes
        chosen = (sizes == size).all(dim=1)
        small_size = [int(length) for length in size]
        if small_size != [height, width]:
            # The CPU has no resize in half precision.
            sharp = images[chosen].to(torch.promote_types(images.dtype, torch.float32))
            small = F.interpolate(sharp, small_size, mode="bilinear", antialias=True)
            result[chosen] = F.interpolate(small, (height, width), mode="bilinear").clamp(0, 1).to(images.dtype)
    return result


def noise(images: Tensor, severity: float | Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise with a standard deviation of ``severity`` * 0.5, independent per value, clipped to [0, 1].

    Args:
        images: (N, C, H, W) floating, values in [0, 1].
        severity: in [0, 1], a number or one per image (N,). 0 returns the images unchanged.
        generator: where the noise is drawn from. Equal generators draw equal noise, whatever the severity.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: wrong shape or dtype; on the CPU also values out of range.

    Example:
        >>> grey = torch.full((1, 1, 100, 100), 0.5)
        >>> round(float(noise(grey, 0.2, torch.Generator().manual_seed(0)).std()), 2)
        0.1

    """
    severity = _checked_severity(images, severity)
    sigma = severity[:, None, None, None] * NOISE_SIGMA
    return (images + sigma * _drawn(torch.randn, images.shape, images, generator)).clamp(0, 1)


def occlude(images: Tensor, severity: float | Tensor, generator: torch.Generator) -> Tensor:
    """Cover a rectangle of the image's own aspect ratio, at a random place inside it, with grey 0.5.

    Its area is ``severity`` * 0.75 of the image's, to within the pixels at its edge.

    Args:
        images: (N, C, H, W) floating, values in [0, 1].
        severity: in [0, 1], a number or one per image (N,). 0 returns the images unchanged.
        generator: where the places are drawn from. Equal generators draw places where the rectangle of a lower
            severity lies inside that of a higher one.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: wrong shape or dtype; on the CPU also values out of range.

    Example:
        >>> white = torch.ones(1, 1, 100, 100)
        >>> covered = occlude(white, 1.0, torch.Generator().manual_seed(0)) == 0.5
        >>> round(float(covered.float().mean()), 2)
        0.75

    """
    severity = _checked_severity(images, severity)
    place = _drawn(torch.rand, (2, len(images), 1), images, generator)
    side = (severity * OCCLUDED_AREA).sqrt()[:, None]  # of the rectangle, in image sides
    covered = []
    for start, length in zip(place, images.shape[2:], strict=True):
        middle = (torch.arange(length, dtype=images.dtype, device=images.device) + 0.5) / length
        first = start * (1 - side)
        covered.append((middle >= first) & (middle < first + side))
    rows, columns = covered
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], 0.5, images)


DEGRADATIONS = ("blur", "downscale", "noise", "occlude")


def degrade(images: Tensor, severity: float | Tensor, kind: str = "random", *, generator: torch.Generator) -> Tensor:
    """Damage images by a known amount, so that the true quality, 1 - ``severity``, is known.

    Made to test the quality estimates of Quality-Aware Prototype Memory (arXiv 2311.07734).

    Args:
        images: (N, C, H, W) floating, values in [0, 1].
        severity: in [0, 1], a number or one per image (N,). 0 returns the images unchanged.
        kind: one of :data:`DEGRADATIONS`, or "random": one of them for each image.
        generator: where all that is random is drawn from.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: an unknown kind; wrong shape or dtype; on the CPU also values out of range.

    Example:
        >>> from protomem_kernels.data.images import orl_faces
        >>> faces = orl_faces().load_all()[:8] / 255
        >>> severity = torch.linspace(0, 1, 8)
        >>> damaged = degrade(faces, severity, generator=torch.Generator().manual_seed(0))
        >>> damaged.shape, bool((damaged[0] == faces[0]).all())
        (torch.Size([8, 1, 112, 92]), True)

    """
    severity = _checked_severity(images, severity)
    if kind == "random":
        draws = torch.randint(len(DEGRADATIONS), (len(images),), generator=generator, device=generator.device)
        result = images.clone()
        for number, name in enumerate(DEGRADATIONS):
            chosen = (draws == number).to(images.device)
            result[chosen] = degrade(images[chosen], severity[chosen], name, generator=generator)
        return result
    if kind == "blur":
        return blur(images, severity)
    if kind == "downscale":
        return downscale(images, severity)
    if kind == "noise":
        return noise(images, severity, generator)
    if kind == "occlude":
        return occlude(images, severity, generator)
    raise ValueError(f'kind must be "random" or one of {", ".join(DEGRADATIONS)}, got {kind!r}')


def degrade_share(
    images: Tensor,
    share: float,
    *,
    seed: int,
    severity: tuple[float, float] = (0.3, 0.9),
    kind: str = "random",
) -> tuple[Tensor, Tensor]:
    """Damage a share of a data set's 8-bit images, and keep the truth: the quality of each.

    Args:
        images: (N, C, H, W) uint8. They are copied.
        share: of the images that are damaged, in [0, 1]; round(share * N) of them, chosen by chance.
        seed: of the chance. Equal arguments give equal results; of two shares with one seed, the larger one damages
            all images that the smaller does, as severely, and more.
        severity: lowest and highest; each image's is drawn evenly from between them.
        kind: one of :data:`DEGRADATIONS`, or "random": one of them for each image.

    Returns:
        Images like ``images``, and the quality of each, (N,) float32: 1 - severity where it is damaged, else 1.

    Raises:
        TypeError, ValueError: images that are no uint8 (N, C, H, W), numbers out of range, an unknown kind.

    Example:
        >>> images = torch.full((10, 1, 8, 8), 200, dtype=torch.uint8)
        >>> damaged, quality = degrade_share(images, 0.5, seed=0, kind="noise")
        >>> changed = (damaged != images).any(dim=(1, 2, 3))
        >>> int(changed.sum()), bool((changed == (quality < 1)).all())
        (5, True)

    """
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be a uint8 (N, C, H, W) tensor, got {images.dtype} of shape {tuple(images.shape)}"
        )
    check_number("share", share, low=0, high=1)
    low, high = severity
    check_number("severity[0]", low, low=0, high=1)
    check_number("severity[1]", high, low=low, high=1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    amounts = low + (high - low) * torch.rand(len(images), generator=generator)
    damaged, quality = images.clone(), torch.ones(len(images))
    for chosen in order[: round(share * len(images))].split(CHUNK):
        sharp = images[chosen].float() / 255
        spoilt = degrade(sharp, amounts[chosen], kind, generator=generator)
        damaged[chosen] = (spoilt * 255).round().to(torch.uint8)
        quality[chosen] = 1 - amounts[chosen]
    return damaged, quality
