"""The environment variables that Defuse reads."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from defuse_core.errors import InputError
from services.settings import fits_a_header, read_environment, set_missing_home, share_cores, variables

FIELDS = {  # field of each variable that is text
    "RAY_ADDRESS": "ray_address",
    "RAY_API_SERVER_ADDRESS": "ray_dashboard",
    "LABEL_STUDIO_URL": "label_studio_url",
    "LABEL_STUDIO_API_KEY": "label_studio_api_key",
    "LABEL_STUDIO_HOST": "label_studio_host",
    "DEFUSE_SERVE_TOKEN": "serve_token",
    "MLFLOW_TRACKING_URI": "mlflow_uri",
    "MLFLOW_TRACKING_TOKEN": "mlflow_token",
    "MLFLOW_EXPERIMENT_NAME": "mlflow_experiment",
}
SWITCHES = {
    "DEFUSE_FORWARDED_FOR": "forwarded_for",
}


def test_each_variable_is_a_field_of_its_own_and_an_empty_one_is_unset_except_for_the_token_of_serve(
    monkeypatch,
):
    for name in FIELDS:
        monkeypatch.setenv(name, f"value of {name}")
    found = asdict(read_environment())
    assert {name: found[field] for name, field in FIELDS.items()} == {
        name: f"value of {name}" for name in FIELDS
    }
    for name in FIELDS:
        monkeypatch.setenv(name, "")
    found = asdict(read_environment())
    assert found.pop("serve_token") == ""
    assert {found[field] for field in FIELDS.values() if field in found} == {None}


def test_the_line_break_of_a_file_is_no_part_of_a_key(monkeypatch):
    monkeypatch.setenv("DEFUSE_SERVE_TOKEN", "a key\n")
    assert read_environment().serve_token == "a key"


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_turns_on_its_own_field_alone(monkeypatch, name):
    for switch in SWITCHES:
        monkeypatch.setenv(switch, str(int(switch == name)))
    found = asdict(read_environment())
    assert [switch for switch, field in SWITCHES.items() if found[field]] == [name]


def test_no_log_of_the_settings_shows_a_secret(monkeypatch):
    secret = ("API_KEY", "TOKEN", "SECRET_ACCESS_KEY", "TRACKING_URI")
    for name in FIELDS:
        monkeypatch.setenv(name, f"value of {name}")
    shown = repr(read_environment())
    assert [name for name in FIELDS if f"value of {name}'" not in shown] == [
        name for name in FIELDS if name.endswith(secret)
    ]


@pytest.mark.parametrize(
    ("given", "token"), [("secret\n", "secret"), (" secret ", "secret"), (" \n", " \n"), ("", "")]
)
def test_a_token_is_read_without_the_space_around_it_and_one_of_space_alone_is_no_missing_one(
    monkeypatch, given, token
):
    monkeypatch.setenv("DEFUSE_SERVE_TOKEN", given)
    assert read_environment().serve_token == token


@pytest.mark.parametrize(
    ("token", "fits"),
    [("a", True), ("!~", True), ("a b", False), ("", False), ("a\n", False), ("é", False), ("a\x7f", False)],
)
def test_a_header_holds_one_word_of_ascii_signs(token, fits):
    assert fits_a_header(token) is fits


@pytest.mark.parametrize(
    ("own", "of_the_desktop", "found"),
    [
        ("/own", "/desktop", "/own"),
        ("", "/desktop", "/desktop/defuse"),
        ("", "", "~/.cache/defuse"),
    ],
)
def test_the_cache_is_ones_own_or_below_that_of_the_desktop(monkeypatch, own, of_the_desktop, found):
    monkeypatch.setenv("DEFUSE_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", of_the_desktop)
    assert read_environment().cache == Path(found)


def test_idle_threads_sleep_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_a_user_without_a_home_has_the_one_of_a_container_and_others_keep_theirs(monkeypatch):
    def no_user(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", no_user)
    monkeypatch.setenv("HOME", "/home/ana")
    set_missing_home()
    assert os.environ["HOME"] == "/home/ana"
    monkeypatch.delenv("HOME")
    set_missing_home()
    assert os.environ["HOME"] == "/"


def test_a_job_gets_variables_that_are_set_empty_ones_included(monkeypatch):
    monkeypatch.setenv("DEFUSE_A", "1")
    monkeypatch.setenv("DEFUSE_B", "")
    monkeypatch.delenv("DEFUSE_C", raising=False)
    assert variables(["DEFUSE_A", "DEFUSE_B"]) == {"DEFUSE_A": "1", "DEFUSE_B": ""}
    with pytest.raises(InputError, match="--env DEFUSE_C: expected a variable that is set"):
        variables(["DEFUSE_A", "DEFUSE_C"])
    with pytest.raises(
        InputError, match="^--env DEFUSE_A: expected the name alone of a variable that is set"
    ):
        variables(["DEFUSE_A=secret"])


@pytest.mark.parametrize(
    ("value", "on"),
    [("1", True), ("TRUE", True), ("yes", True), (" on\n", True)]
    + [(value, False) for value in ("", " ", "0", " 0", "False", "no", "OFF")],
)
def test_a_switch_is_on_or_off(monkeypatch, value, on):
    monkeypatch.setenv("DEFUSE_FORWARDED_FOR", value)
    assert read_environment().forwarded_for == on


@pytest.mark.parametrize("value", ["n", "disabled", "2"])
def test_any_other_value_of_a_switch_is_an_error_that_names_it(monkeypatch, value):
    monkeypatch.setenv("DEFUSE_FORWARDED_FOR", value)
    with pytest.raises(InputError, match=f"DEFUSE_FORWARDED_FOR: expected 1 or 0 .* found '{value}'"):
        read_environment()


def test_switches_are_off_where_they_are_not_set(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    found = read_environment()
    assert not found.forwarded_for


def test_a_cache_below_an_unknown_home_does_not_keep_the_other_settings_from_being_read(monkeypatch):
    monkeypatch.setenv("DEFUSE_CACHE", "~nosuchuser/cache")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert read_environment().ray_address == "head:6379"
