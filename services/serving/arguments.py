"""The arguments of the application, and the settings that follow from them. Imports no Ray."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from defuse_core.runs import Run
from services.serving.candidate import with_settings
from services.serving.registry import Registry
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
    """Return DEFUSE_SERVE_TOKEN, None if it is not set. Raises InputError for one that clients cannot send."""
    token = read_settings().serve_token
    if token and not fits_a_header(token):
        raise InputError(
            "DEFUSE_SERVE_TOKEN: expected one word of letters, digits and ASCII signs; `openssl rand -hex 32` makes one"
        )
    return token


def resolve_settings(args: ServeArgs) -> ServeSection:
    """Return section `serve` of the model that these arguments name, with their changes. Raises InputError."""
    if args.pin and args.run is None:
        raise InputError("--pin needs a RUN to keep")
    store = open_store(args.store)
    if args.run is not None:
        section = Run.open(store, args.run).spec.serve
    else:
        registry = Registry(store)
        production = registry.state().production
        section = ServeSection() if production is None else registry.load(production).run_file().serve
    return with_settings(section, args.settings)
