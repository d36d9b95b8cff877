"""The damage by its definition."""

from collections import Counter

import pytest
import torch

from protomem_kernels.data import degradations
from protomem_kernels.data.degradations import DEGRADATIONS, blur, degrade, degrade_share, downscale, noise, occlude
from protomem_kernels.data.images import orl_faces


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    return orl_faces().subset_of_identities(range(0, 40, 5)).load_all()[::10] / 255


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*DEGRADATIONS, "random"])
def test_damage_keeps_shape_dtype_range_and_severity_zero(faces, kind, dtype):
    images = faces[:6].to(dtype).expand(6, 3, -1, -1)
    before = images.clone()
    severity = torch.tensor([0.0, 0.1, 0.0, 0.5, 1.0, 0.0])
    damaged = degrade(images, severity, kind, generator=generator())
    assert (damaged.shape, damaged.dtype) == (images.shape, dtype)
    assert torch.equal(images, before)
    assert damaged.min() >= 0
    assert damaged.max() <= 1
    for index, amount in enumerate(severity):
        assert torch.equal(damaged[index], images[index]) == (amount == 0)
    assert torch.equal(degrade(images, 0, kind, generator=generator()), images)
    assert torch.equal(degrade(images, severity, kind, generator=generator()), damaged)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_more_severity_is_more_damage(faces, kind):
    damage = torch.stack(
        [
            (degrade(faces, severity, kind, generator=generator()) - faces).square().mean((1, 2, 3))
            for severity in torch.linspace(0, 1, 9).tolist()
        ]
    )
    assert (damage[0] == 0).all()
    assert (damage.mean(1).diff() > 0).all()
    assert (damage.diff(dim=0) >= -1e-4).all()
    assert (damage[-1] > 20 * damage[0] + 1e-3).all()


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_severity_per_image_is_that_image_alone(faces, kind):
    severity = torch.tensor([0.9, 0.2, 0.6])
    together = degrade(faces[:3], severity, kind, generator=generator())
    for index in range(3):
        same = degrade(faces[:3], float(severity[index]), kind, generator=generator())[index]
        torch.testing.assert_close(together[index], same, rtol=0, atol=1e-6)


def test_blur_is_a_gaussian_of_the_documented_width():
    spot = torch.zeros(1, 1, 101, 101, dtype=torch.float64)
    spot[0, 0, 50, 50] = 1
    spread = blur(spot, 0.5)[0, 0]
    sigma = 0.5 * 0.08 * 101
    place = torch.arange(101, dtype=torch.float64) - 50
    assert float(spread.sum()) == pytest.approx(1, rel=1e-6)
    for axis in (0, 1):
        assert float((spread.sum(axis) * place**2).sum()) == pytest.approx(sigma**2, rel=1e-3)
    flat = torch.full((1, 2, 9, 5), 0.3)
    torch.testing.assert_close(blur(flat, 1.0), flat)


def test_downscale_sizes():
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 1, 64, 64).contiguous()
    half = downscale(stripes, 0.25)  # two columns become one: their mean, away from the border
    assert half[..., 8:-8].sub(0.5).abs().max() < 0.1
    steps = torch.rand(1, 1, 64, 64, generator=generator())
    assert downscale(steps, 1.0).flatten().unique().numel() > 16  # 4 x 4 pixels, drawn large by interpolation
    torch.testing.assert_close(downscale(steps, 1.0).mean(), steps.mean(), atol=0.05, rtol=0)
    tiny = torch.rand(1, 1, 3, 2, generator=generator())
    assert downscale(tiny, 1.0).unique().numel() == 1


def test_noise_and_occlusion_amounts():
    grey = torch.full((4, 1, 64, 64), 0.5)
    noisy = noise(grey, torch.tensor([0.05, 0.1, 0.2, 0.3]), generator())
    torch.testing.assert_close(noisy.flatten(1).std(1), torch.tensor([0.025, 0.05, 0.1, 0.15]), rtol=0.05, atol=0)
    assert noisy[0].ne(noisy[1]).any()
    severity = torch.tensor([0.1, 0.4, 0.7, 1.0])
    images = torch.ones(4, 2, 80, 60)
    covered = occlude(images, severity, generator()) != 1
    torch.testing.assert_close(covered.float().mean((1, 2, 3)), severity * 0.75, rtol=0, atol=0.03)
    for one in covered[:, 0]:  # one rectangle
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns)
        assert rows.diff().sum() <= 2
        assert columns.diff().sum() <= 2
    assert occlude(images, 0.5, generator()).unique().tolist() == [0.5, 1.0]
    less, more = (occlude(images, amount, generator()) != 1 for amount in (0.3, 0.6))
    assert (more | ~less).all()
    assert occlude(images, 0.5, generator(1)).ne(occlude(images, 0.5, generator(2))).any()


def test_random_kinds_come_equally_often():
    images = torch.rand(400, 1, 8, 8, generator=generator())
    damaged = degrade(images, 0.5, generator=generator(3))
    found = Counter()
    for one, soft, coarse in zip(damaged, blur(images, 0.5), downscale(images, 0.5), strict=True):
        if one.allclose(soft):
            found["blur"] += 1
        elif one.allclose(coarse):
            found["downscale"] += 1
        else:
            found["occlude" if (one == 0.5).sum() >= 6 else "noise"] += 1
    assert set(found) == set(DEGRADATIONS)
    assert min(found.values()) > 70


def test_no_images_are_no_problem():
    for kind in (*DEGRADATIONS, "random"):
        assert degrade(torch.rand(0, 3, 8, 8), 0.5, kind, generator=generator()).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "severity", "kind", "message"),
    [
        (
            torch.rand(1, 4, 4),
            0.5,
            "blur",
            r"images must be a floating \(N, C, H, W\) tensor .* got torch.float32 of sh",
        ),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), 0.5, "noise", "images must be a floating .* got torch.uint8"),
        (torch.full((1, 1, 4, 4), 255.0), 0.5, "noise", r"images must be in \[0, 1\], got values from 255 to 255"),
        (torch.full((1, 1, 4, 4), torch.nan), 0.5, "blur", r"images must be in \[0, 1\], got values from nan to nan"),
        (torch.rand(2, 1, 4, 4), 1.5, "occlude", r"severity must be in \[0, 1\], got values from 1.5 to 1.5"),
        (torch.rand(2, 1, 4, 4), -0.1, "random", r"severity must be in \[0, 1\], got values from -0.1 to -0.1"),
        (
            torch.rand(2, 1, 4, 4),
            [0.1] * 3,
            "downscale",
            r"severity must be a number or have shape \(2,\) .* got \(3,\)",
        ),
        (torch.rand(2, 1, 4, 4), 0.5, "melt", "kind must be \"random\" or one of blur, .*, got 'melt'"),
    ],
)
def test_bad_damage(images, severity, kind, message):
    with pytest.raises(ValueError, match=message):
        degrade(images, torch.tensor(severity), kind, generator=generator())


class TestShare:
    @pytest.fixture
    def images(self, faces):
        return (faces * 255).to(torch.uint8)

    @pytest.mark.parametrize("chunk", [3, 4096])
    def test_quality_tells_what_was_done_to_whom(self, images, chunk, monkeypatch):
        monkeypatch.setattr(degradations, "CHUNK", chunk)
        damaged, quality = degrade_share(images, 0.75, seed=4, severity=(0.4, 0.8), kind="blur")
        low = quality < 1
        assert (damaged.dtype, quality.dtype, int(low.sum())) == (torch.uint8, torch.float32, 6)
        assert torch.equal((damaged != images).any(dim=(1, 2, 3)), low)
        assert quality[low].min() >= 0.2
        assert quality[low].max() <= 0.6
        again = (blur(images / 255, (1 - quality).clamp(0, 1)) * 255).round()
        assert (again - damaged).abs()[low].max() <= 1

    def test_a_seed_decides(self, images):
        one, two, other = (degrade_share(images, 0.5, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert not torch.equal(one[1], other[1])
        _, more = degrade_share(images, 1.0, seed=1)
        assert (more < 1).all()
        assert torch.equal(more[one[1] < 1], one[1][one[1] < 1])

    def test_none_of_them(self, images):
        damaged, quality = degrade_share(images, 0, seed=0)
        assert torch.equal(damaged, images)
        assert damaged.data_ptr() != images.data_ptr()
        assert (quality == 1).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
            ({"severity": (0.5, 0.4)}, r"severity\[1\] must be in \[0.5, 1\], got 0.4"),
            ({"severity": (-0.5, 0.4)}, r"severity\[0\] must be in \[0, 1\], got -0.5"),
            ({"kind": "melt"}, "kind must be"),
            ({"images": torch.rand(2, 1, 4, 4)}, r"images must be a uint8 \(N, C, H, W\) tensor, got torch.float32 of"),
        ],
    )
    def test_bad_input(self, images, options, message):
        with pytest.raises(ValueError, match=message):
            degrade_share(**{"images": images, "share": 0.5, "seed": 0} | options)
