"""What people change beside their votes: decisions that override a verdict, and votes that are reopened."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from defuse_core.artifacts import Gallery, Override, Verdicts
from defuse_core.errors import DamagedError, InputError
from defuse_core.formatting import first_few
from defuse_core.runs import CONTINUES, FROM_VERDICTS, Run, utc_now
from defuse_core.store import Store

OVERRIDES = "overrides/"  # human decisions that replace the vote, one object each, from overrides/0001.json
FROM_VOTES = ("votes", *FROM_VERDICTS)
TRIALS = ("trials/",)


def read_overrides(store: Store) -> tuple[Override, ...]:
    """Return the human decisions of a run, oldest first. Raises DamagedError for a file that is no decision."""
    found = (_read_override(store, key) for key in store.list(OVERRIDES))
    return tuple(entry for entry in found if entry is not None)


def _read_override(store: Store, key: str) -> Override | None:
    """Return one decision; None where override_verdict has deleted it since it was listed."""
    try:
        return TypeAdapter(Override).validate_json(store.read(key))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedError(
            f"{store.address}/{key}: expected a decision with scenario, label, author, reason and when, found "
            f"{error.errors()[0]['msg']}; delete the file and record the decision again with `defuse review set`"
        ) from error


def _judged_without(run: Run, entry: Override) -> bool:
    verdicts = run.load(Verdicts)
    return verdicts is not None and entry not in verdicts.overrides


def override_verdict(
    run: Run,
    scenario: int,
    label: str | None,
    *,
    author: str,
    reason: str,
    redo: bool = False,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Store that `scenario` has `label` (a class's name or index), or is rejected (None); return a sentence about it.

    Raises InputError for an unknown scenario or class, and if the run already has verdicts: `redo` deletes them and
    what follows from them, and `defuse run` makes that again. Nothing is deleted where `check` raises an error.
    """
    gallery = run.load(Gallery)
    if gallery is None:
        raise run.incomplete_error(f"has no scenarios yet; {CONTINUES}")
    if not 0 <= scenario < len(gallery):
        raise InputError(f"scenario {scenario}: run {run.name} has scenarios 0 to {len(gallery) - 1}")
    if not reason.strip():
        raise InputError("--reason: expected a sentence for the readers of the report, found none")
    index = None if label is None else class_index(label, gallery.classes)
    when = utc_now()
    entry = Override(scenario, index, author, " ".join(reason.split()), when)
    if run.load(Verdicts) is None:
        key = _store(run, entry)
        if _judged_without(run, entry):  # a driver has judged in the meantime
            run.store.delete(key)
            if _judged_without(run, entry):
                raise InputError(_judged_message(run))
            _store(run, entry)  # the driver had read it before, and judged again with it
    elif redo:
        with run.store.lock():
            check()
            run.delete(FROM_VERDICTS, TRIALS)
            # Last: beside verdicts that were made without it, it would be recorded and ignored.
            _store(run, entry)
    else:
        raise InputError(_judged_message(run))
    return f"scenario {scenario} is " + (
        "rejected" if index is None else f"a failure: {gallery.classes[index]}"
    )


def class_index(label: str, classes: tuple[str, ...]) -> int:
    """Return the class called `label`, or else of that index. Raises InputError."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    shown = first_few(classes, most=12)
    raise InputError(f"--label {label}: expected a class or its index, of 0 to {len(classes) - 1} ({shown})")


def _store(run: Run, entry: Override) -> str:
    """Store the decision beside all others, and return its key: of two that are made at once, both count."""
    numbers = [int(found[0]) for key in run.store.list(OVERRIDES) if (found := re.search(r"\d+", key))]
    number = max(numbers, default=0) + 1
    while not run.store.create(f"{OVERRIDES}{number:04d}.json", json.dumps(asdict(entry), indent=1).encode()):
        number += 1
    return f"{OVERRIDES}{number:04d}.json"


def _judged_message(run: Run) -> str:
    return (
        f"run {run.name} has its verdicts already, and maybe a corrected model; --redo deletes these, and "
        "`defuse run` makes them again with this change"
    )


def reopen_vote(run: Run, check: Callable[[], None] = lambda: None) -> None:
    """Delete the votes and what follows from them, so that `defuse run` takes in all answers that people have given.

    Raises InputError if the run has no votes yet, or if reference models gave them. Nothing is deleted where `check`
    raises an error.
    """
    if run.spec.review.annotators != "label-studio":
        raise InputError(f"run {run.name} asks reference models; only a vote of people can be reopened")
    if not any(map(run.store.exists, ("votes.safetensors", "verdicts.safetensors"))):
        raise InputError(f"the vote of run {run.name} is still open: all answers will count")
    with run.store.lock():
        check()
        run.delete(FROM_VOTES, TRIALS)
