"""The environment variables that Defuse reads."""

from __future__ import annotations

import pytest

from defuse_core.errors import InputError
from services.settings import read_settings


@pytest.mark.parametrize(
    ("value", "on"),
    [("1", True), ("TRUE", True), ("yes", True), (" on\n", True)]
    + [(value, False) for value in ("", " ", "0", " 0", "False", "no", "OFF")],
)
def test_a_switch_is_on_or_off(monkeypatch, value, on):
    monkeypatch.setenv("LABEL_STUDIO_S3_SHARE_CREDENTIALS", value)
    assert read_settings().label_studio_s3.share_own == on


@pytest.mark.parametrize("value", ["n", "disabled", "2"])
def test_any_other_value_of_a_switch_is_an_error_that_names_it(monkeypatch, value):
    monkeypatch.setenv("DEFUSE_FORWARDED_FOR", value)
    with pytest.raises(InputError, match=f"DEFUSE_FORWARDED_FOR: expected 1 or 0 .* found '{value}'"):
        read_settings()


def test_switches_are_off_where_they_are_not_set(monkeypatch):
    for name in ("DEFUSE_DEBUG", "DEFUSE_FORWARDED_FOR", "LABEL_STUDIO_S3_SHARE_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    settings = read_settings()
    assert not (settings.debug or settings.forwarded_for or settings.label_studio_s3.share_own)


def test_a_cache_below_an_unknown_home_does_not_keep_the_other_settings_from_being_read(monkeypatch):
    monkeypatch.setenv("DEFUSE_CACHE", "~nosuchuser/cache")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert read_settings().ray_address == "head:6379"
