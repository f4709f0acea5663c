"""The worlds of `benchmarks.scale`: their sizes are those asked for, to the row, and two of one seed are the same."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks import worlds
from benchmarks.scale import Digests
from benchmarks.worlds import World, grow, write_world

WORLD = World(users=500, items=100, interactions=10_000)


@pytest.fixture(autouse=True)
def small_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "_FRAGMENT_ROWS", 3_000)


def read(folder: Path, table: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(f) for f in sorted((folder / table).glob("*.parquet")))


def test_a_world_has_its_sizes_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in "ab":
        write_world(WORLD, tmp_path / name)
    users, items, interactions = (read(tmp_path / "a", t) for t in ("users", "items", "interactions"))
    assert users["user_id"].to_pylist() == list(range(500))
    assert items["item_id"].to_pylist() == list(range(100))
    assert interactions.num_rows == 10_000
    assert interactions.equals(read(tmp_path / "b", "interactions"))
    assert len(list((tmp_path / "a" / "interactions").iterdir())) == 4  # 150 users each
    per_user = np.bincount(interactions["user_id"].to_numpy())
    assert (len(per_user), per_user.min() >= 4, per_user.max() > 3 * per_user.mean()) == (500, True, True)
    per_item = np.bincount(interactions["item_id"].to_numpy(), minlength=100)
    assert per_item[:8].sum() > 0.3 * 10_000  # ln 9 / ln 101 = .48 by Zipf's law
    assert interactions.group_by(["user_id", "item_id", "timestamp"]).aggregate([]).num_rows == 10_000


def test_growth_adds_users_and_later_behaviors_and_is_taken_back(tmp_path: Path) -> None:
    write_world(WORLD, tmp_path)
    new, active = grow(WORLD, tmp_path)
    later = pa.concat_tables(pq.read_table(f) for f in (tmp_path / "interactions").glob("later*"))
    later_users = pc.unique(later["user_id"]).to_pylist()
    assert new == 5 == sum(u >= 500 for u in later_users)
    assert active == sum(u < 500 for u in later_users)
    assert 10 < active < 45  # 25 expected
    assert pc.min(later["timestamp"]).as_py() >= (worlds.START + worlds.DAYS * 86_400) * 1000
    write_world(WORLD, tmp_path)
    assert read(tmp_path, "users").num_rows == 500


def test_another_world_in_the_folder_is_refused(tmp_path: Path) -> None:
    write_world(WORLD, tmp_path)
    with pytest.raises(ValueError, match=r"world\.json"):
        write_world(World(users=501, items=100, interactions=10_000), tmp_path)


def test_digests_count_what_is_new_and_what_differs() -> None:
    before = Digests(np.array([3, 5, 8]), np.array([1, 1, 1]), np.array([7, 7, 7]))
    after = Digests(np.array([3, 4, 5, 8]), np.array([1, 1, 2, 1]), np.array([7, 7, 7, 9]))
    assert after.changed_since(before) == (2, 2)  # 4 is new; 5 is asked otherwise, 8 answered otherwise
