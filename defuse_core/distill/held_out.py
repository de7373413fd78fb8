"""Which training images held-out draws are anchored at (vae.decode: anchored).

A unit is what photographs share: a track of images, or one image where there are no tracks. It is in the same half for
all components, so that none is tuned on by one component and held out by another.
"""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import I64, Bool, ComponentFailures, Scenarios
from defuse_core.errors import count_of

REPAIRS = 5000  # units that change halves at most
UNDIVIDED = "too few photographs to hold out"  # the reason why a component is dropped begins with it
SIDEWAYS = 0.1  # share of the repairs that change a random unit


def held_out_half(used: I64, units: int, rng: np.random.Generator) -> Bool:
    """Return which units held-out draws are anchored at, (units,).

    They are about half of those that each component uses, a row of `used` (S, L). Components of few units choose first;
    one of a single unit has none to hold out and does not choose. Where a component has all units in one half, units
    change halves until each has some in both, or until REPAIRS have.
    """
    several = [own for own in map(np.unique, used) if len(own) > 1]
    held, free = np.zeros(units, np.bool_), np.ones(units, np.bool_)
    for own in sorted(several, key=len):
        missing = max(0, len(own) // 2 - int(held[own].sum()))
        held[rng.permutation(own[free[own]])[:missing]] = True
        free[own] = False
    return _repaired(several, held, rng)


def _repaired(several: list[I64], held: Bool, rng: np.random.Generator) -> Bool:
    """Return the halves in which the fewest components are undivided, of those that a local search passes.

    The search is WalkSAT: a unit of a random undivided component changes halves, the one that leaves the fewest
    components undivided, or now and then a random one.
    """
    uses = np.zeros((len(several), len(held)), np.bool_)
    for component, own in enumerate(several):
        uses[component, own] = True
    size = uses.sum(axis=1)
    # (S,) units of each component that are held out
    count: I64 = (uses & held).sum(axis=1)
    best, fewest = held.copy(), len(held) + len(several)
    for _ in range(REPAIRS + 1):
        undivided = np.flatnonzero((count == 0) | (count == size))
        if len(undivided) < fewest:
            best, fewest = held.copy(), len(undivided)
        if not len(undivided):
            break
        own = several[rng.choice(undivided)]
        if rng.random() < SIDEWAYS:
            unit = rng.choice(own)
        else:
            # (S, n) held-out units of each component after the change of each of the n
            after = count[:, None] + uses[:, own] * np.where(held[own], -1, 1)
            left = ((after == 0) | (after == size[:, None])).sum(axis=0)
            unit = rng.choice(own[left == left.min()])
        held[unit] = ~held[unit]
        count = count + uses[:, unit] * (1 if held[unit] else -1)
    return best


def without_undivided(scenarios: Scenarios) -> Scenarios:
    """Return the components with photographs in both halves; the others become dropped ones.

    Those would be measured on the photographs that they are tuned on, or tuned on photographs that others are measured
    on.
    """
    failures = scenarios.failures
    if failures is None:
        return scenarios
    # (S, L) whether the image of a failure is held out
    held = failures.anchors.held_out[failures.anchor]
    undivided = held.all(axis=1) | ~held.any(axis=1)
    if not undivided.any():
        return scenarios
    dropped = [
        scenarios.dropped_component(component, f"{UNDIVIDED}: {_why_undivided(failures, component)}")
        for component in np.flatnonzero(undivided).tolist()
    ]
    return scenarios.take(np.flatnonzero(~undivided), dropped=(*scenarios.dropped, *dropped))


def _why_undivided(failures: ComponentFailures, component: int) -> str:
    units = len(np.unique(failures.anchors.unit[failures.anchor[component]]))
    what = "photograph" if failures.anchors.track is None else "track"
    return f"all are of one {what}" if units == 1 else f"other components share its {count_of(units, what)}"
