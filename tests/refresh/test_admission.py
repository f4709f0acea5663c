"""Which events are taken in, and that a refusal is said once."""

import numpy as np
import pytest
from refresh_world import START, interactions  # type: ignore[import-not-found]

from owlrec.refresh.events import REFUSED, Events, RefreshConfig, admit, dead_letters, new_refusals, split_future
from owlrec.schema import DEAD_LETTERS

USERS, ITEMS = np.array([1, 2]), np.array([10, 11])


def events(*keys: tuple[int, int, int]) -> Events:
    return Events.from_table(interactions([(u, i, 4.0, t) for u, i, t in keys]))


def keys(events: Events) -> list[tuple[int, int, int]]:
    return list(zip(events.user.tolist(), events.item.tolist(), events.time.tolist(), strict=True))


def test_future_begins_after_the_allowance() -> None:
    now, later = split_future(events((1, 10, START + 300_000), (1, 11, START + 300_001)), START)
    assert keys(now) == [(1, 10, START + 300_000)]
    assert later.to_pylist() == [
        {"user_id": 1, "item_id": 11, "rating": 4.0, "timestamp": START + 300_001, "error": "FromTheFuture"}
    ]


@pytest.mark.parametrize(
    ("admit_", "taken", "errors"),
    [
        ((), [(1, 10, 5)], ["UnknownUser", "UnknownUser", "UnknownItem"]),
        (("users",), [(1, 10, 5), (3, 10, 5)], ["UnknownItem", "UnknownItem"]),
        (("items",), [(1, 10, 5), (2, 12, 5)], ["UnknownUser", "UnknownUser"]),
        (
            ("items", "users"),
            [(1, 10, 5), (2, 12, 5), (3, 10, 5), (3, 12, 5)],
            [],
        ),
    ],
)
def test_unknown_ids(admit_: tuple[str, ...], taken: list[tuple[int, int, int]], errors: list[str]) -> None:
    given = events((1, 10, 5), (1, 11, 6), (2, 12, 5), (3, 10, 5), (3, 12, 5))
    new, refused = admit(given, events((1, 11, 6)), USERS, ITEMS, RefreshConfig.model_validate({"admit": admit_}))
    assert keys(new) == taken
    assert refused["error"].to_pylist() == errors


def test_what_was_taken_in_before_is_never_refused() -> None:
    new, refused = admit(events((3, 12, 5)), events((3, 12, 5)), USERS, ITEMS, RefreshConfig())
    assert (len(new), refused.num_rows) == (0, 0)


def test_a_refusal_is_news_once_and_again_for_another_reason() -> None:
    before = events((3, 10, 5), (4, 10, 5)).refused("UnknownUser")
    now = events((5, 10, 5), (3, 10, 5)).refused("UnknownUser")
    assert new_refusals(now, before).to_pylist() == events((5, 10, 5)).refused("UnknownUser").to_pylist()
    assert new_refusals(events((3, 10, 5)).refused("UnknownItem"), before).num_rows == 1
    assert new_refusals(REFUSED.empty_table(), before).num_rows == 0


def test_dead_letters_name_the_reason_and_the_remedy() -> None:
    letters = dead_letters(events((3, 12, 5)).refused("UnknownItem"))
    assert letters.schema == DEAD_LETTERS
    assert letters.to_pylist() == [
        {
            "kind": "user",
            "id": 3,
            "as_of": 5,
            "stage": "refresh",
            "error": "UnknownItem",
            "message": "event of user 3 with item 12: the items table has no item 12: run `prepare` with it, or add "
            "items to streaming.admit.",
            "attempts": 1,
        }
    ]
