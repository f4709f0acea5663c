"""Amazon reviews of both releases, from a few lines each."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from owlrec.errors import SchemaError, SourceError
from owlrec.ids import stable_id
from owlrec.sources.datasets import AmazonSource

T = 1_400_000_000


def review18(user: str, item: str, time: int = T, rating: float = 5.0, **more: Any) -> dict[str, Any]:
    row = {"overall": rating, "verified": True, "reviewerID": user, "asin": item, "style": {"Format:": " Kindle"}}
    return row | {"reviewText": "long " * 3, "unixReviewTime": time} | more


def review23(user: str, item: str, time: int = T * 1000, rating: float = 5.0, **more: Any) -> dict[str, Any]:
    return {"rating": rating, "asin": "v" + item, "parent_asin": item, "user_id": user, "timestamp": time} | more


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def source(
    tmp_path: Path, reviews: list[Any], metadata: list[Any] | None = None, suffix: str = "", **options: Any
) -> AmazonSource:
    return AmazonSource(
        type="amazon",
        reviews=str(write(tmp_path / f"reviews.jsonl{suffix}", reviews)),
        metadata=str(write(tmp_path / f"meta.jsonl{suffix}", metadata or [{"asin": "B1", "title": "One"}])),
        **options,
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_2018_names(tmp_path: Path, suffix: str) -> None:
    metadata = [
        {
            "asin": "B1",
            "title": "Tom &amp; Jerry",
            "brand": "Visit Amazon's Ann Author Page",
            "category": ["Books", "Children&#39;s"],
            "main_cat": "Books",
        },
        {"asin": "B2", "title": "<script>getTime()</script>", "category": [], "main_cat": "Books"},
        {"asin": "B9", "title": "never reviewed"},
    ]
    raw = source(tmp_path, [review18("A1", "B1"), review18("A2", "B2", T + 1, 2)], metadata, suffix).load()
    assert raw.items.to_pylist() == [
        {
            "item_id": stable_id("B1"),
            "raw_id": "B1",
            "title": "Tom & Jerry",
            "brand": "Ann Author",
            "author": "",
            "categories": ["Books", "Children's"],
        },
        {"item_id": stable_id("B2"), "raw_id": "B2", "title": "", "brand": "", "author": "", "categories": ["Books"]},
    ]
    assert raw.interactions.to_pydict() == {
        "user_id": [stable_id("A1"), stable_id("A2")],
        "item_id": [stable_id("B1"), stable_id("B2")],
        "rating": [5.0, 2.0],
        "timestamp": [T * 1000, (T + 1) * 1000],
    }


def test_2023_names_join_by_parent(tmp_path: Path) -> None:
    metadata = [
        {
            "parent_asin": "P1",
            "title": "One",
            "store": "Ann (Author)",
            "author": {"name": "Ann", "avatar": "x"},
            "categories": ["Books", "Novels"],
            "main_category": "Books",
        },
        {"parent_asin": "P2", "title": None, "store": None, "author": None, "categories": [], "main_category": "Toys"},
    ]
    raw = source(tmp_path, [review23("A1", "P1"), review23("A1", "P2", rating=1)], metadata).load()
    assert raw.items.drop_columns(["item_id"]).to_pylist() == [
        {"raw_id": "P1", "title": "One", "brand": "Ann (Author)", "author": "Ann", "categories": ["Books", "Novels"]},
        {"raw_id": "P2", "title": "", "brand": "", "author": "", "categories": ["Toys"]},
    ]
    assert raw.interactions["timestamp"].to_pylist() == [T * 1000, T * 1000]


def test_2023_reviews_without_parents_use_the_item(tmp_path: Path) -> None:
    row = review23("A1", "B1") | {"asin": "B1"}
    del row["parent_asin"]
    assert source(tmp_path, [row]).load().items["raw_id"].to_pylist() == ["B1"]


def test_exact_duplicates_keep_the_last_and_are_counted(tmp_path: Path) -> None:
    rows = [
        review18("A1", "B1", rating=1),
        review18("A1", "B1", T + 9),
        review18("A2", "B1"),
        review18("A1", "B1", rating=4),
    ]
    raw = source(tmp_path, rows).load()
    assert raw.counts["duplicates_dropped"] == 1
    assert [(r["timestamp"] // 1000 - T, r["rating"]) for r in raw.interactions.to_pylist()] == [(9, 5), (0, 5), (0, 4)]


def test_items_without_title_are_kept_untitled(tmp_path: Path) -> None:
    raw = source(tmp_path, [review18("A1", "B1"), review18("A1", "B7")]).load()
    assert dict(zip(raw.items["raw_id"].to_pylist(), raw.items["title"].to_pylist(), strict=True)) == {
        "B1": "One",
        "B7": "",
    }
    assert raw.counts["items_without_title"] == 1


def test_repeated_metadata_keeps_the_last(tmp_path: Path) -> None:
    metadata = [{"asin": "B1", "title": "old"}, {"asin": "B1", "title": "new"}]
    assert source(tmp_path, [review18("A1", "B1")], metadata).load().items["title"].to_pylist() == ["new"]


def test_core_filter_runs_until_stable(tmp_path: Path) -> None:
    # B3 falls first (one review), which leaves A3 with one; without A3 nothing else changes.
    pairs = [("A1", "B1"), ("A1", "B2"), ("A2", "B1"), ("A2", "B2"), ("A3", "B3"), ("A3", "B1")]
    raw = source(tmp_path, [review18(*pair) for pair in pairs], user_core=2, item_core=2).load()
    assert raw.users["raw_id"].to_pylist() == ["A1", "A2"]
    assert raw.items["raw_id"].to_pylist() == ["B1", "B2"]
    assert raw.counts["outside_core_dropped"] == 2


def test_core_filter_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"no interactions are left with source\.user_core 3 and item_core 0"):
        source(tmp_path, [review18("A1", "B1")], user_core=3).load()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"reviewerID": "A1", ', r"reviews\.jsonl, line 3: the line is not valid JSON"),
        ("[1]", r"line 3: the line is not a JSON object"),
        (review18("A1", "B1", overall="five"), r"line 3: overall is 'five', not a number"),
        (review18("A1", "B1", unixReviewTime=None), r"line 3: unixReviewTime is None, not a number"),
        (review18("A1", "B1", reviewerID=7), r"line 3: reviewerID is 7, not an id"),
        ({"overall": 5.0, "reviewerID": "A1", "unixReviewTime": T}, r"line 3: asin is None, not an id"),
    ],
)
def test_bad_review_lines_are_named(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        source(tmp_path, [review18("A1", "B1"), "", bad, review18("A2", "B1")]).load()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([{"asin": "B1"}, "{'asin': 'B2'}"], r"meta\.jsonl, line 2: the line is not valid JSON"),
        ([{"asin": "B1"}, {"title": "x"}], r"meta\.jsonl, line 2: asin is None"),
        ([{"title": "x"}], r"meta\.jsonl, line 1: .*neither asin nor parent_asin"),
        ([""], r"meta\.jsonl: the file has no lines"),
    ],
)
def test_bad_metadata_lines_are_named(tmp_path: Path, metadata: list[Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        source(tmp_path, [review18("A1", "B1")], metadata).load()


def test_swapped_files_are_recognized(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"line 1: the fields asin, title match neither.*source.reviews"):
        source(tmp_path, [{"asin": "B1", "title": "One"}]).load()


def test_truncated_gzip_is_an_error(tmp_path: Path) -> None:
    config = source(tmp_path, [review18(f"A{n}", "B1") for n in range(500)], suffix=".gz")
    file = Path(config.reviews)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SourceError, match=r"reviews\.jsonl\.gz, after line \d+: the file cannot be read"):
        config.load()


def test_a_review_longer_than_a_megabyte_is_read(tmp_path: Path) -> None:
    raw = source(tmp_path, [review18("A1", "B1", reviewText="x" * 3_000_000), review18("A2", "B1")]).load()
    assert raw.interactions.num_rows == 2
