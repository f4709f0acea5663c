"""Parquet and CSV tables with a column mapping."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from owlrec.errors import SchemaError, SourceError
from owlrec.ids import stable_id
from owlrec.sources import SourceConfig
from owlrec.sources.tabular import TableSource

T = 1_700_000_000_000
USERS = "user_id,city\n007,Rome\nu8,\n"
ITEMS = 'item_id,title,pages\n1,"A, B\nC",12\n2,Two,\n'
INTERACTIONS = f"user_id,item_id,rating,timestamp\n007,1,4.5,{T}\nu8,2,1,{T + 1}\n"


def csv_source(
    path: Path, *, users: str = USERS, items: str = ITEMS, interactions: str = INTERACTIONS, **options: Any
) -> TableSource:
    for name, text in (("users", users), ("items", items), ("interactions", interactions)):
        (path / f"{name}.csv").write_text(text)
    paths = {name: str(path / f"{name}.csv") for name in ("users", "items", "interactions")}
    return TableSource(type="table", **(paths | options))


def test_csv_ids_stay_text_and_attributes_are_kept(tmp_path: Path) -> None:
    raw = csv_source(tmp_path).load()
    assert raw.users.to_pylist() == [
        {"user_id": stable_id("007"), "raw_id": "007", "city": "Rome"},
        {"user_id": stable_id("u8"), "raw_id": "u8", "city": ""},
    ]
    assert raw.items.to_pylist() == [
        {"item_id": 1, "raw_id": "1", "title": "A, B\nC", "pages": "12"},
        {"item_id": 2, "raw_id": "2", "title": "Two", "pages": ""},
    ]
    assert raw.interactions.to_pydict() == {
        "user_id": [stable_id("007"), stable_id("u8")],
        "item_id": [1, 2],
        "timestamp": [T, T + 1],
        "rating": [4.5, 1.0],
    }


@pytest.mark.parametrize("suffix", ["csv.gz", "tsv", "parquet"])
def test_other_formats_give_the_same_tables(tmp_path: Path, suffix: str) -> None:
    expected = csv_source(tmp_path).load()
    paths = {}
    for name in ("users", "items", "interactions"):
        table = pacsv.read_csv(tmp_path / f"{name}.csv", parse_options=pacsv.ParseOptions(newlines_in_values=True))
        paths[name] = str(tmp_path / f"{name}.{suffix}")
        if suffix == "parquet":
            pq.write_table(table, paths[name])
            continue
        delimiter = "\t" if suffix == "tsv" else ","
        with pa.output_stream(paths[name], compression="gzip" if suffix == "csv.gz" else None) as stream:
            pacsv.write_csv(table, stream, pacsv.WriteOptions(delimiter=delimiter))
    raw = TableSource(type="table", **paths).load()
    assert raw.users.equals(expected.users)
    assert raw.items.equals(expected.items)
    assert raw.interactions.equals(expected.interactions)


def test_columns_are_mapped_per_table(tmp_path: Path) -> None:
    raw = csv_source(
        tmp_path,
        items="sku,name,title\n1,One,ignored\n",
        interactions=f"who,what,when\n007,1,{T}\n",
        columns={
            "items": {"item_id": "sku", "title": "name"},
            "interactions": {"user_id": "who", "item_id": "what", "timestamp": "when"},
        },
    ).load()
    assert raw.items.to_pylist() == [{"item_id": 1, "raw_id": "1", "title": "One"}]
    assert raw.interactions.column_names == ["user_id", "item_id", "timestamp"]  # implicit feedback


def test_without_a_users_file_users_come_from_interactions(tmp_path: Path) -> None:
    raw = csv_source(tmp_path).model_copy(update={"users": None}).load()
    assert raw.users["raw_id"].to_pylist() == ["007", "u8"]
    assert raw.users.column_names == ["user_id", "raw_id"]


def test_folder_and_glob_are_read_in_name_order(tmp_path: Path) -> None:
    csv_source(tmp_path)
    parts = tmp_path / "parts" / "day=2"
    parts.mkdir(parents=True)
    (parts / "b.csv").write_text(f"user_id,item_id,rating,timestamp\nu8,1,2.5,{T + 5}\n")
    (parts / "a.csv").write_text(f"user_id,item_id,rating,timestamp\nu8,1,3,{T + 4}\n")
    (parts / "_SUCCESS").write_text("")
    (parts / ".hidden.csv").write_text("x")
    for pattern in (tmp_path / "parts", tmp_path / "parts" / "**" / "*.csv"):
        config = TableSource(type="table", items=str(tmp_path / "items.csv"), interactions=str(pattern))
        assert config.load().interactions["rating"].to_pylist() == [3.0, 2.5]


def test_orphans_are_dropped_on_request(tmp_path: Path) -> None:
    orphan = INTERACTIONS + f"u9,1,3,{T}\n"
    with pytest.raises(
        SchemaError, match=r"row 2: user_id 'u9' has no row in .*users\.csv \(1 such.*source\.drop_orphans: true"
    ):
        csv_source(tmp_path, interactions=orphan).load()
    raw = csv_source(tmp_path, interactions=orphan, drop_orphans=True).load()
    assert raw.interactions.num_rows == 2
    assert raw.counts == {"orphans_dropped": 1}


@pytest.mark.parametrize(
    ("unit", "value"),
    [("s", T // 1000), ("s", T / 1000), ("ms", T), ("ms", T + 0.25), ("us", T * 1000 + 999), ("ns", T * 10**6)],
)
def test_timestamp_units(tmp_path: Path, unit: Literal["s", "ms", "us", "ns"], value: float) -> None:
    interactions = f"user_id,item_id,timestamp\n007,1,{value}\n"
    assert csv_source(tmp_path, interactions=interactions, timestamp_unit=unit).load().interactions[
        "timestamp"
    ].to_pylist() == [T]


@pytest.mark.parametrize(
    "type_", [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("ms", "Europe/Rome")]
)
def test_arrow_timestamps_know_their_unit(tmp_path: Path, type_: pa.DataType) -> None:
    config = csv_source(tmp_path)
    moment = pa.array([T], pa.timestamp("ms", "UTC")).cast(pa.timestamp(type_.unit, "UTC"))
    column = moment.cast(type_) if type_.tz else moment.cast(pa.int64()).cast(type_)
    pq.write_table(pa.table({"user_id": ["u8"], "item_id": [1], "timestamp": column}), tmp_path / "t.parquet")
    config = config.model_copy(update={"interactions": str(tmp_path / "t.parquet"), "timestamp_unit": "ns"})
    assert config.load().interactions["timestamp"].to_pylist() == [T]


def test_dates_in_csv_are_understood(tmp_path: Path) -> None:
    interactions = "user_id,item_id,timestamp\n007,1,2023-11-14 22:13:20\n"
    expected = int(datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC).timestamp()) * 1000
    assert csv_source(tmp_path, interactions=interactions).load().interactions["timestamp"].to_pylist() == [expected]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"interactions": f"user_id,item_id,timestamp\n007,1,{T // 1000}\n"}, SchemaError, "source.timestamp_unit: s"),
        (
            {"interactions": f"user_id,item_id,timestamp\n007,1,{T * 10**6}\n", "timestamp_unit": "s"},
            SchemaError,
            r"interactions\.csv: timestamp \d+ is not a number of seconds",
        ),
        (
            {"interactions": "user_id,item_id,timestamp\n007,1,noon\n"},
            SchemaError,
            r"row 0: .*'timestamp' holds 'noon'",
        ),
        (
            {"interactions": f"user_id,item_id,rating,timestamp\n007,1,4,{T}\nu8,1,good,{T}\n"},
            SchemaError,
            r"interactions\.csv, row 1: column 'rating' holds 'good'",
        ),
        ({"interactions": f"user_id,item_id,timestamp\n,1,{T}\n"}, SchemaError, r"row 0: user_id is empty"),
        ({"interactions": "user_id,item_id,timestamp\n"}, SchemaError, "the table has no rows"),
        (
            {"interactions": "user_id,item_id\n007,1\n"},
            SchemaError,
            r"column 'timestamp' is missing.*source\.columns\.interactions",
        ),
        (
            {"interactions": f"user_id,item_id,timestamp\n007,1,{T}\n007,1\n"},
            SourceError,
            r"interactions\.csv: .*Row #3",
        ),
        ({"interactions": ""}, SourceError, r"interactions\.csv: the file cannot be read as csv"),
        (
            {"items": "item_id,name\n1,One\n"},
            SchemaError,
            r"items\.csv: column 'title' is missing.*source\.columns\.items",
        ),
        ({"users": "id,city\n1,Rome\n"}, SchemaError, r"users\.csv: column 'user_id' is missing"),
        (
            {"columns": {"items": {"title": "titel"}}},
            SchemaError,
            r"items\.csv: source\.columns\.items maps title to column 'titel'.*Did you mean 'title'",
        ),
    ],
)
def test_bad_input_is_named(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        csv_source(tmp_path, **changes).load()


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    config = csv_source(tmp_path)
    (tmp_path / "items.xlsx").write_text("x")
    (tmp_path / "items.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("items.xlsx", "is not Parquet, CSV or JSON lines"),
        ("items.parquet", "cannot be read as parquet"),
        ("empty", "no Parquet, CSV or JSON lines files"),
        ("nothing-*.csv", "no Parquet, CSV or JSON lines files"),
    ):
        with pytest.raises(SourceError, match=message):
            config.model_copy(update={"items": str(tmp_path / path)}).load()


def test_parts_that_disagree_on_a_type_are_refused(tmp_path: Path) -> None:
    config = csv_source(tmp_path)
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.table({"item_id": [1], "title": ["One"]}), tmp_path / "parts" / "a.parquet")
    pq.write_table(pa.table({"item_id": ["2"], "title": ["Two"]}), tmp_path / "parts" / "b.parquet")
    with pytest.raises(SchemaError, match=r"source\.items: its 2 files disagree"):
        config.model_copy(update={"items": str(tmp_path / "parts")}).load()


def test_source_type_selects_the_reader(tmp_path: Path) -> None:
    config = TypeAdapter(SourceConfig).validate_python(csv_source(tmp_path).model_dump())
    assert isinstance(config, TableSource)
    assert config.load().interactions.num_rows == 2
    with pytest.raises(ValidationError, match="Did you mean 'movielens'"):
        TypeAdapter(SourceConfig).validate_python({"type": "movielense"})
    with pytest.raises(ValidationError, match="user"):
        csv_source(tmp_path, columns={"user": {}})
