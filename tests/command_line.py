"""Run a command of `defuse` in this process, and a small data file to give it."""

import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from services.cli import main


def call(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Run one command in this process; return exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["defuse", *map(str, args)])
    log = logging.getLogger("defuse")
    level = log.level
    with pytest.raises(SystemExit) as ended:
        main()
    log.setLevel(level)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def one_line(err: str) -> str:
    """The only line on stderr that is not a log line."""
    lines = [line for line in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def npz(path: Path, **changes: object) -> Path:
    arrays = {
        "train_images": np.zeros((40, 16, 16), np.uint8),
        "train_labels": np.arange(40) % 4,
        "test_images": np.zeros((8, 16, 16), np.uint8),
        "test_labels": np.arange(8) % 4,
    }
    np.savez(path, **{**arrays, **changes})
    return path
