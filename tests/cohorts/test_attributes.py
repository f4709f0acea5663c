"""Attribute groups: bands, prefixes, and how far a small group falls back."""

import pytest

from owlrec.cohorts.cohort_model import banded, choose_group, count_groups, group_name, large_groups, values_of

FIELDS = ("gender", "age", "occupation")
YOUNG = (("gender", "F"), ("age", "20-29"), ("occupation", "student"))


@pytest.mark.parametrize(
    ("value", "band"),
    [("23", "20-29"), ("7", "0-9"), ("1994", "1990-1999"), ("F", "F"), ("-3", "-3"), ("12345", "12345")],
)
def test_numbers_go_by_tens(value: str, band: str) -> None:
    assert banded(value) == band


def test_values_leave_out_what_is_empty_and_take_the_first_of_a_list() -> None:
    row = {"gender": "F", "age": "23", "occupation": "", "genres": ["Drama", "War"]}
    assert values_of(row, (*FIELDS, "genres", "absent")) == (("gender", "F"), ("age", "20-29"), ("genres", "Drama"))


def test_a_group_too_small_loses_its_last_fields() -> None:
    counts = count_groups([YOUNG, YOUNG, YOUNG[:2], YOUNG[:2], YOUNG[:1], (("gender", "M"),)])
    for smallest, expected in ((2, YOUNG), (3, YOUNG[:2]), (5, YOUNG[:1]), (6, ())):
        assert choose_group(YOUNG, large_groups([counts], smallest)) == expected
    assert choose_group((), large_groups([counts], 1)) == ()


def test_names_tell_the_values() -> None:
    assert group_name(YOUNG) == "gender=F age=20-29 occupation=student"
    assert group_name(()) == "all"
