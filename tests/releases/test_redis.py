"""Releases in Redis: the same answers as LMDB's, a pointer that is switched last, retention, and a server that is gone.

The contract is one test over both stores: a chain of deltas answers like dicts that were updated in the same order.
"""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import free_port
from redis_server import needs_redis, redis_server
from release_rows import DELTAS, FULL, KINDS, Rows, answers, check, publish_chain, publish_rows, texts

from owlrec.errors import ReleaseError, StoreUnavailableError
from owlrec.releases import build, open_release, redis, roll_back
from owlrec.releases.format import encode_key, read_manifest
from owlrec.releases.redis import RedisReleases, prune_redis, push, roll_back_redis
from owlrec.workspace import Workspace

pytestmark = [needs_redis, pytest.mark.process]
IDS = range(12)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def releases(url):
    releases = RedisReleases(url)
    releases.client.flushall()
    return releases


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def keys_of(releases, name):
    return list(releases.client.scan_iter(match=f"owlrec:r:{name}:*"))


@pytest.mark.parametrize("store", ["lmdb", "redis"])
def test_the_contract(store, workspace, releases):
    *earlier, newest = publish_chain(workspace)
    if store == "lmdb":
        opened = open_release(workspace)
    else:
        assert push(workspace, releases) == newest
        opened = releases.open(releases.current())
    with opened as release:
        check(release.store, answers(), IDS)
        assert release.store.remote == (store == "redis")
        assert [m.name for m in release.chain] == [newest, *reversed(earlier)]
        assert release.store.get("user", []) == []
        assert release.store.vectors("user", [])[0].shape[0] == 0
        assert release.store.own_codes("user", [1, 99]) == [(), None]
        with pytest.raises(ReleaseError, match="Did you mean 'item'"):
            release.store.get("itm", [1])
    opened.close()


rows = st.builds(
    Rows,
    texts=st.dictionaries(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 11)),
        st.tuples(st.integers(0, 9), st.text(max_size=5), st.sampled_from(["ok", "short"])),
        min_size=1,
        max_size=8,
    ),
    vectors=st.dictionaries(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 11)),
        st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=3),
        max_size=6,
    ),
    cohorts=st.dictionaries(
        st.tuples(st.sampled_from(KINDS[:2]), st.integers(0, 11)),
        st.lists(st.integers(0, 11), max_size=3, unique=True).map(tuple),
        max_size=4,
    ),
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(full=rows, delta=rows, part_ids=st.integers(1, 5), at_once=st.integers(1, 7))
def test_any_chain_answers_alike_in_any_pieces(full, delta, part_ids, at_once, releases, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("ws"))
    releases.client.flushall()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PART_IDS", part_ids)
        patch.setattr(redis, "_KEYS_PER_GET", at_once)
        patch.setattr(redis, "_ROWS_PER_PIPELINE", at_once)
        first = publish_rows(workspace, "full", full).name
        publish_rows(workspace, "delta", delta, delta_of=first)
        expected = Rows()
        expected.update(full)
        expected.update(delta)
        with releases.open(push(workspace, releases)) as release:
            check(release.store, expected, IDS)


def test_semantic_ids_are_copied(workspace, releases):
    from owlrec.encoding.compression import pack_codes
    from owlrec.releases.format import SemanticIdEntry

    publish_rows(workspace, "full", FULL)
    with releases.open(push(workspace, releases)) as release:
        entry = SemanticIdEntry(sizes=(16, 16))
        manifest = release.manifest.model_copy(update={"codes": {"user": 2}, "semantic_ids": {"user": entry}})
        prefix = redis.row_prefix(redis.release_prefix("owlrec", release.name), "codes")
        [packed] = pack_codes(np.array([[3, 7, 1]], dtype=np.uint16), entry.sizes)
        releases.client.set(prefix + encode_key("user", 1), packed)
        releases.client.set(prefix + encode_key("user", 2), b"")
        store = redis.RedisStore(releases.client, manifest)
        assert store.own_codes("user", [1, 2, 3]) == [(3, 7, 1), (), None]


def test_the_pointer_moves_last_and_a_dead_push_shows_nothing(workspace, releases, monkeypatch):
    first = publish_rows(workspace, "first", texts({("user", 1): "first"})).name
    push(workspace, releases)
    publish_rows(workspace, "second", texts({("user", i): "second" for i in range(9)}))
    monkeypatch.setattr(redis, "_ROWS_PER_PIPELINE", 2)

    def die(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(workspace, releases, on_rows=die)
    assert releases.current() == first
    with releases.open(first) as release:
        assert release.store.get("user", [1, 2])[0].text == "first"
    written = []
    second = push(workspace, releases, on_rows=written.append)
    assert written == [2, 2, 2, 2, 1]
    with releases.open(releases.current()) as release:
        assert (release.name, release.store.get("user", [8])[0].text) == (second, "second")
    assert push(workspace, releases, on_rows=die) == second  # it is all there


def test_a_swap_takes_what_is_there_and_a_reader_keeps_its_release(workspace, releases):
    a = publish_rows(workspace, "a", texts({("user", 1): "a"})).name
    push(workspace, releases)
    reader = releases.open(a)
    b = publish_rows(workspace, "b", texts({("user", 1): "b"})).name
    push(workspace, releases)
    assert reader.store.get("user", [1])[0].text == "a"
    roll_back(workspace)

    def unwritten(_):
        raise AssertionError("what Redis holds already is not written again")

    assert push(workspace, releases, on_rows=unwritten) == a
    assert (releases.current(), releases.history()) == (a, [a, b, a])


def test_rolling_back_is_one_command(workspace, releases):
    names = []
    for label in "abc":
        names.append(publish_rows(workspace, label, texts({("user", 1): label})).name)
        push(workspace, releases)
    a, b, c = names
    assert roll_back_redis(releases) == b
    assert roll_back_redis(releases) == a
    with pytest.raises(ReleaseError, match="no previous release"):
        roll_back_redis(releases)
    assert roll_back_redis(releases, to=c) == c
    assert releases.history() == [a, c]
    with pytest.raises(ReleaseError, match="has no release 'nope'"):
        roll_back_redis(releases, to="nope")
    assert releases.current() == c


def test_retention_keeps_what_is_read_on_top_of(workspace, releases):
    full = publish_rows(workspace, "full", FULL).name
    push(workspace, releases)
    delta = publish_rows(workspace, "delta", DELTAS[0], delta_of=full).name
    push(workspace, releases)
    later = [publish_rows(workspace, label, texts({("user", 1): label})).name for label in "abc"]
    for name in later:
        push(workspace, releases, name, keep=9)
    assert prune_redis(releases, keep=4) == []  # a, b, c and the delta, whose parent stays
    assert prune_redis(releases, keep=2) == sorted([full, delta, later[0]])
    assert [bool(keys_of(releases, name)) for name in (full, delta, *later)] == [False, False, False, True, True]
    assert roll_back_redis(releases) == later[1]
    with releases.open(later[1]) as release:
        assert release.store.get("user", [1])[0].text == "b"


def test_a_push_goes_on_after_its_last_whole_part(workspace, releases, monkeypatch):
    monkeypatch.setattr(build, "PART_IDS", 4)
    name = publish_rows(workspace, "a", texts({("user", i): str(i) for i in range(30)})).name
    rows = [part.rows["knowledge"] for part in read_manifest(workspace, name).parts]
    assert len(rows) == 8
    written = []

    def die_in_the_third(n):
        written.append(n)
        if len(written) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(workspace, releases, on_rows=die_in_the_third)
    assert (written, releases.current(), prune_redis(releases)) == (rows[:3], None, [])  # its lease is young
    written.clear()
    push(workspace, releases, on_rows=written.append)
    assert written == rows[2:]
    with releases.open(name) as release:
        assert [k.text for k in release.store.get("user", range(30))] == [str(i) for i in range(30)]
        assert release.store.ids("user").tolist() == list(range(30))
        assert release.store.ids("user", 5).tolist() == list(range(5))


def test_a_push_beside_another_loses_no_row(workspace, releases):
    slow = publish_rows(workspace, "slow", texts({("user", 1): "slow"})).name
    fast = publish_rows(workspace, "fast", texts({("user", 1): "fast"})).name

    def other_push(_):
        assert push(workspace, releases, fast, keep=1) == fast

    push(workspace, releases, slow, on_rows=other_push)
    with releases.open(slow) as release:
        assert release.store.get("user", [1])[0].text == "slow"


def test_parts_that_vanish_while_they_are_pushed_are_noticed(workspace, releases, monkeypatch):
    monkeypatch.setattr(build, "PART_IDS", 4)
    publish_rows(workspace, "a", texts({("user", i): str(i) for i in range(30)}))
    seen = []

    def lose_all(n):
        seen.append(n)
        if len(seen) == 5:
            releases.client.flushall()

    with pytest.raises(ReleaseError, match=r"Redis lost \d of its 8 parts"):
        push(workspace, releases, on_rows=lose_all)
    assert releases.current() is None


def test_rows_of_a_dead_push_are_swept(workspace, releases):
    push(workspace, releases, publish_rows(workspace, "a", texts({("user", 1): "a"})).name)
    releases.client.set("owlrec:r:20200101T000000Z-deadbeef:knowledge:x", b"left")
    releases.client.set("other:r:20200101T000000Z-deadbeef:knowledge:x", b"not ours")
    assert prune_redis(releases) == ["20200101T000000Z-deadbeef"]
    assert releases.client.exists("other:r:20200101T000000Z-deadbeef:knowledge:x")


def test_damage_is_an_error_that_names_it(workspace, releases):
    name = publish_rows(workspace, "a", texts({("user", 1): "a"})).name
    with pytest.raises(ReleaseError, match="nothing has been published"):
        push(Workspace(workspace.path("elsewhere")), releases)
    assert releases.current() is None
    push(workspace, releases)
    key = b"owlrec:r:%b:knowledge:" % name.encode() + encode_key("user", 1)
    releases.client.set(key, b"{")
    with releases.open(name) as release, pytest.raises(ReleaseError, match="row of user 1 is unreadable"):
        release.store.get("user", [1])
    assert push(workspace, releases, replace=True) == name
    with releases.open(name) as release:
        assert release.store.get("user", [1])[0].text == "a"
    releases.client.set("owlrec:current", json.dumps({"current": "x", "history": []}))
    with pytest.raises(ReleaseError, match="not a pointer"):
        releases.current()
    releases.client.set(f"owlrec:r:{name}:manifest", "{}")
    with pytest.raises(ReleaseError, match="manifest is unreadable"):
        releases.open(name)


def test_a_server_that_stops_is_found_out_at_once_and_found_again(workspace, tmp_path):
    publish_rows(workspace, "a", texts({("user", 1): "a"}))
    port = free_port()
    with redis_server(tmp_path, port) as url:
        releases = RedisReleases(url, timeout_s=0.5)
        release = releases.open(push(workspace, releases))
        assert release.store.get("user", [1])[0].text == "a"
    with pytest.raises(StoreUnavailableError, match="does not respond"):
        release.store.get("user", [1])
    with pytest.raises(StoreUnavailableError):
        releases.current()
    with redis_server(tmp_path, port):
        with pytest.raises(StoreUnavailableError, match="missing from Redis"):  # it kept nothing on disk
            release.store.get("user", [1])
        push(workspace, releases)
        assert release.store.get("user", [1])[0].text == "a"


def test_a_url_that_is_none_is_refused():
    with pytest.raises(ReleaseError, match="is not a Redis URL") as error:
        RedisReleases("http://user:secret@host")
    assert "secret" not in str(error.value)
