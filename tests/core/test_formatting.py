"""Figures and sentences as people read them."""

from __future__ import annotations

import re

import pytest

from defuse_core.formatting import (
    change,
    class_difference,
    count_of,
    date_time,
    decimal,
    duration,
    first_few,
    lam_text,
    numbers_text,
    percent,
    size,
    text_of,
    unbroken,
)
from defuse_core.report.evidence_schema import Share
from tests.conftest import ROOT

MANY = tuple(f"c{number}" for number in range(2000))


def test_a_score_that_is_not_perfect_is_not_rounded_to_one():
    assert Share(value=0.9997, low=0.9991, high=1.0).as_decimal() == "0.9997 (0.999–1.000)"
    assert [decimal(value, 2) for value in (0.997, 0.97, 1.0, -0.05)] == ["0.997", "0.97", "1.00", "-0.05"]


def test_a_share_by_definition_has_no_interval():
    assert Share(value=0.0, low=None, high=None).text(0) == "0 %"
    assert Share(value=None, low=None, high=None).text() == "–"


def test_no_share_between_0_and_1_is_rounded_to_either():
    shown = ["0 %", "0.4 %", "7 %", "99.8 %", "99.96 %", "100 %"]
    assert [percent(share, 0) for share in (0.0, 0.004, 0.07, 0.998, 2559 / 2560, 1.0)] == shown
    assert [percent(share) for share in (0.001, 0.999, 0.5**11)] == ["0.1 %", "99.9 %", "0.05 %"]
    assert [percent(share, 2) for share in (1e-9, 1 - 1e-9)] == ["under 0.0001 %", "100.00 %"]
    assert Share(value=0.9996, low=0.998, high=1.0).text(0) == "99.96 % (99.80–100.00)"
    assert Share(value=0.9989, low=0.9973, high=1.0).text(0) == "99.9 % (99.7–100.0)"
    assert Share(value=1.0, low=0.92, high=1.0).text(0) == "100 % (92–100)"
    assert Share(value=0.9998, low=0.9996, high=0.99999).text() == "99.980 % (99.960–99.999)"
    assert Share(value=0.0, low=0.0, high=0.004).text(0) == "0.0 % (0.0–0.4)"


def test_a_percentage_has_a_space_and_as_many_digits_as_asked_for():
    assert [percent(0.125, digits) for digits in (0, 1, 2)] == ["12 %", "12.5 %", "12.50 %"]
    assert [percent(share, None) for share in (0.05, 0.125)] == ["5 %", "12.5 %"]
    assert percent(None) == "–"


def test_no_source_writes_a_percentage_in_another_way():
    packages = ("defuse_core", "cluster", "services")
    sources = [
        file for name in packages for file in (ROOT / name).rglob("*") if file.suffix in {".py", ".j2"}
    ]
    other = re.compile(r":[^{}\s:]*%\}")
    assert other.search("{0.5:.1%}") and other.search("{0.5:>6.0%}")
    assert len(sources) > 100
    assert [file for file in sources if other.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("lam", "text"),
    [(0.0, "0"), (1e-10, "10⁻¹⁰"), (2.5e-7, "2.5·10⁻⁷"), (0.001, "0.001"), (20.0, "20"), (1000.0, "1000")],
)
def test_lambda_is_written_as_people_write_it(lam: float, text: str):
    assert lam_text(lam) == text


def test_no_line_breaks_inside_a_percentage_or_a_p_value():
    assert unbroken("+5 −0, p = 0.062; 98.5 % of them") == "+5 −0, p\u00a0=\u00a00.062; 98.5\u00a0% of them"


def test_neighbouring_numbers_share_one_range():
    assert numbers_text([0, 1, 2, 4, 5, 7]) == "0–2, 4, 5, 7"


def test_quantities_are_written_as_people_write_them():
    assert [duration(s) for s in (0.42, 59.6, 185, 7800)] == [
        "0.4 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [size(n) for n in (12, 1500, 12_300_000, 4.5e9)] == ["12 B", "1.5 kB", "12 MB", "4.5 GB"]
    assert [count_of(n, "image") for n in (0, 1, 2, 12345)] == [
        "0 images",
        "1 image",
        "2 images",
        "12,345 images",
    ]
    assert [count_of(n, "minute") for n in (1.0, 1.5, 30.0)] == ["1 minute", "1.5 minutes", "30 minutes"]
    assert [date_time(t) for t in ("2025-01-01T10:00:59Z", "")] == ["2025-01-01 10:00", "–"]
    assert [text_of(v) for v in ([1, 2], [], 0.5, None, "x")] == ["1, 2", "none", "0.5", "–", "x"]
    assert [change(0.9, x) for x in (0.91, 0.89, 0.9, None)] == ["+1.00", "−1.00", "±0.00", ""]


def test_plurals_are_made_in_one_place():
    made = re.compile(r"""== 1 else ["']s["']""")
    sources = [
        path for package in ("defuse_core", "cluster", "services") for path in (ROOT / package).rglob("*.py")
    ]
    assert len(sources) > 100
    assert [path.name for path in sources if made.search(path.read_text("utf-8"))] == []


def test_of_many_names_five_are_shown_and_the_others_counted():
    assert first_few(MANY) == "c0, c1, c2, c3, c4 and 1,995 more"
    assert first_few(MANY[:5]) == "c0, c1, c2, c3, c4"


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (MANY, MANY[:-1], "c1999 only in A"),
        (MANY[1:], MANY, "c0 only in B"),
        (("a", "b"), ("a", "c"), "b only in A; c only in B"),
        (MANY, (*MANY[:-2], "c1999", "c1998"), "class 1998 is c1998 in A, c1999 in B"),
        (("a", "b"), ("a", "b", "b"), "2 classes in A, 3 in B"),
    ],
)
def test_only_the_classes_that_differ_are_named(first, second, told):
    assert class_difference(first, second, "A", "B") == told
