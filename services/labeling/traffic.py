"""Reviews of inputs that a server received and that were in a failure scenario of its run.

    <run>/traffic-1/     run.yaml, the Gallery of inputs, the state of the project, votes and verdicts

Each is a review of its own with a project of its own; the run itself stays as it is.
"""

from __future__ import annotations

import re

from defuse_core.artifacts import Gallery, Verdicts, Votes
from defuse_core.errors import InputError
from defuse_core.runs import Run
from defuse_core.store import Store
from defuse_core.verdicts import decide_verdicts
from services.labeling.state import ProjectState
from services.labeling.status import ReviewStatus


def traffic_reviews(store: Store, run: str) -> list[str]:
    """Return the names of the run's reviews of traffic, oldest first: mnist/traffic-1, mnist/traffic-2, ..."""
    folder = store.within(run)
    found = (re.match(r"traffic-(\d+)/gallery\.safetensors$", key) for key in folder.list("traffic-"))
    return [f"{run}/traffic-{number}" for number in sorted(int(match[1]) for match in found if match)]


def open_traffic_review(store: Store, run: Run) -> Run:
    """Return the review of traffic that is not finished yet, or a new one of inputs that no review has shown.

    Raises InputError if no scenario has as many such inputs as run.spec.review.images.
    """
    from services.serving.traffic import read_traffic

    known = [Run.open(store, name) for name in traffic_reviews(store, run.name)]
    if known and known[-1].load(Votes) is None:
        return known[-1]
    shown = {
        image.tobytes() for review in known for scenario in _gallery(review).images for image in scenario
    }
    traffic, wanted = read_traffic(store, run.name), run.spec.review.images
    gallery = traffic.without(shown).gallery(wanted)
    if not len(gallery):
        raise InputError(
            f"no scenario of run {run.name} has {wanted} inputs that were not reviewed yet, of {len(traffic)} kept; "
            "serve it with a larger `serve.reservoir`, or wait for more traffic"
        )
    # Every input is asked about, not only as many as a verdict needs: it measures the served model.
    changes = {
        "annotators": "label-studio",
        "prelabel": False,
        "stop_early": False,
        "accept": "share",  # a report on the served model, not a decision about a scenario
        "consensus": "majority",
    }
    spec = run.spec.model_copy(update={"review": run.spec.review.model_copy(update=changes)})
    number = int(known[-1].name.rpartition("-")[2]) + 1 if known else 1
    review = Run.start(store, f"{run.name}/traffic-{number}", spec)
    review.once("draw", Gallery, lambda: gallery)
    return review


def store_traffic_verdicts(review: Run, status: ReviewStatus, state: ProjectState) -> Verdicts:
    """Store the votes of a review of traffic and the verdicts that follow from them, once all answers are in."""
    votes = review.once("review", Votes, lambda: status.final_votes(state))
    gallery = status.tasks.gallery
    return review.once("review", Verdicts, lambda: decide_verdicts(gallery, votes, review.spec.review.rho))


def _gallery(review: Run) -> Gallery:
    gallery = review.load(Gallery)
    assert gallery is not None  # traffic_reviews lists no others
    return gallery
