"""Joining a Ray cluster, or starting Ray inside this process."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

import ray

from cluster.errors import one_line
from defuse_core.errors import ComputeError, InputError, RunFileError

SHARED_STORE = "--store must be one that all nodes share: s3://bucket/prefix, or a shared folder"


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start an embedded Ray; True if this call made the connection.

    Raises InputError for an address of another kind, ComputeError where no cluster answers.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        protect_embedded_ray()
        ray.init(address="local", include_dashboard=False, **quiet)
        return True
    if "://" in address:
        raise InputError(
            f"--address {address}: expected HOST:PORT of a cluster that this machine is a node of, or auto; from "
            "elsewhere `defuse submit` takes the dashboard's http:// address"
        )
    try:
        ray.init(address=address, **quiet)
    except Exception as error:
        raise ComputeError(_unreachable(address, error)) from error
    return True


def protect_embedded_ray() -> None:
    """Give the embedded Ray a token that only this process knows, since it listens on every interface of the machine.

    Ray turns its token authentication on by itself unless RAY_AUTH_MODE is set; with a token in the environment it
    neither needs nor writes ~/.ray/auth_token.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _unreachable(address: str, error: Exception) -> str:
    text = str(error)
    if "token" in text.lower() or "authenticat" in text.lower():
        return (
            f"Ray at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's "
            "(`ray get-auth-token` on its head shows it)"
        )
    return (
        f"no Ray cluster answers at {address} ({one_line(error)}); see --address, RAY_ADDRESS, RAY_AUTH_TOKEN"
    )


def require_absolute_root(root: Path | None) -> None:
    """Raise RunFileError for a `data.root` that each node would resolve against a folder of its own."""
    if root is not None and not root.is_absolute():
        raise RunFileError(f"data.root {root}: expected the absolute path of the images on the nodes")
