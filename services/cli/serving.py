"""`defuse check`, `promote`, `rollback` and `serve`."""

import click


@click.command()
def check() -> None:
    """Check a run's corrected model."""


@click.command()
def promote() -> None:
    """Put a run's corrected model into production."""


@click.command()
def rollback() -> None:
    """Put the version before back into production."""


@click.command()
def serve() -> None:
    """Serve a corrected model over HTTP."""
