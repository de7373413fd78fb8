"""Keeping Label Studio's queue to what is still wanted: it knows of no decided scenario and no refusal."""

from __future__ import annotations

import logging

import numpy as np

from services.labeling.answers import Slot
from services.labeling.client import Server
from services.labeling.standing import Standing

log = logging.getLogger("defuse")


def tend_queue(server: Server, standing: Standing) -> None:
    """Take decided tasks out of the queue and put those back that are short of answers.

    A task is short although Label Studio calls it done when an annotation was refused, or when a changed
    answer opened a scenario again that had been decided.
    """
    changed, seen = 0, np.zeros(len(standing.samples), bool)
    for slot in standing.pulled.slots:
        overlap, labeled = _target(standing, slot, copy=bool(seen[slot.number]))
        seen[slot.number] = True
        if (overlap, labeled) != (slot.overlap, slot.labeled):
            server.set_overlap(slot.task, overlap, labeled)
            changed += 1
    if changed:
        log.info("review: took tasks out of the queue or put them back, %d in all", changed)


def _target(standing: Standing, slot: Slot, copy: bool) -> tuple[int, bool]:
    """Return the overlap that the task should have, and whether it should be out of the queue.

    `copy`: another one of the same image came before.
    """
    missing = standing.samples.review.answers_per_task - int(standing.given_per_task[slot.number])
    if copy or missing <= 0 or standing.decided[standing.samples.place(slot.number).scenario]:
        return (slot.overlap, True) if slot.labeled else (max(slot.submitted, 1), True)
    return slot.submitted + missing, False  # an annotation that does not count takes a place all the same
