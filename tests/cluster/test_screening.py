"""Screening and tightening on workers give what they give in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.compute import RayCompute
from defuse_core.artifacts import Models, ReferenceSet
from defuse_core.codec import encode
from defuse_core.distill.components import distill
from defuse_core.local import LocalCompute
from defuse_core.protocols import silent
from defuse_core.review.sample import Examiner, sample_gallery
from defuse_core.review.tighten import tighten
from defuse_core.store import FolderStore
from tests.cluster.checks import assert_same_psi
from tests.conftest import recommended

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize("decoding", ["plain", "anchored"])
def test_screening_and_tightening_on_workers_keep_the_same_codes_and_components(
    decoding: str, tiny_models: Models, references: ReferenceSet, tmp_path: Path
) -> None:
    spec = recommended(vae={"decode": decoding})
    here, there = FolderStore(tmp_path / "here"), FolderStore(tmp_path / "there")
    local = LocalCompute().identify(spec, tiny_models, here, references)
    with RayCompute(None, spec) as compute:
        psi = compute.identify(spec, tiny_models, there, references)
        found = compute.task("distill", distill, spec, psi, there, tiny_models.data_fingerprint)
        found = tighten(Examiner(spec, tiny_models, references, found), compute)
        gallery = compute.task("draw", sample_gallery, spec, tiny_models, found)
    assert 0 < psi.total < psi.failing == local.failing
    assert_same_psi(len(psi.codes), there, here)
    expected = distill(spec, local, here, tiny_models.data_fingerprint, progress=silent)
    expected = tighten(Examiner(spec, tiny_models, references, expected), LocalCompute())
    assert found.taus is not None
    assert len(found) > 0
    np.testing.assert_array_equal(found.taus, expected.taus)
    assert found.dropped == expected.dropped
    assert encode(found) == encode(expected)
    assert encode(gallery) == encode(sample_gallery(spec, tiny_models, expected, progress=silent))
