import numpy as np
import torch

from defuse_core.training.augment import augment
from defuse_core.training.data_parallel import MinibatchPart


def test_augmented_images_are_still_images_and_each_is_changed_its_own_way():
    images = torch.rand(1, 1, 16, 16).repeat(4, 1, 1, 1)
    out = augment(images, np.random.default_rng(0))
    assert out.shape == images.shape
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert len({tuple(image.flatten().tolist()) for image in out}) == 4


def test_a_worker_augments_its_part_of_a_minibatch_as_one_worker_does():
    images = torch.rand(8, 1, 16, 16)
    whole = augment(images, np.random.default_rng(0))
    for rows in (slice(0, 3), slice(3, 8)):
        part = MinibatchPart(rows, 8, 1.0)
        torch.testing.assert_close(augment(images[rows], np.random.default_rng(0), part), whole[rows])
