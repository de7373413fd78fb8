"""Sections of the page: how the failures were found, how good the β-VAE is, and how the run was made."""

from __future__ import annotations

from defuse_core.config import RunFile, dump_run_file
from defuse_core.report import Report
from defuse_core.report.formatting import (
    count_of,
    duration,
    percent,
    size,
)
from defuse_core.report.html.markup import (
    Child,
    Markup,
    figures_list,
    folded,
    join,
    table,
    tag,
)
from defuse_core.report.html.results import Pictures, picture_card


def latent_section(report: Report, pictures: Pictures) -> Markup:
    """Figure 2, and what identification and distillation counted."""
    psi, mixture = report.psi, report.mixture
    figures: list[tuple[str, Child]] = [
        ("failing codes (Ψ)", f"{psi.codes:,}"),
        ("decodings", f"{psi.decodings:,}"),
        ("images with any failure", percent(psi.images_with_any)),
        ("wrong without noise", percent(psi.zero_noise_flip_rate)),
        ("codes fitted", f"{mixture.codes_used:,}"),
        ("components kept", f"{report.scenarios.components} of {len(mixture.weights)}"),
        ("mixture", "converged" if mixture.converged else "NOT converged"),
        ("iterations", mixture.iterations),
    ]
    warning = None if mixture.converged else _unconverged(mixture.iterations)
    cards = (picture_card(pictures, name) for name in ("latent", "weights"))
    return join([figures_list(figures), warning, *cards])


def _unconverged(iterations: int) -> Markup:
    text = f" after {count_of(iterations, 'iteration')}. Set distill.max_iterations higher."
    return tag("p", tag("b", "The mixture's fit had not converged"), text, class_="note")


def vae_section(report: Report, pictures: Pictures) -> Markup:
    """How good the β-VAE is, which decides how much of the review is spent on real failures."""
    vae, votes = report.vae, report.votes
    figures: list[tuple[str, Child]] = [
        ("reconstructions already wrong", percent(vae.reconstruction_flips)),
        ("reviewed images that do fail", percent(votes.misclassified)),
        ("squared error per pixel", f"{vae.reconstruction:.4f}"),
        ("collapsed dimensions", f"{vae.collapsed} of {len(vae.kl_per_dimension)}"),
    ]
    cards = (picture_card(pictures, name) for name in ("kl", "curves"))
    return join([_spent_in_vain(report), figures_list(figures), *cards])


def _spent_in_vain(report: Report) -> Markup | None:
    failing = report.votes.misclassified
    if failing is None:
        return None
    return tag(
        "p",
        f"Of the reviewed images with a label, {percent(1 - failing, 0)} were classified as the annotators "
        "see them: time spent in vain. A sharper β-VAE lowers that share: now the classifier already gets "
        f"{percent(report.vae.reconstruction_flips)} of the training images wrong "
        "once they are encoded and decoded.",
    )


def making_section(report: Report, spec: RunFile) -> Markup:
    """Times, sizes, versions and the run file."""
    making = report.making
    images = ", ".join(f"{count:,} {split}" for split, count in report.run.images.items())
    figures: list[tuple[str, Child]] = [
        ("data set", report.run.dataset),
        ("images", images),
        ("seed", report.run.seed),
        ("time, all steps", duration(sum(artefact.seconds for artefact in making.artefacts))),
    ]
    if making.device:
        figures.append(("device", making.device))
    if making.decodings_per_second:
        figures.append(("decodings per second and worker", f"{making.decodings_per_second:,.0f}"))
    rows = (
        (a.step, a.name, a.made.replace("T", " ").replace("Z", ""), duration(a.seconds), size(a.bytes))
        for a in making.artefacts
    )
    versions = " · ".join(f"{name} {version}" for name, version in making.versions.items())
    return join(
        [
            figures_list(figures),
            table(("Step", "Artefact", "Made (UTC)", "Time", "Size"), rows, 3) if making.artefacts else None,
            tag("p", versions, class_="quiet") if versions else None,
            folded("The run file, every field written out", tag("pre", dump_run_file(spec))),
        ]
    )
