"""Lists of names in messages: short, and complete in what differs."""

from __future__ import annotations

import pytest

from defuse_core.errors import class_difference, first_few

MANY = tuple(f"c{number}" for number in range(2000))


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
