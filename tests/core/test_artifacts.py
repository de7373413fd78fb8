import numpy as np
import pytest

from defuse_core.artifacts import Failures


def test_axes_that_disagree_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="axis F has length 2, elsewhere 3"):
        Failures(np.ones((3, 2), np.float32), np.arange(2), np.zeros(3, np.int64), np.ones(3, np.int64))
