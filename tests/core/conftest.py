"""What the tests of fine-tuning share: scenarios to correct, and the images that a trial reads."""

from __future__ import annotations

import numpy as np
import pytest

from defuse_core.artifacts import Corrections, Models
from defuse_core.tuning_data import FineTuningData
from tests.conftest import fine_tuning_data, tiny


@pytest.fixture(scope="module")
def fixes() -> Corrections:
    """Two scenarios, of classes 8 and 2."""
    rng = np.random.default_rng(0)
    means = np.array([[-1.5] * 4, [1.5] * 4])[:, None]
    codes = (means + 0.1 * rng.standard_normal((2, 24, 4))).astype(np.float32)
    return Corrections(np.array([0, 3]), np.array([8, 2]), codes, codes + 0.01)


@pytest.fixture(scope="module")
def data(tiny_models: Models, fixes: Corrections) -> FineTuningData:
    return fine_tuning_data(tiny(), tiny_models, fixes)
