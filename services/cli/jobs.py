"""`defuse submit` and `defuse jobs ...`."""

import click


@click.command()
def submit() -> None:
    """Run a run file as a job on a Ray cluster."""


@click.group()
def jobs() -> None:
    """See and stop submitted jobs."""
