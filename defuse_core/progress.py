"""How a step reports its progress. The display computes the rate and the time left."""

from typing import Protocol


class Progress(Protocol):
    """`progress("fitting the β-VAE", 3, 10, "epochs")`: 3 of 10 epochs are done."""

    def __call__(self, what: str, done: int, total: int, unit: str) -> None: ...


def silent(what: str, done: int, total: int, unit: str) -> None:
    """A Progress that shows nothing."""
