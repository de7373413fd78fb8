"""The figures that the READMEs promise are those of the code."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cluster import connection, resources
from defuse_core import codec, identify, training, watch
from defuse_core.artifacts import Failures
from defuse_core.config import ServeSection
from defuse_core.data.images import FilePaths
from defuse_core.export import suite
from defuse_core.report import schema
from defuse_core.training import precision
from services.cli import CLOSED_PIPE, console
from services.labeling import records
from services.serving import active_versions, candidate, inputs, limits, registry_state
from services.storage import lease
from tests.conftest import ROOT

SERVE = ServeSection()
LISTED = (
    FilePaths.pack(["a/long.png", "a/b.png"]).names.itemsize + np.dtype(np.int64).itemsize
)  # with its label
BESIDE_CODES = [
    found for name, found in vars(Failures.none(1)).items() if found is not None and name != "codes"
]
FIGURES = [
    ("services/serving", r"`serve\.min_compared` requests \((\d+)\)", SERVE.min_compared),
    ("services/serving", r"`serve\.watch_share` \(([\d.]+) %\)", 100 * SERVE.watch_share),
    ("services/serving", r"`serve\.failure_recall` \(([\d.]+)\)", SERVE.failure_recall),
    ("services/serving", r"`max_body_mb` \((\d+) x", SERVE.max_ongoing),
    ("services/serving", r"`max_body_mb` \(\d+ x (\d+) MB\)", SERVE.max_body_mb),
    ("services/serving", r"fewer than (\d+) wrong answers", watch.MIN_ANSWERS),
    ("services/serving", r"bound of the AUROC is below ([\d.]+)", watch.CHANCE),
    ("services/serving", r"with a probability of (\d+) % at most", 100 * active_versions.WRONGLY_ENDED),
    (
        "services/serving",
        r"A shadow computes for at most a (fifth) of the time",
        active_versions.SHADOW_TIME_SHARE,
    ),
    ("services/serving", r"(\d+) scans of a JPEG", inputs.MAX_JPEG_SCANS),
    ("services/serving", r"\| (\d+) s, \d+ connections per address", limits.HEADER_TIMEOUT_S),
    ("services/serving", r"\| \d+ s, (\d+) connections per address", limits.MAX_HEADERS_PER_ADDRESS),
    ("services/serving", r"while (\d+) such bodies are arriving", limits.MANY_SLOW_UPLOADS),
    ("cluster", r"rewritten every (\d+) s", lease.BEAT_S),
    ("cluster", r"free after (\d+) s without a change", lease.LEASE_S),
    ("cluster", r"the command fails after (\d+) s", connection.CONNECT_WITHIN_S),
    (
        "cluster",
        r"asks the cluster's autoscaler for one, and waits for up to (\d+) minutes",
        resources.NODES_JOIN_WITHIN_S / 60,
    ),
    ("cluster", r"at most (\d+) s and the current epoch are lost", training.CHECKPOINT_EVERY_S),
    ("cluster", r"A shard is at most 2\^(\d+) decodings", identify.SHARD_DECODINGS.bit_length() - 1),
    ("cluster", r"it becomes a line every (\d+) s", console.LINE_EVERY_S),
    (
        "cluster",
        r"An image takes (\d+) bytes and as many as the longest name has",
        LISTED - len("a/long.png"),
    ),
    ("cluster", r"4 Z \+ (\d+) bytes each", sum(found.dtype.itemsize for found in BESIDE_CODES)),
    ("services", r"\| (\d+) \| what the command printed was read no further", CLOSED_PIPE),
    ("defuse_core", r"largest error of that margin on (\d+) inputs", precision.MEASURED_INPUTS),
]


@pytest.mark.parametrize(("folder", "words", "value"), FIGURES, ids=[words for _, words, _ in FIGURES])
def test_a_figure_of_a_readme_is_that_of_the_code(folder: str, words: str, value: float) -> None:
    text = " ".join((ROOT / folder / "README.md").read_text(encoding="utf-8").split())
    found = re.search(words, text)
    assert found is not None
    assert (0.2 if found[1] == "fifth" else float(found[1])) == pytest.approx(value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (r"Artefacts have format (\d+)", codec.FORMAT),
        (r"Ψ and its shards (\d+)", codec.FORMATS["Psi"]),
        (r"Ψ and its shards (\d+)", codec.FORMATS["Shard"]),
        (r"`report\.json` version (\d+)", schema.VERSION),
        (r"`suite\.json` version (\d+)", suite.VERSION),
        (r"candidates format (\d+)", candidate.FORMAT),
        (r"the registry format (\d+)", registry_state.FORMAT),
        (r"`labeling\.json` version (\d+)", records.ProjectState.new("").version),
    ],
)
def test_a_format_in_the_changelog_is_that_of_the_code(words: str, value: int) -> None:
    text = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert re.findall(words, text) == [str(value)]
