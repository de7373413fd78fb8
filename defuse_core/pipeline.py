"""The whole method, one line per step (Figure 1, left to right)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from defuse_core.artifacts import (
    Corrections,
    Evaluation,
    Gallery,
    Health,
    Models,
    MoreImages,
    Psi,
    ReferenceSet,
    Scenarios,
    Sweep,
    Verdicts,
    Votes,
)
from defuse_core.data import reopen_splits
from defuse_core.distill.components import distill
from defuse_core.distill.draws import drop_with_few_units
from defuse_core.distill.sharded import distill_all
from defuse_core.errors import DamagedError, DataError, StoreError
from defuse_core.evaluation import Findings, evaluate, expect_same_code
from defuse_core.evaluation.controls import Controls, control_spec, folds, without_fold
from defuse_core.evaluation.evidence import Evidence, gather_evidence
from defuse_core.evaluation.health import expect_healthy, measure_perturbed
from defuse_core.evaluation.undecided import not_reviewed, worse_references
from defuse_core.export.finished import expect_no_version_of, registered_versions
from defuse_core.identify import SAMPLE_CODES
from defuse_core.models.adapters import CODE_ELSEWHERE
from defuse_core.protocols import Annotators, Call, Compute, SweepRequest
from defuse_core.report import Report, draw_report, store_report, write_report
from defuse_core.report.build import FinishedRun
from defuse_core.review.overrides import read_overrides
from defuse_core.review.sample import (
    Examiner,
    filter_corrections,
    sample_corrections,
    sample_gallery,
    sample_more_images,
    with_used_anchors,
)
from defuse_core.review.tighten import tighten
from defuse_core.review.verdicts import crowdlab_consensus, decide_verdicts, doubtful, expect_cleanlab
from defuse_core.runs import PLAIN_NAMES, Run
from defuse_core.train import train_side_by_side
from defuse_core.training.precision import resolve_precision
from defuse_core.training.reference_models import (
    ask_models_once,
    judges,
    reference_models,
    references_take_part,
    training_calls,
)
from defuse_core.tuning_data import choose_unreviewed, expect_training_images, reviewed_failures
from defuse_core.watch import FailureWatch, watch_run

log = logging.getLogger("defuse")
EVALUATION = "evaluation.safetensors"  # file of every finished run; deleted with the report
REPORT_SOURCES = (EVALUATION, "run.yaml")  # another version of either means another report
T = TypeVar("T")


def run_defuse(run: Run, compute: Compute, annotators: Annotators) -> Report:
    """Debug one classifier and return the report. Each artefact is made once per run."""
    if run.spec.review.consensus == "crowdlab":
        expect_cleanlab()  # now, not after people have answered
    resolve_precision(run, compute)
    spec, store = run.spec, run.store  # with the precision that was measured
    models, references = _healthy_models(run, compute)
    screen = references if spec.identify.screen == "reference-models" else None
    psi = run.once("identify", Psi, lambda: compute.identify(spec, models, store, screen))
    scenarios = run.once("distill", Scenarios, lambda: _scenarios(run, compute, psi, models, references))
    gallery = run.once("draw", Gallery, lambda: compute.task("draw", sample_gallery, spec, models, scenarios))
    votes = run.once("review", Votes, lambda: _votes(run, annotators, gallery))
    _expect_same_code(run, compute, models, gallery)
    verdicts = _verdicts_with_all_overrides(
        run, lambda: _verdicts(run, compute, models, scenarios, gallery, votes)
    )
    fixes = run.once(
        "correct",
        Corrections,
        lambda: _corrections(run, compute, models, references, psi, scenarios, verdicts),
    )
    reviewed = reviewed_failures(gallery, verdicts)
    if run.with_added is not None:
        compute.task("correct", expect_training_images, spec, models)  # before a result is deleted
        run.add_lambdas()
    sweeps = _sweeps(
        run,
        compute,
        "correct",
        models,
        baseline=SweepRequest(
            spec, fixes, reviewed, store.within("trials/baseline"), comparison="the baseline"
        ),
        sweep=SweepRequest(spec, fixes, None, store.within("trials/defuse")),
    )
    found = Findings(
        models,
        psi,
        scenarios,
        gallery,
        votes,
        verdicts,
        fixes,
        baseline=sweeps["baseline"],
        sweep=sweeps["sweep"],
        references=run.load(ReferenceSet, "references"),
        judges=judges(run, compute),
    )
    return write_report(run, _evaluations(run, compute, found, _controls(run, compute, found)))


def expect_may_go_on(run: Run) -> None:
    """Raise RunMismatchError for other images, and InputError for a λ that is added to the record of a version."""
    _expect_same_images(run)
    # a run that has neither has made no version: its name is that of one whose folder was removed
    if run.with_added and any(map(run.store.exists, ("gallery.safetensors", "sweep.safetensors"))):
        remedy = "copy its folder in the store, and change the copy (--name, or name= in Python)"
        expect_no_version_of(run.runs, run.name, registered_versions(run.runs), remedy)


def _expect_same_images(run: Run) -> None:
    """Raise RunMismatchError where a finished run's images, if they are on this machine, are others now.

    A step that is yet to be made notices that by itself, on the machine that reads the images.
    """
    root = run.spec.data.root
    if root is None or not run.store.exists(EVALUATION) or (models := run.load(Models)) is None:
        return
    with contextlib.suppress(DataError, OSError):  # they are not here, and nothing is computed from them
        if root.exists():
            reopen_splits(run.spec.with_fields("data", download=False), models.data_fingerprint)


def _expect_same_code(run: Run, compute: Compute, models: Models, gallery: Gallery) -> None:
    """Raise RunMismatchError where the classifier's code, or its package, has changed, before it is computed with."""
    last = (
        EVALUATION,
        "failurewatch.safetensors",
        *(["evidence.safetensors"] if run.spec.judges.count else []),
    )
    is_finished = run.with_added is None and all(map(run.store.exists, last))
    if run.spec.classifier.architecture in CODE_ELSEWHERE and not is_finished:
        compute.task("review", expect_same_code, run.spec, models, gallery)


def _healthy_models(run: Run, compute: Compute) -> tuple[Models, ReferenceSet | None]:
    """Return what is trained, once `expect_healthy` accepts the β-VAE, and the reference models if they take part.

    With vae.decode: anchored its health is what the reference models answer on perturbed images.
    """
    spec, store = run.spec, run.store
    models = run.once("train", Models, lambda: train_side_by_side(spec, store, compute, training_calls(run)))
    anchored = spec.vae.decode == "anchored"
    if run.until != "train" and not anchored:
        expect_healthy(spec, models)
    references = reference_models(run, compute) if references_take_part(spec) else None
    if (worse := worse_references(spec, models, references)) is not None and run.load(Psi) is None:
        log.warning("train: %s", worse)
    if anchored and references is not None:
        measure = partial(compute.task, "train", measure_perturbed, spec, models, references)
        models = replace(models, health=run.once("train", Health, measure))
    if run.until != "train" and anchored:
        expect_healthy(spec, models, worse)
    return models, references


def _evaluations(run: Run, compute: Compute, found: Findings, controls: Controls | None) -> FinishedRun:
    """Score the classifiers, measure the watch and ask the judges, at the same time where there is room."""
    spec = run.spec
    calls: dict[str, tuple[type[Any], Call[Any]]] = {
        "evaluation": (Evaluation, Call(evaluate, spec, found, run.store)),
        "failurewatch": (FailureWatch, Call(watch_run, spec, found.models, found.sweep.weights)),
    }
    if controls is not None:
        calls["evidence"] = (Evidence, Call(gather_evidence, spec, found, controls))

    def make(names: Sequence[str]) -> list[Any]:
        return compute.tasks("report", [calls[name][1] for name in names])

    made = _once_each(run, "report", {name: kind for name, (kind, _) in calls.items()}, make)
    return FinishedRun(found, made["evaluation"], run.load(Evidence), made["failurewatch"])


def _controls(run: Run, compute: Compute, found: Findings) -> Controls | None:
    """Fine-tune the controls that the correction is compared with; None with judges.count 0, and with evidence made."""
    if found.judges is None or run.load(Evidence) is not None:
        return None
    spec, fixes = run.spec, found.fixes
    tuned = [f"left_out_{fold}" for fold in folds(fixes, found.sweep)]
    requests, what = {}, "a control of the evidence"
    plain = control_spec(spec, 0.0, found.sweep)
    trials = f"{plain.correct.epochs}-epochs"  # after an added λ perhaps others, which these cannot be continued to
    without = replace(fixes, unreviewed=None)  # with λ = 0 no image of D_f is seen
    for number, name in enumerate(PLAIN_NAMES):
        store = run.store.within(f"trials/{name}/{trials}")
        requests[name] = SweepRequest(plain, without, None, store, fixes, number, what)
    for fold, name in enumerate(tuned):
        assert found.sweep.chosen is not None
        again = control_spec(spec, found.sweep.chosen.lam, found.sweep)
        store, kept = run.store.within(f"trials/{name}/{trials}"), without_fold(found, fold)
        requests[name] = SweepRequest(again, kept, None, store, fixes, comparison=what)
    made = _sweeps(run, compute, "report", found.models, **requests)
    return Controls(tuple(made[name] for name in PLAIN_NAMES), tuple(made[name] for name in tuned))


def _sweeps(
    run: Run, compute: Compute, step: str, models: Models, **requests: SweepRequest
) -> dict[str, Sweep]:
    """Return sweeps by their names in the run; their trials are run together."""

    def make(names: Sequence[str]) -> list[Sweep]:
        return compute.sweeps(models, [requests[name] for name in names])

    return _once_each(run, step, dict.fromkeys(requests, Sweep), make)


def _once_each(
    run: Run, step: str, kinds: Mapping[str, type[T]], make: Callable[[Sequence[str]], Sequence[T]]
) -> dict[str, T]:
    """Return artefacts by their names in the run. Those that are not stored are made together, by make(names)."""
    made: dict[str, T] = {}

    def one(name: str) -> T:
        if not made:
            missing = [each for each, kind in kinds.items() if run.load(kind, each) is None]
            made.update(zip(missing, make(missing), strict=True))
        return made[name]

    return {name: run.once(step, kind, partial(one, name), name) for name, kind in kinds.items()}


def _scenarios(
    run: Run, compute: Compute, psi: Psi, models: Models, references: ReferenceSet | None
) -> Scenarios:
    """Distill Ψ and, with review.tau: auto, give each component its own τ."""
    if run.spec.distill.max_codes is None and psi.total > SAMPLE_CODES:
        scenarios = distill_all(run.spec, psi, run.store, models.data_fingerprint, compute)
    else:
        scenarios = compute.task("distill", distill, run.spec, psi, run.store, models.data_fingerprint)
    if run.spec.review.tau == "auto" and references is not None:
        scenarios = tighten(Examiner(run.spec, models, references, scenarios), compute)
    # after the taus: a component on which the classifier is right is dropped as "right", not as "uncertain"
    scenarios = drop_with_few_units(scenarios, run.spec.review.least_units)
    if (lack := not_reviewed(scenarios)) is not None:
        log.info("%s", lack)
    return scenarios


def _votes(run: Run, annotators: Annotators, gallery: Gallery) -> Votes:
    """Ask the annotators. Raises DamagedError where verdicts exist: people may have answered otherwise since then."""
    if run.spec.review.annotators == "label-studio" and run.store.exists("verdicts.safetensors"):
        raise DamagedError(
            f"{run.store.address}/votes.safetensors: expected the votes that the verdicts were made from, found none; "
            f"restore the file, or give `{run.command('review reopen', '--discard')}`: the next `defuse run` takes in "
            "all answers that there are then"
        )
    return annotators.review(gallery)


def _verdicts_with_all_overrides(run: Run, decide: Callable[[], Verdicts]) -> Verdicts:
    """Return the run's verdicts. Decide again where a person overrode one after `decide` had read the overrides.

    That decision was accepted, since the run had no verdicts; once anything follows from them, they stay.
    """
    verdicts = run.once("review", Verdicts, decide)
    while verdicts.overrides != read_overrides(run.store) and run.load(Corrections) is None:
        run.store.delete("verdicts.safetensors")
        verdicts = run.once("review", Verdicts, decide)
    return verdicts


def _verdicts(
    run: Run, compute: Compute, models: Models, scenarios: Scenarios, gallery: Gallery, votes: Votes
) -> Verdicts:
    """Decide on every component; where reference models annotate and doubt remains, again on more images."""
    review = run.spec.review
    consensus = None
    if review.consensus == "crowdlab":
        consensus = crowdlab_consensus(votes, ask_models_once(run, compute, gallery))
    decide = partial(decide_verdicts, review, gallery, votes, consensus=consensus)
    first = decide(read_overrides(run.store))
    unsure = doubtful(first, review.rho)
    if not review.decides_twice or not unsure.any():
        return first
    examiner = Examiner(run.spec, models, reference_models(run, compute), scenarios)
    more = run.once(
        "review", MoreImages, lambda: compute.task("review", sample_more_images, examiner, unsure)
    )
    return decide(read_overrides(run.store), more=more)  # people may have decided in the meantime


def _corrections(
    run: Run,
    compute: Compute,
    models: Models,
    references: ReferenceSet | None,
    psi: Psi,
    scenarios: Scenarios,
    verdicts: Verdicts,
) -> Corrections:
    """Sample D_f; with correct.filter, keep what the reference models agree on, and add failures nobody reviewed."""
    spec = run.spec
    fixes = sample_corrections(spec, scenarios, verdicts)
    if spec.correct.filter == "none" or references is None:
        return with_used_anchors(fixes)
    examiner = Examiner(spec, models, references, scenarios)
    fixes = with_used_anchors(filter_corrections(examiner, fixes, compute))
    if spec.identify.screen == "none" or not spec.correct.unreviewed or not len(fixes.labels):
        return fixes
    return replace(fixes, unreviewed=choose_unreviewed(examiner, psi, run.store, verdicts, compute))


def rewrite_report(run: Run) -> Report:
    """Rewrite the report of a finished run from its artefacts and return it.

    It is not written where the run is deleted or changed meanwhile: nobody holds its lock. Raises InputError if
    unfinished, DamagedError where the manifest is damaged.
    """
    made_from = [run.store.version(key) for key in REPORT_SOURCES]
    report, page = draw_report(run, load_finished(run))
    try:
        if [run.store.version(key) for key in REPORT_SOURCES] == made_from:
            store_report(run, report, page)
        else:
            log.warning(
                "the page is not written again, since results or settings of the run were deleted or changed meanwhile"
            )
    except StoreError as error:
        log.warning("the page is not written again, since the store cannot be written: %s", error)
    return report


def load_finished(run: Run) -> FinishedRun:
    """Return all that a finished run holds. Raises InputError where the run is not finished."""
    return FinishedRun(
        Findings.load(run), run.require(Evaluation), run.load(Evidence), run.load(FailureWatch)
    )
