"""Changes of the registry whose files are damaged or missing."""

from __future__ import annotations

import pytest
from synthetic_runs import unverified

from defuse_core.errors import DamagedError, InputError
from services.serving.registry import promote
from tests.services.serving.test_registry_changes import ANA


@pytest.mark.parametrize("damaged", ["changes/000006.json", "changes/000005.json"])
def test_the_last_change_can_be_deleted_where_it_is_damaged_and_made_again(registry, candidates, damaged):
    """As the error says. The last two changes are those of a promotion: one adds a version, one gives it its role."""
    for candidate in candidates[:2]:
        promote(registry, candidate, ANA)
    before = registry.state()
    last = promote(registry, candidates[2], ANA)
    if damaged == "changes/000005.json":
        registry.store.delete("changes/000006.json")
    files = {key: registry.store.read(key) for key in registry.store.list("versions/")}
    registry.store.write(damaged, b"\0" * 20)
    for command in (registry.state, lambda: promote(registry, candidates[0], ANA)):
        with pytest.raises(
            DamagedError, match=rf"{damaged}: .*; restore the file, or delete it: the change before"
        ):
            command()
    registry.store.delete(damaged)
    assert registry.changes_after(last)[-1].production == before.production  # as a running server reads it
    again = promote(registry, candidates[2], ANA)
    assert (again.production, again.versions.keys()) == (3, last.versions.keys())
    assert {key: registry.store.read(key) for key in registry.store.list("versions/")} == files


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_rollback_after_a_change_that_is_damaged_or_missing_names_it_and_the_option(
    registry, candidates, how
):
    for candidate in candidates[:2]:
        promote(registry, candidate, ANA)
    registry.store.write("changes/000003.json", b"damaged")
    if how == "missing":
        registry.store.delete("changes/000003.json")
    with pytest.raises(
        InputError, match=r"000003\.json is missing or damaged\); .* `defuse rollback --production"
    ):
        registry.roll_back("bo", "", unverified)
    assert registry.state().production == 2
    assert registry.roll_back("bo", "", unverified, production=True).production == 1
