from __future__ import annotations

import pytest


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without its figures, which take longer than all else: for tests of what is written there."""
    monkeypatch.setattr("defuse_core.report.figures.draw_figures", lambda *_: {})
