"""Amazon reviews (McAuley Lab): JSON lines, plain or gzip, with the field names of the 2018 or of the 2023 release.

Both releases have exact duplicates and reviews of items without metadata; 2018's metadata also repeats items and has
page source in place of some titles. The k-core filter ("at least k interactions per user or item") is repeated until
stable.
"""

import gzip
import html
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson
from pydantic import Field

from owlrec.errors import SchemaError, SourceError
from owlrec.ordered import run_starts
from owlrec.sources.raw import RawTables, Source, finish, id_array, input_file

# Reviews can have tens of kilobytes, and Arrow refuses a line that is longer than its block.
_BLOCK_BYTES = 16 << 20


class AmazonSource(Source):
    """Reviews and item metadata of one category, or of several concatenated."""

    type: Literal["amazon"]
    reviews: str
    metadata: str
    user_core: int = Field(default=0, ge=0)  # keep users with at least this many interactions; 0 keeps all
    item_core: int = Field(default=0, ge=0)

    def load(self) -> RawTables:
        """The three tables; items are those with interactions, with title "" if the metadata has no row for one.

        Raises SourceError with file and line for a line that is not a JSON object or lacks a field, and SchemaError if
        the k-core filter leaves nothing.
        """
        reviews, metadata = input_file(self.reviews), input_file(self.metadata)
        interactions = _read_reviews(reviews)
        rows = _latest_of_each(interactions)
        counts = {"duplicates_dropped": interactions.num_rows - len(rows)}
        interactions = interactions.take(pa.array(rows))
        core = _core_rows(interactions, self.user_core, self.item_core)
        if not len(core):
            raise SchemaError(
                f"{reviews}: no interactions are left with source.user_core {self.user_core} and item_core "
                f"{self.item_core}. Lower them."
            )
        counts["outside_core_dropped"] = interactions.num_rows - len(core)
        interactions = interactions.take(pa.array(core))
        items = _read_metadata(metadata, interactions["item_id"].unique().to_pylist())
        counts["items_without_title"] = pc.sum(pc.equal(items["title"], "")).as_py()
        return finish(
            self,
            [reviews, metadata],
            users=None,
            items=items,
            interactions=interactions,
            names={"users": str(reviews), "items": str(metadata), "interactions": str(reviews)},
            counts=counts,
        )


@dataclass(frozen=True)
class _ReviewNames:
    """Names of a review's fields in a release."""

    user: str
    item: str
    rating: str
    timestamp: str
    to_ms: int

    def matches(self, row: dict[str, Any]) -> bool:
        return self.user in row and self.item in row

    def problem(self, row: dict[str, Any]) -> str:
        """The fault of a review's fields, or ""."""
        for name in (self.user, self.item):
            if not isinstance(row.get(name), str) or not row[name]:
                return f"{name} is {row.get(name)!r}, not an id in quotes"
        for name, types in ((self.rating, (int, float)), (self.timestamp, (int,))):
            if not isinstance(row.get(name), types) or isinstance(row[name], bool):
                return f"{name} is {row.get(name)!r}, not a number"
        return ""


# parent_asin comes before asin: 2023 has both, and its metadata is keyed by the parent.
_RELEASES = (
    _ReviewNames(user="reviewerID", item="asin", rating="overall", timestamp="unixReviewTime", to_ms=1000),
    _ReviewNames(user="user_id", item="parent_asin", rating="rating", timestamp="timestamp", to_ms=1),
    _ReviewNames(user="user_id", item="asin", rating="rating", timestamp="timestamp", to_ms=1),
)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSON lines file. Raises SourceError for an invalid line."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise SourceError(
                            f"{file}, line {number}: the line is not a JSON object. Correct or delete it."
                        )
                    yield number, row
    except ValueError as error:
        raise SourceError(
            f"{file}, line {number}: the line is not valid JSON ({error}). Correct or delete it."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(
            f"{file}, after line {number}: the file cannot be read ({error}). Download it again."
        ) from None


def _first_row(file: Path) -> dict[str, Any]:
    for _, row in _lines(file):
        return row
    raise SourceError(f"{file}: the file has no lines. Download it again.")


def _read_reviews(file: Path) -> pa.Table:
    """user_id, item_id (strings), rating and timestamp (ms) in the file's order."""
    first = _first_row(file)
    names = next((release for release in _RELEASES if release.matches(first)), None)
    if names is None:
        raise SourceError(
            f"{file}, line 1: the fields {', '.join(first)} match neither Amazon's 2018 reviews (reviewerID, "
            "asin) nor the 2023 ones (user_id, parent_asin). Swap source.reviews and source.metadata, or use "
            "a source of type `table`."
        )
    schema = pa.schema(
        [
            (names.user, pa.string()),
            (names.item, pa.string()),
            (names.rating, pa.float64()),
            (names.timestamp, pa.int64()),
        ]
    )
    try:
        with pa.input_stream(str(file), compression="gzip" if file.suffix == ".gz" else None) as stream:
            table = pajson.read_json(
                stream,
                read_options=pajson.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            ).select(schema.names)
        problem = "a field is missing" if any(column.null_count for column in table.columns) else ""
    except (pa.ArrowInvalid, OSError) as error:
        problem = str(error)
    if problem:
        # Arrow does not report the faulty line, so the slow reader finds it.
        for number, row in _lines(file):
            if wrong := names.problem(row):
                raise SourceError(f"{file}, line {number}: {wrong}. Correct or delete the line.")
        raise SourceError(f"{file}: {problem}. Download it again.")
    user, item, rating, timestamp = table.columns
    return pa.table(
        {"user_id": user, "item_id": item, "rating": rating, "timestamp": pc.multiply(timestamp, names.to_ms)},
    )


def _latest_of_each(interactions: pa.Table) -> np.ndarray:
    """Row numbers, ascending, of the last row of each (user, item, timestamp)."""
    user, item = (id_array(interactions[c]) for c in ("user_id", "item_id"))
    time = interactions["timestamp"].to_numpy()
    order = np.lexsort((time, item, user))  # stable: equal keys stay in the file's order
    first = np.unique(run_starts(user[order], item[order], time[order]))
    return np.sort(order[np.r_[first[1:], len(order)] - 1])


def _core_rows(interactions: pa.Table, user_core: int, item_core: int) -> np.ndarray:
    """Row numbers of the largest subset in which each user has `user_core` interactions and each item `item_core`."""
    user, item = (np.unique(id_array(interactions[c]), return_inverse=True)[1] for c in ("user_id", "item_id"))
    rows = np.arange(len(user))
    while True:
        enough = (np.bincount(user[rows])[user[rows]] >= user_core) & (np.bincount(item[rows])[item[rows]] >= item_core)
        if enough.all():
            return rows
        rows = rows[enough]


def _read_metadata(file: Path, wanted: list[str]) -> pa.Table:
    """title, brand, author and categories of the `wanted` items, in order; empty if the file has no row."""
    first = _first_row(file)
    key = "parent_asin" if "parent_asin" in first else "asin"
    if key not in first:
        raise SourceError(
            f"{file}, line 1: the fields {', '.join(first)} have neither asin nor parent_asin. Point "
            "source.metadata at item metadata."
        )
    rows: dict[str, dict[str, Any]] = {item: {} for item in wanted}
    for number, row in _lines(file):
        if not isinstance(row.get(key), str):
            raise SourceError(
                f"{file}, line {number}: {key} is {row.get(key)!r}, not an id in quotes. Correct or delete the line."
            )
        if row[key] in rows:
            rows[row[key]] = _item(row)  # 2018 repeats some items; the later row wins
    return pa.table(
        {
            "item_id": pa.array(wanted, pa.string()),
            "title": pa.array([row.get("title", "") for row in rows.values()], pa.string()),
            "brand": pa.array([row.get("brand", "") for row in rows.values()], pa.string()),
            "author": pa.array([row.get("author", "") for row in rows.values()], pa.string()),
            "categories": pa.array([row.get("categories", []) for row in rows.values()], pa.list_(pa.string())),
        }
    )


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """A metadata row of either release with our names."""
    title = _text(row.get("title"))
    if "getTime" in title:  # 2018: the page's script instead of the title
        title = ""
    author = row.get("author")
    categories = row.get("category") or row.get("categories") or [row.get("main_cat") or row.get("main_category")]
    return {
        "title": title,
        "brand": _text(row.get("brand") or row.get("store")).removeprefix("Visit Amazon's ").removesuffix(" Page"),
        "author": _text(author.get("name") if isinstance(author, dict) else author),
        "categories": [
            text for text in map(_text, categories if isinstance(categories, list) else [categories]) if text
        ],
    }


def _text(value: Any) -> str:
    """Text with HTML entities resolved; anything but text counts as missing."""
    return html.unescape(value).strip() if isinstance(value, str) else ""
