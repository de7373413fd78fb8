"""The arguments of the application, and the settings that follow from them. Imports no Ray."""

from __future__ import annotations

import contextlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from defuse_core.runs import Run
from defuse_core.store import Store
from services.serving.candidate import with_settings
from services.serving.registry import DamagedVersionError, Registry
from services.settings import fits_a_header, read_settings
from services.storage import open_store


class ServeArgs(BaseModel):
    """The arguments of the application."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    store: str = "runs"
    """Folder or s3://bucket/prefix with the runs and the registry; reachable from every node."""
    run: str | None = None
    """Serve this run's corrected model until a version is promoted; without it, the version in production."""
    pin: bool = False
    """Keep `run`, whatever is promoted."""
    require_token: bool = False
    """Do not start a replica without DEFUSE_SERVE_TOKEN in its environment."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of section `serve` that replace those of the run file."""


def serve_token() -> str | None:
    """Return DEFUSE_SERVE_TOKEN, None if it is not set. Raises InputError for one that is empty, or cannot be sent."""
    token = read_settings().serve_token
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


def resolve_settings(args: ServeArgs) -> ServeSection:
    """Return section `serve` of the run that these arguments name, with their changes. Raises InputError.

    Without a run, it is that of the version in production.
    """
    if args.pin and args.run is None:
        raise InputError("--pin needs a RUN to keep")
    store = open_store(args.store)
    section = _section_of_production(store) if args.run is None else Run.open(store, args.run).spec.serve
    return with_settings(section, args.settings)


def _section_of_production(store: Store) -> ServeSection:
    """Return section `serve` for the version in production: of its run's file as it is now, else of the version's copy.

    Returns the defaults where neither can be read: the server answers 503 then, until the version can be.
    """
    registry = Registry(store)
    state = registry.state()
    if state.production is None:
        return ServeSection()
    if state.production in state.versions:
        with contextlib.suppress(InputError):  # the run was deleted, or its file is damaged
            return Run.open(store, state.versions[state.production].run).spec.serve
    try:
        return registry.load(state.production).run_file().serve
    except (InputError, DamagedVersionError):
        return ServeSection()
