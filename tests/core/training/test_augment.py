import numpy as np
import torch

from defuse_core.training.augment import augment


def test_augmented_images_are_still_images_and_each_is_changed_its_own_way():
    images = torch.rand(1, 1, 16, 16).repeat(4, 1, 1, 1)
    out = augment(images, np.random.default_rng(0))
    assert out.shape == images.shape
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert len({tuple(image.flatten().tolist()) for image in out}) == 4
