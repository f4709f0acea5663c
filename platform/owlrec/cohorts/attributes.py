"""Attribute groups: cohorts of those whose history says too little, by what the tables say about them.

A group is a combination of values: of profile fields for a user, of text fields for an item. Ages and other numbers go
by tens. Where too few share all values, the last field is left out, and so on; the rest belong to the group of all.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

Group = tuple[tuple[str, str], ...]  # (field, value), in the order of the fields

_BAND = 10
_MOST_GROUPS = 1 << 18


def values_of(row: Mapping[str, Any], fields: Sequence[str]) -> Group:
    """What a row says of `fields`: empty ones are left out, of a list the first value counts, numbers are banded."""
    values = []
    for field in fields:
        value = row.get(field)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and str(value) != "":
            values.append((field, banded(str(value))))
    return tuple(values)


def banded(value: str) -> str:
    """ "23" as "20-29"; anything but a small whole number stays itself."""
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


def large_groups(shards: Iterable[Mapping[Group, int]], smallest: int) -> set[Group]:
    """The groups that hold at least `smallest` rows over all shards.

    Rare values may make millions of groups; where they exceed 2^18, the rarest so far are forgotten, so that a group
    which is large may be missed only if it is among those.
    """
    total: Counter[Group] = Counter()
    for counts in shards:
        total.update(counts)
        if len(total) > _MOST_GROUPS:
            total = Counter(dict(total.most_common(_MOST_GROUPS // 2)))
    return {group for group, n in total.items() if n >= smallest}


def choose_group(group: Group, large: Container[Group]) -> Group:
    """The longest prefix of `group` that is `large`; () where none is."""
    return next((group[:n] for n in range(len(group), 0, -1) if group[:n] in large), ())


def group_name(group: Group) -> str:
    """The group in a few words for a cohort's name, "all" for ()."""
    return " ".join(f"{field}={value}" for field, value in group) or "all"
