"""Releases without users: lookups, parts, chains and copies in Redis."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from own_store import MemoryStore  # type: ignore[import-not-found]
from redis_server import needs_redis, redis_server  # type: ignore[import-not-found]
from release_rows import FULL, answers, check, publish_chain, publish_rows, texts  # type: ignore[import-not-found]

from owlrec.releases import current_release, list_releases, open_release
from owlrec.releases.format import TombstonedStore
from owlrec.releases.redis import RedisReleases, forget_in_redis, push, push_tombstones
from owlrec.releases.release import Release
from owlrec.releases.retention import find_rows, rebuild_without_forgotten, remove_releases
from owlrec.workspace import Workspace, read_tombstones, write_tombstones

IDS = range(12)


def without_user_1() -> object:
    rows = answers()
    for held in (rows.texts, rows.vectors, rows.codes):
        held.pop(("user", 1), None)
    rows.behaviors.pop(1, None)
    return rows


def test_every_question_leaves_a_forgotten_user_out(workspace: Workspace) -> None:
    publish_chain(workspace)
    before = open_release(workspace)
    write_tombstones(workspace, np.array([1, 2]))
    with open_release(workspace) as release, before:
        assert (release.name, before.version) == (before.name, before.name)
        assert release.version != before.version
        assert release.store.get("user", [1, 2, 3])[:2] == [None, None]
        assert release.store.get("user", [1]) == [None]
        assert release.store.get("user", [3])[0].text == "three"
        assert not release.store.vectors("user", [1])[1][0]
        assert release.store.own_codes("user", [1]) == [None]
        assert release.store.cohorts("user", [2, 4]) == [(), (8,)]
        assert release.store.ids("user").tolist() == [3]
        assert release.store.ids("user", 1).tolist() == [3]
        assert before.store.ids("user").tolist() == [1, 3]
        assert release.store.get("cohort", [8])[0].text == "peace"


def test_a_rebuilt_release_answers_the_same_for_everybody_else(workspace: Workspace) -> None:
    names = publish_chain(workspace)
    write_tombstones(workspace, np.array([1]))
    held = find_rows(workspace, "user", np.array([1, 77]))
    assert (set(held.releases), held.ids) == (set(names), {1})  # the third is read on top of them
    manifest = rebuild_without_forgotten(workspace)
    assert current_release(workspace) == manifest.name
    remove_releases(workspace, held.releases)
    assert [m.name for m in list_releases(workspace)] == [manifest.name]
    with open_release(workspace) as release:
        check(release.store, without_user_1(), IDS)
    assert find_rows(workspace, "user", np.array([1])).releases == []
    assert rebuild_without_forgotten(workspace, [8]).name != manifest.name
    with open_release(workspace) as release:
        assert release.store.own_knowledge("cohort", [8]) == [None]
        assert release.store.get("user", [3])[0].text == "three"


def test_a_release_that_holds_nobody_stays(workspace: Workspace) -> None:
    first = publish_rows(workspace, "items", texts({("item", 1): "film"})).name
    second = publish_rows(workspace, "full", FULL).name
    assert find_rows(workspace, "user", np.array([3])).releases == [second]
    assert {m.name for m in list_releases(workspace)} == {first, second}


def test_what_is_published_later_leaves_them_out(workspace: Workspace) -> None:
    write_tombstones(workspace, np.array([1]))
    publish_chain(workspace)
    assert find_rows(workspace, "user", np.array([1])).rows == 0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisReleases]:
    with redis_server(tmp_path) as url:
        yield RedisReleases(url)


def held(redis: RedisReleases) -> dict[bytes, bytes]:
    """Every key of the server with what it holds."""
    return {key: redis.client.get(key) for key in redis.client.scan_iter()}


@pytest.mark.process
@needs_redis
def test_redis_is_silent_at_once_and_then_empty(workspace: Workspace, redis: RedisReleases) -> None:
    publish_chain(workspace)
    name = push(workspace, redis)
    user = (1).to_bytes(8, "big")
    assert redis.open(name).store.get("user", [1])[0].text == "uno"
    assert redis.forgotten() == ""
    write_tombstones(workspace, np.array([1]))
    push_tombstones(workspace, redis)
    assert redis.forgotten() == read_tombstones(workspace).mark
    check_store = redis.open(name).store
    assert check_store.get("user", [1]) == [None]
    assert any(key.endswith(b"u" + user) for key in held(redis))
    assert forget_in_redis(redis, np.array([1, 77])) == 9  # two of texts, vectors, codes and behaviors; an older vector
    assert not any(b"u" + user in key for key in held(redis))
    assert not any(user[::-1] in value for key, value in held(redis).items() if b":ids:user" in key)
    assert check_store.get("user", [3])[0].text == "three"
    assert push(workspace, redis, replace=True) == name  # nothing of it comes back
    assert not any(user[::-1] in value for key, value in held(redis).items() if b":ids:user" in key)
    assert not any(b"u" + user in key for key in held(redis))


def test_a_store_of_any_kind_can_be_silenced(workspace: Workspace) -> None:
    write_tombstones(workspace, np.array([1]))
    store = TombstonedStore(MemoryStore(FULL, 2), read_tombstones(workspace))
    assert [k and k.text for k in store.get("user", [1, 3])] == [None, "three"]
    assert store.count("user") == 2
    assert Release(MemoryStore(FULL, 2), list_releases(workspace) or [None]).tombstones.mark == ""
