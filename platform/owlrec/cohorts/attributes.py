"""Attribute groups: cohorts of those whose history says too little, by what the tables say about them.

A group is a combination of values: of profile fields for a user, of text fields for an item. Ages and other numbers go
by tens. Where too few share all values, the last field is left out, and so on; who fits no group belongs to all.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Group = tuple[tuple[str, str], ...]  # (field, value), in the order of the fields

_BAND = 10


def values_of(row: Mapping[str, Any], fields: Sequence[str]) -> Group:
    """What a row says of `fields`: empty ones are left out, of a list the first value counts, numbers are banded."""
    found = []
    for field in fields:
        value = row.get(field)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and str(value) != "":
            found.append((field, banded(str(value))))
    return tuple(found)


def banded(value: str) -> str:
    """ "23" as "20-29"; what is no small whole number stays itself."""
    if value.isascii() and value.isdigit() and len(value) <= 4:
        low = int(value) // _BAND * _BAND
        return f"{low}-{low + _BAND - 1}"
    return value


def count_groups(rows: Iterable[Group]) -> Counter[Group]:
    """How many rows each group and each of its prefixes holds."""
    counts: Counter[Group] = Counter()
    for group in rows:
        counts.update(group[:n] for n in range(1, len(group) + 1))
    return counts


def choose_group(group: Group, counts: Mapping[Group, int], min_size: int) -> Group:
    """The longest prefix of `group` that at least `min_size` rows share; () where none is."""
    for n in range(len(group), 0, -1):
        if counts.get(group[:n], 0) >= min_size:
            return group[:n]
    return ()


def group_name(group: Group) -> str:
    """The group in a few words for a cohort's name, "all" for ()."""
    return " ".join(f"{field}={value}" for field, value in group) or "all"
