"""The one place that reads the environment, and sets what this process and its workers need of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The environment variables that Defuse reads. Secrets are kept out of `repr`, so that no log shows them."""

    ray_address: str | None  # RAY_ADDRESS
    ray_dashboard: str | None  # RAY_API_SERVER_ADDRESS
    label_studio_url: str | None  # LABEL_STUDIO_URL
    label_studio_api_key: str | None = field(repr=False)  # LABEL_STUDIO_API_KEY
    serve_token: str | None = field(repr=False)  # DEFUSE_SERVE_TOKEN
    debug: bool  # DEFUSE_DEBUG: show tracebacks
    cache: Path = Path("~/.cache/defuse")  # DEFUSE_CACHE, else below XDG_CACHE_HOME: the local Label Studio


def share_cores() -> None:
    """Let torch's idle threads sleep, here and in the workers that inherit this environment.

    By default they spin, which on cores shared with anything else makes small networks train several times slower. It
    has an effect only before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def read_settings() -> Settings:
    """Return the settings of this process; an empty variable counts as unset."""
    get = os.environ.get
    return Settings(
        ray_address=get("RAY_ADDRESS") or None,
        ray_dashboard=get("RAY_API_SERVER_ADDRESS") or None,
        label_studio_url=get("LABEL_STUDIO_URL") or None,
        label_studio_api_key=get("LABEL_STUDIO_API_KEY") or None,
        serve_token=get("DEFUSE_SERVE_TOKEN") or None,
        debug=(get("DEFUSE_DEBUG") or "0").lower() not in {"0", "false", "no"},
        cache=Path(get("DEFUSE_CACHE") or Path(get("XDG_CACHE_HOME") or "~/.cache") / "defuse").expanduser(),
    )


def variables(names: Iterable[str]) -> dict[str, str]:
    """Return those of the named variables that are set, for the environment of a job."""
    return {name: os.environ[name] for name in names if name in os.environ}
