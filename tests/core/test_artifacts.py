import numpy as np
import pytest

from tests.sample_components import sample_failures


def test_axes_that_disagree_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="axis F has length 2, elsewhere 3"):
        sample_failures(
            np.ones((3, 2), np.float32), np.arange(2), np.zeros(3, np.int64), np.ones(3, np.int64)
        )
