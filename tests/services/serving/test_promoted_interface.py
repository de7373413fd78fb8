"""A version with other images or classes than production, or whose canary has just failed, is not promoted."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from defuse_core.codec import encode
from defuse_core.config import ServeSection
from defuse_core.errors import CheckFailed, InputError, StoreError
from services.serving.launch import warn_of_production
from services.serving.registry import DamagedVersionError, Registry, promote
from services.serving.registry_state import PromotionRequest
from tests.services.serving.test_registry_changes import ANA, CANARY, SHADOW, failing

ROOT = Path(__file__).parents[3]


def with_run_file(candidate, digest, **sections):
    """The candidate as another version, with fields of its run file changed."""
    spec = {name: {**candidate.spec[name], **fields} for name, fields in sections.items()}
    return dataclasses.replace(candidate, spec={**candidate.spec, **spec}, digest=digest)


def test_swapped_class_names_are_another_interface(registry, candidates):
    promote(registry, candidates[0], ANA)
    names = list(candidates[1].classes)
    names[6], names[7] = names[7], names[6]
    swapped = dataclasses.replace(candidates[1], classes=tuple(names), digest="other")
    with pytest.raises(CheckFailed, match=r"interface: expected .*5, 6, 7, .* found .*5, 7, 6, "):
        promote(registry, swapped, ANA)


def test_of_many_classes_the_first_that_differ_are_named(candidates):
    names = tuple(f"class {number}" for number in range(1000))
    one = dataclasses.replace(candidates[0], classes=names)
    other = dataclasses.replace(candidates[1], classes=(*names[:500], "other", *names[501:]))
    error = other.interface_error(one) or ""
    assert "expected 1x16x16 pixels and 1000 classes (..., class 499, class 500, class 501, " in error
    assert "found 1x16x16 pixels and 1000 classes (..., class 499, other, class 501, " in error
    assert len(error) < 1000 and "(class 0, class 1, " in str(one.interface_error(candidates[0]))


def test_a_version_that_refuses_the_images_which_production_accepts_has_another_interface(
    registry, candidates
):
    first = candidates[0]
    padded, same = (
        with_run_file(first, name, data={"name": name, "image_size": 32, "root": "data"})
        for name in ("mnist-5000", "folder")
    )
    resizing = with_run_file(first, "resizing", serve={"resize": True})
    assert first.interface_error(resizing) == (
        "interface: production accepts images of 16x16 pixels in grey, and converts others; this version accepts 16x16 "
        "pixels in grey only, without `serve.resize: true` in its run file"
    )
    assert "of 32x32 or 28x28 pixels in grey; this version accepts 32x32" in str(same.interface_error(padded))
    assert padded.interface_error(same) is None
    for version in (first, resizing):  # more images than before harm nobody
        assert promote(registry, version, ANA).production
    with pytest.raises(CheckFailed, match="interface: production accepts"):
        promote(registry, first, ANA)


@pytest.mark.parametrize(("field", "value"), [("image_size", 32), ("channels", 3)])
def test_a_candidate_for_images_of_another_kind_is_not_promoted(registry, candidates, field, value):
    promote(registry, candidates[0], ANA)
    other = with_run_file(failing(candidates[1], "worse"), "other", data={field: value})
    with pytest.raises(CheckFailed, match=r"not promoted: worse \(and 1 more\)"):
        promote(registry, other, ANA)
    with pytest.raises(CheckFailed, match="interface: expected 1x16x16 pixels and 10 classes .* found "):
        promote(registry, dataclasses.replace(other, checks=()), ANA)


def test_the_readme_says_that_the_image_size_stays_though_both_versions_convert_images(candidates):
    small, large = (
        with_run_file(candidates[0], str(size), data={"image_size": size}, serve={"resize": True})
        for size in (16, 32)
    )
    assert "expected 1x16x16 pixels" in str(large.interface_error(small))
    text = (ROOT / "services/serving/README.md").read_text(encoding="utf-8")
    assert "it has the classes, channels and image size of the current version" in text


def test_a_candidate_that_cannot_be_compared_with_production_is_not_promoted(registry, candidates):
    promote(registry, candidates[0], ANA)
    registry.store.delete("versions/000001.safetensors")
    with pytest.raises(CheckFailed, match="interface: version 1 in production cannot be read to compare it"):
        promote(registry, candidates[1], ANA)
    with pytest.raises(CheckFailed, match=r"not promoted: worse \(and 1 more\)"):
        promote(registry, failing(candidates[1], "worse"), ANA)
    assert promote(registry, candidates[0], ANA).production == 1  # the same one, which writes it again


def test_production_of_a_defuse_with_other_fields_is_replaced_with_a_reason(registry, candidates, caplog):
    old = with_run_file(candidates[0], "old", vae={"guide_weight": 0})
    state = registry.change("added version 1", "ana", "", lambda state: {"production": 1})
    registry.store.write("versions/000001.safetensors", encode(old))
    line = (
        r"000001\.safetensors: .*vae\.guide_weight: .*; use the version of Defuse that wrote it, or promote"
    )
    with pytest.raises(DamagedVersionError, match=line):
        registry.load(1)
    warn_of_production(registry, ServeSection(), {})
    assert re.search(f"{line}.*; requests are answered 503 until then", caplog.text)
    with pytest.raises(CheckFailed, match=f"production cannot be read to compare it .*{line}"):
        promote(registry, candidates[1], ANA)
    forced = promote(registry, candidates[1], PromotionRequest("ana", "", force="an upgrade"))
    assert state.production == 1 != forced.production


@pytest.mark.parametrize("role", [CANARY, SHADOW])
def test_a_version_whose_canary_a_replica_has_just_ended_is_promoted_only_with_a_reason(
    registry, candidates, role
):
    promote(registry, candidates[0], ANA)
    promote(registry, candidates[1], role)
    state = registry.end_canary(2, "defuse serve", "3 of 50 requests failed")
    line = f"defuse serve {state.action}: 3 of 50 requests failed"
    with pytest.raises(CheckFailed, match=f"run-2 is not promoted: {line}; --force REASON"):
        promote(registry, candidates[1], ANA)
    assert registry.state() == state
    assert promote(registry, candidates[0], ANA).failed_checks == ()  # another version
    for again in (role, dataclasses.replace(ANA, force="a drill")):
        promote(registry, candidates[1], role)
        registry.end_canary(2, "defuse serve", "3 of 50 requests failed")
        promoted = promote(registry, candidates[1], again)
        assert promoted.failed_checks == ((line,) if again.force else ())
    assert promoted.production == 2 and promoted.since.failed_checks == (line,)


def test_no_version_is_promoted_while_the_store_does_not_say_whose_canary_has_just_ended(
    registry, candidates, monkeypatch
):
    promote(registry, candidates[0], ANA)
    promote(registry, candidates[1], CANARY)
    state, read = registry.end_canary(2, "defuse serve", "3 of 50 requests failed"), registry._read

    def read_the_last(sequence, **named):
        if sequence < state.sequence:
            raise StoreError("no answer")
        return read(sequence, **named)

    monkeypatch.setattr(registry, "_read", read_the_last)
    with pytest.raises(StoreError, match="no answer"):
        promote(registry, candidates[1], ANA)
    assert registry.state() == state


def test_a_damaged_change_before_the_end_of_a_canary_needs_a_reason_that_stays_on_record(
    registry, candidates
):
    promote(registry, candidates[0], ANA)
    promote(registry, candidates[1], CANARY)
    state = registry.end_canary(2, "defuse serve", "3 of 50 requests failed")
    registry.store.write(f"changes/{state.sequence - 1:06d}.json", b"damaged")
    line = f"{state.action}: 3 of 50 requests failed; whether that was this model is unknown: .*000004.json"
    with pytest.raises(CheckFailed, match=f"{line}.* --force REASON"):
        promote(registry, candidates[1], ANA)
    assert registry.state() == state
    (forced_over,) = promote(registry, candidates[1], dataclasses.replace(ANA, force="it is")).failed_checks
    assert re.search(line, forced_over) and registry.state().production == 2


@pytest.mark.parametrize("role", [CANARY, SHADOW])
def test_a_version_whose_canary_ends_during_its_promotion_is_not_promoted(
    registry, candidates, monkeypatch, role
):
    promote(registry, candidates[0], ANA)
    promote(registry, candidates[1], role)
    add = Registry.add

    def add_after_its_end(self, *arguments, **named):
        self.end_canary(2, "defuse serve", "3 of 50 requests failed")
        return add(self, *arguments, **named)

    with monkeypatch.context() as ending:
        ending.setattr(Registry, "add", add_after_its_end)
        with pytest.raises(InputError, match="the canary or shadow of version 2 ended just now"):
            promote(registry, candidates[1], ANA)
        assert registry.state().production == 1
        for _ in range(2):  # the second time it ends during this, and begins again
            assert promote(registry, candidates[1], role).canary_or_shadow == 2
    assert promote(registry, candidates[1], ANA).production == 2


def test_a_canary_that_a_person_ended_needs_no_reason(registry, candidates):
    promote(registry, candidates[0], ANA)
    promote(registry, candidates[1], CANARY)
    registry.end_canary(2, "bo", "enough")
    assert promote(registry, candidates[1], ANA).failed_checks == ()


def test_a_version_in_production_that_is_forced_once_more_keeps_what_it_was_forced_over_last(
    registry, candidates
):
    force = dataclasses.replace(ANA, force="a drill")
    for checks in ((), ("worse",), ("worse", "slower")):
        forced = promote(registry, failing(candidates[0], *checks), force)
        assert forced.production == 1 and forced.since.failed_checks == checks
