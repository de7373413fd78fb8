"""Failures, components, rules of review and the health of a β-VAE, for tests that are about something else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from defuse_core.artifacts import Failures, Health, Scenarios
from defuse_core.config import ReviewSection

FIT = Health(1000, 0.99, 0.98, 0.98, 3, 0.1, 2, 10, "fit")  # health of a β-VAE


def sample_failures(*given: Any, **named: Any) -> Failures:
    """Failures with these fields; else f gets no source image itself wrong."""
    fields = _by_name(Failures, given, named)
    return Failures(**{"source_wrong": np.zeros(len(fields["codes"]), np.bool_)} | fields)


def sample_scenarios(*given: Any, **named: Any) -> Scenarios:
    """Components with these fields; else of a single mixture, and without a source image that f gets wrong."""
    fields = _by_name(Scenarios, given, named)
    count, width = fields["means"].shape
    dropped = len(fields["all_weights"]) - count
    eyes = np.broadcast_to(np.eye(width), (dropped, width, width))
    filled = {
        "cells": np.full((count, 2), -1),
        "support": np.zeros(count, np.int64),
        "source_error": np.zeros(count),
        "all_means": np.concatenate([fields["means"], np.zeros((dropped, width))]),
        "all_covariances": np.concatenate([fields["covariances"], eyes]),
    }
    return Scenarios(**filled | fields)


def _by_name(kind: type, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    return dict(zip(names, given, strict=False)) | named


def review_section(rho: float = 0.5, max_false: float | None = None) -> ReviewSection:
    """Return the paper's rule; with `max_false` one decision at that false discovery rate."""
    if max_false is None:
        return ReviewSection(rho=rho, accept="share")
    return ReviewSection(rho=rho, max_false=max_false, more_images=0)
