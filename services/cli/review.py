"""`defuse review ...` and `defuse label-studio ...`."""

import click


@click.group()
def review() -> None:
    """See and steer the review of a run's scenarios by people."""


@click.group(name="label-studio")
def label_studio() -> None:
    """A Label Studio server on this machine, for trying it out."""
