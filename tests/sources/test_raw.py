"""What `finish` guarantees of every source's tables."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ids import stable_id
from owlrec.sources.raw import RawTables, finish, input_file

NAMES = {"users": "u.csv", "items": "i.csv", "interactions": "r.csv"}
T = 1_700_000_000_000


class AnySource(Config):
    type: Literal["any"] = "any"
    option: int = 0


def tables(**changes: Any) -> dict[str, Any]:
    """Two users and two items; user ann saw both items, bob one."""
    return {
        "users": pa.table({"user_id": ["ann", "bob"], "age": [30, None]}),
        "items": pa.table({"item_id": [1, 2], "title": ["One", None], "tags": [["x", None], None]}),
        "interactions": pa.table(
            {"user_id": ["ann", "ann", "bob"], "item_id": [1, 2, 2], "rating": [5, 1, 4], "timestamp": [T, T + 1, T]}
        ),
        "names": NAMES,
        **changes,
    }


def finished(config: AnySource | None = None, files: tuple[Path, ...] = (), **changes: Any) -> RawTables:
    return finish(config or AnySource(), files, **tables(**changes))


def interactions(user: list, item: list, time: list) -> pa.Table:
    return pa.table({"user_id": user, "item_id": item, "rating": [1.0] * len(user), "timestamp": time})


def test_raw_ids_become_stable_ids_and_attributes_text() -> None:
    raw = finished()
    ann, bob = stable_id("ann"), stable_id("bob")
    assert raw.users.to_pylist() == [
        {"user_id": ann, "raw_id": "ann", "age": "30"},
        {"user_id": bob, "raw_id": "bob", "age": ""},
    ]
    assert raw.items.to_pylist() == [
        {"item_id": 1, "raw_id": "1", "title": "One", "tags": ["x", ""]},
        {"item_id": 2, "raw_id": "2", "title": "", "tags": []},
    ]
    assert raw.interactions.to_pydict() == {
        "user_id": [ann, ann, bob],
        "item_id": [1, 2, 2],
        "rating": [5.0, 1.0, 4.0],
        "timestamp": [T, T + 1, T],
    }


def test_without_users_they_come_from_the_interactions() -> None:
    assert finished(users=None).users.to_pydict() == {
        "user_id": [stable_id("ann"), stable_id("bob")],
        "raw_id": ["ann", "bob"],
    }


@pytest.mark.parametrize(
    "ids",
    [
        pa.chunked_array([["ann", "ann"], ["bob"]]),
        pa.chunked_array([["ann", "ann", "bob"]], pa.large_string()),
        pa.chunked_array([pa.array(["ann", "ann", "bob"]).dictionary_encode()]),
        pa.chunked_array([pa.array(["zoe", "ann", "ann", "bob"]).dictionary_encode().slice(1)]),
    ],
)
def test_any_arrow_encoding_of_ids_gives_the_same_tables(ids: pa.ChunkedArray) -> None:
    table = tables()["interactions"].set_column(0, "user_id", ids)
    raw = finished(users=None, interactions=table)
    assert raw.users.equals(finished(users=None).users)
    assert raw.interactions.equals(finished(users=None).interactions)


def test_one_item_twice_at_different_times_is_allowed() -> None:
    again = interactions(["ann", "ann"], [1, 1], [T, T + 1])
    assert finished(interactions=again).interactions.num_rows == 2


def test_exact_double_is_refused_with_its_raw_ids() -> None:
    repeated = interactions(["ann", "bob", "ann", "bob"], [1, 2, 1, 2], [T, T, T, T])
    with pytest.raises(SchemaError, match=rf"r\.csv, row 2: user_id 'ann', item_id '1', timestamp {T} .*2 such rows"):
        finished(interactions=repeated)


def test_two_raw_ids_with_one_hash_are_refused() -> None:
    # A text whose hash is short enough to be a canonical integer itself collides with that integer.
    text = next(t for t in map(str.__add__, ["x"] * 1000, map(str, range(1000))) if stable_id(t) < 10**18)
    users = pa.table({"user_id": [text, str(stable_id(text))]})
    seen = interactions([text], [1], [T])
    with pytest.raises(
        SchemaError, match=rf"u\.csv: the raw ids '{text}' and '{stable_id(text)}' of user_id both hash to"
    ):
        finished(users=users, interactions=seen)


@pytest.mark.parametrize("kind", ["user", "item"])
def test_interactions_without_a_row_are_refused_or_dropped(kind: str) -> None:
    user, item = (["ann", "eve", "eve"], [1, 1, 2]) if kind == "user" else (["ann", "bob", "bob"], [1, 9, 9])
    orphans = interactions(user, item, [T, T, T + 1])
    message = rf"r\.csv, row 1: {kind}_id '{user[1] if kind == 'user' else 9}' has no row in {kind[0]}\.csv \(2 such"
    with pytest.raises(SchemaError, match=message + r".*drop_orphans"):
        finished(interactions=orphans)
    raw = finished(interactions=orphans, drop_orphans=True)
    assert raw.interactions["item_id"].to_pylist() == [1]
    assert raw.counts == {"orphans_dropped": 2}


def test_dropping_every_interaction_is_an_error() -> None:
    with pytest.raises(SchemaError, match=r"r\.csv: the table has no rows"):
        finished(interactions=interactions(["eve"], [1], [T]), drop_orphans=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"users": pa.table({"user_id": ["ann", "bob", "ann"]})},
            r"u\.csv, row 2: user_id 'ann' is a duplicate",
        ),
        (
            {"items": pa.table({"item_id": [1, 1, 2], "title": ["a", "b", "c"]})},
            r"i\.csv, row 1: item_id .1. is a duplicate",
        ),
        ({"users": pa.table({"user_id": ["ann", None]})}, r"u\.csv, row 1: user_id is null"),
        ({"users": pa.table({"user_id": ["ann", ""]})}, r"u\.csv, row 1: user_id is empty"),
        ({"users": pa.table({"name": ["ann"]})}, r"u\.csv: column 'user_id' is missing; the table has name"),
        ({"users": pa.table({"user_id": [["ann"]]})}, r"u\.csv: column 'user_id' has type list"),
        ({"users": pa.table({"user_id": ["ann"], "a": [{"b": 1}]})}, r"u\.csv: column 'a' has type struct"),
        ({"items": pa.table({"item_id": [1, 2]})}, r"i\.csv: column 'title' is missing"),
        ({"items": pa.table({"item_id": pa.array([], pa.int64()), "title": pa.array([], pa.string())})}, "no rows"),
        ({"interactions": interactions(["ann", None], [1, 1], [T, T])}, r"r\.csv, row 1: user_id is null"),
        ({"interactions": interactions(["ann", "bob"], [1, 1], [T, None])}, r"r\.csv, row 1: timestamp is null"),
        (
            {"interactions": interactions(["ann"], [1], [T // 1000])},
            r"r\.csv, row 0: timestamp 1700000000 looks like seconds",
        ),
        (
            {"interactions": interactions(["ann", "bob"], [1, 1], [str(T), "noon"])},
            r"r\.csv, row 1: .*'timestamp' holds 'noon'",
        ),
    ],
)
def test_a_broken_contract_is_named_by_file_and_row(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        finished(**changes)


def test_nan_attribute_counts_as_missing() -> None:
    users = pa.table({"user_id": ["ann", "bob"], "age": [30.0, float("nan")]})
    assert finished(users=users).users["age"].to_pylist() == ["30", ""]


def test_digest_follows_the_bytes_read_and_the_config(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    first = finished(files=(file,)).digest
    assert finished(files=(file,)).digest == first
    assert finished(AnySource(option=1), files=(file,)).digest != first
    file.write_text("2")
    assert finished(files=(file,)).digest != first


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"nowhere\.csv: file not found"):
        input_file(tmp_path / "nowhere.csv")
