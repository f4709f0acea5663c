"""The music shop's tables: an order that stands in for times, and names that are read as they are."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.lastfm import DAY, READ_UNTIL, stand_in, write_tables


def test_what_the_llm_read_comes_before_the_moment_and_the_rest_after() -> None:
    user = np.array([7, 3, 7, 3, 7, 7])
    times = stand_in(user, [True, False, True, True, False, True])
    days = (times - READ_UNTIL) // DAY
    assert sorted(days[[0, 2, 5]].tolist()) == [-2, -1, 0]  # of user 7
    assert (days[4], days[3], days[1]) == (1, 0, 1)
    assert ((times - READ_UNTIL) % DAY == 0).all()
    np.testing.assert_array_equal(stand_in(user, [True, False, True, True, False, True]), times)


def test_plays_on_neither_side_are_drawn_by_the_seed() -> None:
    user = np.arange(2000)
    early = stand_in(user, [None] * 2000) <= READ_UNTIL
    assert 0.77 < early.mean() < 0.83
    assert (early != (stand_in(user, [None] * 2000, seed=1) <= READ_UNTIL)).any()


def test_tables_are_written_as_a_shop_has_them(tmp_path: Path) -> None:
    artists = {"artist_id": [5, 6], "name": ["Björk", "a-ha"], "tags": [["pop", "icelandic"], None]}
    pq.write_table(pa.table(artists), tmp_path / "artists.parquet")
    pq.write_table(pa.table({"user_id": [2, 2], "artist_id": [5, 6], "plays": [9, 1]}), tmp_path / "plays.parquet")
    split = {"user_id": [2, 2], "artist_id": [6, 5], "split": ["train", "test"]}
    pq.write_table(pa.table(split), tmp_path / "colakg.parquet")
    folder = tmp_path / "shop"
    folder.mkdir()
    write_tables(tmp_path, folder)
    assert pq.read_table(folder / "items.parquet").to_pylist() == [
        {"item_id": 5, "title": "Björk", "tags": "pop, icelandic"},
        {"item_id": 6, "title": "a-ha", "tags": ""},
    ]
    assert pq.read_table(folder / "plays.parquet").to_pylist() == [
        {"user_id": 2, "item_id": 5, "timestamp": READ_UNTIL + DAY},
        {"user_id": 2, "item_id": 6, "timestamp": READ_UNTIL},
    ]
