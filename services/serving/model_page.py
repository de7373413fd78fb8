"""GET /v1/model: what answers, and what is known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from services.serving.predict import Served

if TYPE_CHECKING:
    from services.serving.server import Server


class Scenario(BaseModel):
    scenario: int
    name: str
    fixed: bool
    accuracy_before: float = Field(description="on images of the scenario that nothing was tuned on")
    accuracy_after: float
    watched_share: float = Field(description="share of the training images that the watch takes to lie in it")
    watched_recall: float = Field(description="share of the scenario's own held-out images that it finds")


class ModelPage(BaseModel):
    version: str
    run: str
    by: str = Field(description="who put it into production; empty where it was not promoted")
    when: str = Field(description="when it was put there; where it was not promoted, when it was checked")
    why: str
    lam: float | None = Field(description="weight of the failure scenarios in the fine-tuning")
    annotators: str = Field(description="who labelled its scenarios: people, or reference models")
    clean_split: str = Field(description="which images clean accuracy was measured on")
    clean_accuracy_before: float
    clean_accuracy_after: float
    scenario_accuracy_before: float
    scenario_accuracy_after: float
    classes: list[str]
    channels: int
    image_size: int
    resize: bool = Field(description="whether pictures of other sizes and colours are brought to these")
    watch: bool
    scenarios: list[Scenario]
    failed_checks: list[str] = Field(description="checks that it was let in in spite of")
    canary: str | None
    canary_share: float
    shadow: str | None
    device: str
    precision: str


def model_page(server: Server) -> ModelPage:
    """Return the page of the version in production. Raises Refused while there is none."""
    expected = server.expected()
    lineup = server.lineup
    served = lineup.production
    assert served is not None
    candidate, facts, standing = served.candidate, served.candidate.facts, lineup.standing
    since = standing.since if served.name == str(standing.production) else None
    return ModelPage(
        version=served.name,
        run=candidate.run,
        by=since.by if since else "",
        when=since.when if since else facts.get("made", ""),
        why=since.why if since else "",
        lam=facts["lam"],
        annotators=facts["annotators"],
        clean_split=facts["clean_split"],
        clean_accuracy_before=facts["clean_before"],
        clean_accuracy_after=facts["clean_after"],
        scenario_accuracy_before=facts["scenario_before"],
        scenario_accuracy_after=facts["scenario_after"],
        classes=list(candidate.classes),
        channels=expected.channels,
        image_size=expected.size,
        resize=expected.resize,
        watch=served.watch is not None,
        scenarios=_scenarios(served, served.settings.watch_share),
        failed_checks=candidate.failed(),
        canary=lineup.canary.name if lineup.canary else None,
        canary_share=lineup.share,
        shadow=lineup.shadow.name if lineup.shadow else None,
        device=served.device.type,
        precision=served.settings.precision,
    )


def _scenarios(served: Served, share: float) -> list[Scenario]:
    import numpy as np

    candidate = served.candidate
    return [
        Scenario(
            scenario=int(candidate.scenario[j]),
            name=name,
            fixed=bool(served.fixed[j]),
            accuracy_before=float(candidate.before[j]),
            accuracy_after=float(candidate.after[j]),
            watched_share=share,
            watched_recall=float(np.interp(share, candidate.levels, candidate.recall[j])),
        )
        for j, name in enumerate(served.scenario_names)
    ]
