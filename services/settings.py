"""The environment variables that commands and servers read, and what is set before torch and Ray are imported."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from defuse_core.errors import InputError


@dataclass(frozen=True)
class Environment:
    """What `read_environment` finds. Secrets are kept out of `repr`, so that no log shows them."""

    ray_address: str | None
    ray_dashboard: str | None
    label_studio_url: str | None
    label_studio_api_key: str | None = field(repr=False)
    label_studio_host: str | None  # the address that annotators open, if it is another
    serve_token: str | None = field(repr=False)  # an empty one is kept, to be refused
    forwarded_for: bool  # a proxy on this machine adds X-Forwarded-For
    mlflow_uri: str | None = field(repr=False)  # may hold a password
    mlflow_token: str | None = field(repr=False)
    mlflow_experiment: str | None
    cache: Path  # of the local Label Studio; `~` is expanded where it is used


def share_cores() -> None:
    """Let torch's idle threads sleep, here and in the workers that inherit this environment.

    By default they spin, which on cores shared with anything else makes small networks train several times slower. It
    has an effect only before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def set_missing_home() -> None:
    """Set HOME to /, as container engines do, where this user has no home: Ray Tune cannot be imported without one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def read_environment() -> Environment:
    """Return what this process's environment sets; an empty variable counts as unset, except DEFUSE_SERVE_TOKEN."""
    get = os.environ.get
    return Environment(
        ray_address=get("RAY_ADDRESS") or None,
        ray_dashboard=get("RAY_API_SERVER_ADDRESS") or None,
        label_studio_url=get("LABEL_STUDIO_URL") or None,
        label_studio_api_key=get("LABEL_STUDIO_API_KEY") or None,
        label_studio_host=get("LABEL_STUDIO_HOST") or None,
        serve_token=_without_newline(get("DEFUSE_SERVE_TOKEN")),
        forwarded_for=is_on("DEFUSE_FORWARDED_FOR"),
        mlflow_uri=get("MLFLOW_TRACKING_URI") or None,
        mlflow_token=get("MLFLOW_TRACKING_TOKEN") or None,
        mlflow_experiment=get("MLFLOW_EXPERIMENT_NAME") or None,
        cache=Path(get("DEFUSE_CACHE") or Path(get("XDG_CACHE_HOME") or "~/.cache") / "defuse"),
    )


def _without_newline(token: str | None) -> str | None:
    """Return a token without the space around it, such as the newline of a file, which no header can hold."""
    return token if token is None else token.strip() or token


def serve_token() -> str | None:
    """Return DEFUSE_SERVE_TOKEN, None if it is not set. Raises InputError for one that is empty, or cannot be sent."""
    token = read_environment().serve_token
    if token == "":
        raise InputError(
            "DEFUSE_SERVE_TOKEN: expected a token, found an empty value; is the secret set? Unset it to serve without "
            "a token"
        )
    if token is not None and not fits_a_header(token):
        raise InputError(
            "DEFUSE_SERVE_TOKEN: expected one word of letters, digits and ASCII signs; `openssl rand -hex 32` makes one"
        )
    return token


def fits_a_header(token: str) -> bool:
    """Whether an HTTP header can hold the token: one word of letters, digits and ASCII signs."""
    return re.fullmatch(r"[\x21-\x7e]+", token) is not None


def checked_address(address: str, variable: str = "LABEL_STUDIO_URL") -> str:
    """Return the address without a slash at its end.

    Raises InputError for anything but a plain http(s) address.
    """
    try:
        parts = urlsplit(address.strip())
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{variable}: expected an address such as https://labels.example.org")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            f"{variable}: expected a plain address; set the token in LABEL_STUDIO_API_KEY instead"
        )
    return address.strip().rstrip("/")


def is_label_studio_url(address: str) -> bool:
    """Whether LABEL_STUDIO_URL is this address; a client can also have that of the local server."""
    return os.environ.get("LABEL_STUDIO_URL", "").strip().rstrip("/") == address


def proxy_for(address: str) -> str | None:
    """Return the HTTP proxy that the environment names for an address (HTTP_PROXY, NO_PROXY, ...); None for none."""
    from urllib.request import getproxies_environment, proxy_bypass  # imports ssl

    parts = urlsplit(address)
    if parts.hostname is None or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies_environment()
    return proxies.get(parts.scheme) or proxies.get("all")


def is_on(name: str) -> bool:
    """Return whether a variable is on; unset and empty ones are off. Raises InputError for anything but yes or no."""
    value = os.environ.get(name, "").strip().lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"", "0", "false", "no", "off"}:
        return False
    raise InputError(f"{name}: expected 1 or 0 (or true, yes, on, false, no, off), found {value!r}")


def variables(names: Sequence[str]) -> dict[str, str]:
    """Return the named variables, for the environment of a job. Raises InputError for one that is not set."""
    if missing := [name for name in names if name not in os.environ]:
        name, is_pair, _ = missing[0].partition("=")  # docker's NAME=VALUE: no message shows the value
        expected = "the name alone of a variable" if is_pair else "a variable"
        raise InputError(f"--env {name}: expected {expected} that is set in this environment")
    return {name: os.environ[name] for name in names}
