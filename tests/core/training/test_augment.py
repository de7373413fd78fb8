"""Augmentation of minibatches: each image changed its own way, and still an image."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from defuse_core.training.batches import (
    _affine_grid,
    _blurred,
    _transformed,
    augment,
    color_jitter,
    random_affine,
)


def test_augmented_images_are_still_images_and_each_is_changed_its_own_way():
    images = torch.rand(1, 1, 16, 16).repeat(4, 1, 1, 1)
    out = augment(images, np.random.default_rng(0))
    assert out.shape == images.shape
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert len({tuple(image.flatten().tolist()) for image in out}) == 4


SIDE = 32
PLACES = (np.arange(SIDE) + 0.5) * 2 / SIDE - 1  # centres of pixels, in half sides from the centre
CENTRE = slice(SIDE // 4, 3 * SIDE // 4)  # so far from the border that no augmentation reaches it


def ramps(count: int) -> torch.Tensor:
    """Return images whose channels are x, y and 1, as 0.5 + 0.2 x, 0.5 + 0.2 y and 0.5, (count, 3, SIDE, SIDE).

    Interpolation and blur leave what is linear as it is, so that where a pixel comes from can be read from its value.
    """
    y, x = np.meshgrid(PLACES, PLACES, indexing="ij")
    image = np.stack([0.5 + 0.2 * x, 0.5 + 0.2 * y, np.full_like(x, 0.5)])
    return torch.from_numpy(image.astype(np.float32)).repeat(count, 1, 1, 1)


def maps_of(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the affine maps (n, 2, 2), shifts (n, 2) and brightness (n,) that made these of ramps."""
    pixels = images.double().numpy()
    bright = pixels[:, 2, SIDE // 2, SIDE // 2] / 0.5
    places = (pixels[:, :2, CENTRE, CENTRE] / bright[:, None, None, None] - 0.5) / 0.2
    y, x = np.meshgrid(PLACES[CENTRE], PLACES[CENTRE], indexing="ij")
    basis = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1)
    found = np.stack([np.linalg.lstsq(basis, each.reshape(2, -1).T, rcond=None)[0].T for each in places])
    np.testing.assert_allclose(
        np.einsum("nij,pj->nip", found, basis), places.reshape(len(images), 2, -1), atol=1e-4
    )
    return found[:, :, :2], found[:, :, 2], bright


def assert_spread(values: np.ndarray, low: float, high: float) -> None:
    """Expect values of a uniform distribution."""
    assert low - 1e-3 <= values.min() < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < values.max() <= high + 1e-3


def test_an_image_is_slanted_then_rotated_then_scaled_and_shifted() -> None:
    angle, slant, scale, shift = 0.3, 0.2, (0.9, 1.2), (0.1, -0.05)
    moved = _transformed(ramps(1), *(np.array([each]) for each in (angle, slant, scale, shift)))
    rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrices, shifts, _ = maps_of(moved)
    np.testing.assert_allclose(matrices[0], np.diag(scale) @ rotation @ [[1, slant], [0, 1]], atol=1e-4)
    np.testing.assert_allclose(shifts[0], shift, atol=1e-4)


def test_random_maps_rotate_slant_scale_each_axis_and_shift() -> None:
    matrices, shifts, bright = maps_of(random_affine(ramps(600), np.random.default_rng(0)))
    (a, b), (c, d) = matrices.transpose(1, 2, 0)  # sx cos, sx (slant cos - sin); sy sin, sy (slant sin + cos)
    angle = 0.5 * np.arcsin(2 / (d / c - b / a))
    sure = np.abs(angle) > 0.01
    assert_spread(angle, -0.17, 0.17)
    assert_spread(b / a + np.tan(angle), -0.15, 0.15)
    for scale in (a / np.cos(angle), c[sure] / np.sin(angle[sure])):
        assert_spread(scale, 0.9, 1.1)
    for axis in shifts.T:
        assert_spread(axis, -0.12, 0.12)
    np.testing.assert_allclose(bright, 1, atol=1e-6)


def test_augmentation_rotates_scales_alike_along_both_axes_shifts_and_changes_the_brightness() -> None:
    matrices, shifts, bright = maps_of(augment(ramps(600), np.random.default_rng(0)))
    scale = np.sqrt(np.linalg.det(matrices))
    unscaled = matrices / scale[:, None, None]
    np.testing.assert_allclose(
        unscaled @ unscaled.transpose(0, 2, 1), np.tile(np.eye(2), (600, 1, 1)), atol=1e-3
    )
    assert_spread(np.arctan2(unscaled[:, 1, 0], unscaled[:, 0, 0]), -0.2, 0.2)
    assert_spread(scale, 0.85, 1.15)
    for axis in shifts.T:
        assert_spread(axis, -0.12, 0.12)
    assert_spread(bright, 0.4, 1.2)


def test_no_augmentation_draws_a_border() -> None:
    same = torch.full((100, 1, 16, 16), 0.5)
    for changed in (augment(same, np.random.default_rng(0)), random_affine(same, np.random.default_rng(0))):
        flat = changed.flatten(1)
        torch.testing.assert_close(flat, flat[:, :1].expand_as(flat))


def test_five_of_eight_augmented_images_are_blurred() -> None:
    edge = torch.zeros(800, 1, 16, 16)
    edge[..., 8:] = 0.8
    changed = augment(edge, np.random.default_rng(0))
    step = changed.diff(dim=3).amax(dim=(1, 2, 3)) / changed.amax(dim=(1, 2, 3))
    # without blur over 0.42 of the edge is between two pixels, and after it a third at most
    assert float((step > 0.38).float().mean()) == pytest.approx((1 - 0.5) * (1 - 0.25), abs=0.05)


def test_a_white_image_is_no_brighter_after_augmentation() -> None:
    white = augment(torch.ones(200, 1, 4, 4), np.random.default_rng(0)).amax(dim=(1, 2, 3))
    assert float(white.max()) == 1
    assert float((white == 1).float().mean()) == pytest.approx(0.2 / 0.8, abs=0.1)  # brightness of 1 to 1.2


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 32, 20)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_images_are_moved_and_blurred_as_torch_does(shape: tuple[int, ...], memory_format) -> None:
    torch.manual_seed(0)
    images, theta = torch.rand(shape).contiguous(memory_format=memory_format), torch.randn(shape[0], 2, 3)
    grid = F.affine_grid(theta, list(shape), align_corners=False)
    # torch multiplies matrices, and adds in an order that depends on the processor
    torch.testing.assert_close(_affine_grid(theta, *shape[2:]), grid, rtol=1e-6, atol=1e-6)
    pooled = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    assert torch.equal(_blurred(images), pooled)


def test_colour_jitter_changes_each_colour_and_the_contrast_of_each_image_but_not_its_shapes() -> None:
    grey = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    out = color_jitter(grey.expand(-1, 3, -1, -1), np.random.default_rng(0))
    colours = out.mean(dim=(2, 3)) / out.mean(dim=(1, 2, 3))[:, None]  # (n, 3)
    assert colours.min() < 0.85
    assert colours.max() > 1.15
    contrast = out[:, 0].std(dim=(1, 2)) / grey[:, 0].std(dim=(1, 2))
    assert contrast.min() < 0.6
    assert contrast.max() > 1.4
    both = torch.stack([out[:, 0].flatten(1), grey[:, 0].flatten(1)])
    assert all(torch.corrcoef(pair)[0, 1] > 0.999 for pair in both.unbind(1))
    extreme = color_jitter(
        torch.cat([torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)]), np.random.default_rng(1)
    )
    assert extreme.min() >= 0
    assert extreme.max() <= 1
