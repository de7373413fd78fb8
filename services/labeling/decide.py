"""A human decision above the vote: recorded with author and reason, and stated in the report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from defuse_core.artifacts import Gallery, Override, Verdicts
from defuse_core.errors import InputError
from defuse_core.judge import OVERRIDES
from defuse_core.runs import Run

# What follows from the verdicts, in the order in which it is made; all else of a run stays.
FROM_VERDICTS = ("verdicts", "corrections", "baseline", "sweep", "evaluation")
FILES_FROM_VERDICTS = ("trials/", "report.json", "report.html", "figures/")


def decide(run: Run, scenario: int, label: str | None, author: str, reason: str, redo: bool = False) -> str:
    """Record that `scenario` has `label` (a class's name or index), or is rejected (None); return it in words.

    Raises InputError for an unknown scenario or class, and where the verdicts are made already: `redo` forgets them
    and what follows from them, and `defuse run` makes that again.
    """
    gallery = run.load(Gallery)
    if gallery is None:
        raise InputError(
            f"run {run.name} has no scenarios yet; `defuse status {run.name}` shows how far it is"
        )
    if not 0 <= scenario < len(gallery):
        raise InputError(f"scenario {scenario}: run {run.name} has scenarios 0 to {len(gallery) - 1}")
    if not reason.strip():
        raise InputError("--reason: say why, for whoever reads the report")
    number = None if label is None else class_number(label, gallery.classes)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = Override(scenario, number, author, " ".join(reason.split()), when)
    if run.load(Verdicts) is None:
        _record(run, entry)
        verdicts = run.load(Verdicts)  # a driver may have judged meanwhile
        if verdicts is not None and entry not in verdicts.overrides:
            raise InputError(_judged(run))
    elif redo:
        with run.store.lock():
            _record(run, entry)
            _forget_verdicts(run)
    else:
        raise InputError(_judged(run))
    return f"scenario {scenario} is " + (
        "rejected" if number is None else f"a failure: {gallery.classes[number]}"
    )


def class_number(label: str, classes: tuple[str, ...]) -> int:
    """Return the class called `label`, or else of that index. Raises InputError."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    raise InputError(f"--label {label}: expected a class or its index, of 0 to {len(classes) - 1} ({shown})")


def _record(run: Run, entry: Override) -> None:
    """Write the decision down beside all others: two that are made at once both count."""
    number = len(run.store.list(OVERRIDES)) + 1
    while not run.store.create(f"{OVERRIDES}{number:04d}.json", json.dumps(asdict(entry), indent=1).encode()):
        number += 1


def _judged(run: Run) -> str:
    return (
        f"run {run.name} has its verdicts already, and maybe a corrected model; --redo forgets these, and "
        "`defuse run` makes them again with this decision"
    )


def _forget_verdicts(run: Run) -> None:
    """The verdicts go last: cut off, the same command goes on."""
    doomed = [key for key in run.store.list() if key.startswith(FILES_FROM_VERDICTS)]
    for key in (*doomed, *(f"{key}.safetensors" for key in reversed(FROM_VERDICTS))):
        run.store.delete(key)
    manifest = run.manifest()
    for key in FROM_VERDICTS:
        manifest["artefacts"].pop(key, None)
    run.store.write("manifest.json", json.dumps(manifest, indent=1).encode())
