"""Keys of the store stay in the environment of the processes that were given them."""

from __future__ import annotations

import os

import pytest
from ray.tune.execution.class_cache import _ActorClassCache

from cluster.ray_compat import quiet_tune


class Trainable:
    """Stands for a trial."""


def test_tune_does_not_describe_its_actors_with_the_keys_of_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "never-to-be-seen")
    with quiet_tune():
        described = _ActorClassCache().get(Trainable)._default_options["runtime_env"]
    assert "PL_DISABLE_FORK" in described["env_vars"]  # this is where Tune puts what it passes on
    assert not [name for name in described["env_vars"] if name.startswith("AWS_")]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "never-to-be-seen"
