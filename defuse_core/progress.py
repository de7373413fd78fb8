"""How a step reports its progress. The display computes the rate and the time left."""

from functools import partial
from typing import Protocol


class Progress(Protocol):
    """`progress("fitting the β-VAE", 3, 10, "epochs")`: 3 of 10 epochs are done.

    Tasks that share an activity report what each of them has done, and the total of all.
    """

    def __call__(self, what: str, done: int, total: int, unit: str) -> None: ...


def silent(what: str, done: int, total: int, unit: str) -> None:
    """A Progress that shows nothing."""


class ProgressSum:
    """Adds up what the tasks that share an activity have done, and reports the sum."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.done: dict[str, dict[int, int]] = {}  # activity -> task -> what it has done

    def of(self, task: int) -> Progress:
        """Return the `Progress` of one task."""
        return partial(self.update, task)

    def update(self, task: int, what: str, done: int, total: int, unit: str) -> None:
        """Report what all tasks have done of `what`, now that `task` has done `done`."""
        done_by_task = self.done.setdefault(what, {})
        done_by_task[task] = done
        self.progress(what, sum(done_by_task.values()), total, unit)
