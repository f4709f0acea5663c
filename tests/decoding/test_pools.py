from pathlib import Path

import pytest

from owlrec_decoding.index import LIVE, SEALED, PoolError, open_pool
from owlrec_decoding.options import DraftLimits
from owlrec_decoding.pools import Pools, write_pool


def write(root: Path, name: str, texts: list[list[int]], ids: list[int] | None = None, identity: str = "m") -> None:
    write_pool(root, name, texts, ids, identity=identity, max_tokens=1000)


def test_oldest_texts_are_left_out_of_a_full_pool(tmp_path: Path) -> None:
    pool = write_pool(tmp_path, "p", [[1] * 9, [2] * 9, [3] * 9], [10, 20, 30], identity="m", max_tokens=25)
    assert pool.documents[:, 0].tolist() == [20, 30]


@pytest.mark.parametrize("name", ["", ".hidden", "../escape", "a/b", "x" * 200])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="pool name"):
        write(tmp_path, name, [[1, 2]])
    (tmp_path.parent / "escape").mkdir(exist_ok=True)
    assert Pools(str(tmp_path), "m").open(name) is None


def test_pools_of_another_model_are_refused_at_start_and_named(tmp_path: Path) -> None:
    write(tmp_path, "default", [[1, 2]], identity="other-model")
    with pytest.raises(PoolError, match=r"default holds tokens of other-model, but the engine runs m"):
        Pools(str(tmp_path), "m")


def test_one_foreign_pool_among_good_ones_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, "default", [[1, 2]])
    write(tmp_path, "x", [[1, 2]], identity="other-model")
    pools = Pools(str(tmp_path), "m")
    assert not pools.known("x")
    assert pools.counts["refused"] == 1


def test_least_recently_used_pool_closes_first(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path, name, [[1, 2]])
    pools = Pools(str(tmp_path), "m", DraftLimits(max_open_pools=2))
    [(_, place_a)], [(_, place_b)] = pools.sources("a"), pools.sources("b")
    pools.open("a")
    version = pools.version
    assert pools.sources("c") == [(SEALED, place_b)]  # b's place, since a was used later
    assert pools.version > version  # requests that held b look their sources up again
    assert pools.sources("a") == [(SEALED, place_a)]


def test_damaged_order_is_rebuilt_and_damaged_tokens_are_set_aside(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, name, [[1, 2, 3]])
    (tmp_path / "a" / "order.npy").write_bytes(b"junk")
    (tmp_path / "b" / "tokens.npy").write_bytes(b"junk")
    pools = Pools(str(tmp_path), "m")
    assert pools.known("a")
    assert not pools.known("b")
    assert (pools.counts["rebuilt"], pools.counts["quarantined"]) == (1, 1)
    open_pool(tmp_path / "a", "m")  # mended on disk
    assert not (tmp_path / "b").exists()
    assert (tmp_path / ".b.corrupt" / "manifest.json").exists()


def test_live_tier_grows_and_evicts(tmp_path: Path) -> None:
    write(tmp_path, "a", [[1, 2, 3]])
    pools = Pools(str(tmp_path), "m", DraftLimits(max_live_pools=2))
    pools.insert("a", [4, 5])
    assert [kind for kind, _ in pools.sources("a")] == [SEALED, LIVE]
    pools.insert("a", list(range(3000)))  # the arrays are replaced; the place stays
    assert [kind for kind, _ in pools.sources("a")] == [SEALED, LIVE]
    assert pools.tokens() == {"sealed": 4, "live": 3 + 3001}
    pools.insert("b", [1, 2])
    pools.insert("c", [1, 2])
    assert [kind for kind, _ in pools.sources("a")] == [SEALED]  # its live tier was the least recently used


def test_without_a_folder_any_valid_name_has_a_live_pool() -> None:
    pools = Pools(None, "m")
    assert pools.known("cohort-3")
    assert not pools.known("../x")
    assert pools.sources("cohort-3") == []
    pools.insert("cohort-3", [1, 2])
    assert [kind for kind, _ in pools.sources("cohort-3")] == [LIVE]


def test_no_live_tier_where_it_is_switched_off() -> None:
    pools = Pools(None, "m", DraftLimits(live_tokens=0))
    pools.insert("a", [1, 2])
    assert pools.sources("a") == []
