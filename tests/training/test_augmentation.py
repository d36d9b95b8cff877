"""Augmentation: one seed, one batch, and the changes that it promises."""

import torch

from protomem_kernels.training import augmentation


def changed(seed, strength=1.0, images=None):
    images = torch.rand(6, 1, 24, 20, generator=torch.Generator().manual_seed(1)) if images is None else images
    return augmentation.augment(images, torch.Generator().manual_seed(seed), strength)


def test_augmentation_depends_on_its_generator_alone():
    first = changed(0)
    torch.rand(100)
    assert torch.equal(changed(0), first)
    assert not torch.equal(changed(1), first)
    assert first.shape == (6, 1, 24, 20)
    assert first.isfinite().all()


def test_augmentation_leaves_its_input_alone():
    images = torch.rand(3, 3, 10, 10)
    before = images.clone()
    changed(0, images=images)
    assert torch.equal(images, before)


def test_no_strength_mirrors_and_standardises_only():
    images = torch.rand(16, 1, 12, 10)
    result, plain = changed(0, 0.0, images), augmentation.standardise(images)
    same = torch.stack([torch.isclose(result, view, atol=1e-4).all((3, 2))[:, 0] for view in (plain, plain.flip(3))])
    assert same.any(0).all()
    assert same.any(1).all()


def test_standardised_images():
    images = torch.rand(4, 3, 8, 9)
    images[0] = 0.5
    result = augmentation.standardise(images)
    torch.testing.assert_close(result.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(result[1:].std((1, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert (result[0].abs() < 1e-3).all()


def test_a_cover_hides_a_rectangle_of_its_share():
    images = torch.ones(200, 1, 40, 40)
    hidden = augmentation.cover(images, torch.Generator().manual_seed(0), 1.0) == 0
    share = hidden.float().mean((1, 2, 3))
    assert (share > 0).all()
    assert (share <= 0.5**2 + 0.05).all()
    assert torch.equal(augmentation.cover(images, torch.Generator().manual_seed(0), 0.0), images)
