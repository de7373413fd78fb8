"""Find the regions where an image classifier is wrong, have them labelled, and fix the classifier there.

    import defuse_core as defuse

    run = defuse.debug(classifier, train=(images, labels), store="runs", name="parts")
    run.scenarios.to_frame()
    net = run.corrected()

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from defuse_core.api import debug, open
    from defuse_core.errors import DefuseError, LabelsPending
    from defuse_core.results import RealImages, RunResult, ScenarioList, ScenarioView

__all__ = [
    "DefuseError",
    "LabelsPending",
    "RealImages",
    "RunResult",
    "ScenarioList",
    "ScenarioView",
    "debug",
    "open",
]

# the others are in results
_MODULES = {"debug": "api", "open": "api", "DefuseError": "errors", "LabelsPending": "errors"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"defuse_core.{_MODULES.get(name, 'results')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
