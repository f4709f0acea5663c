"""Releases without users: lookups, parts, chains and copies in Redis."""

import fnmatch
from collections.abc import Iterator

import numpy as np
import pytest
from own_store import MemoryStore  # type: ignore[import-not-found]
from release_rows import FULL, answers, check, publish_chain, publish_rows, texts  # type: ignore[import-not-found]

from owlrec.releases import current_release, list_releases, open_release
from owlrec.releases.interface import TombstonedStore
from owlrec.releases.redis import RedisReleases, forget_in_redis, push, push_tombstones
from owlrec.releases.release import Release
from owlrec.releases.retention import find_rows, rebuild_without_forgotten, remove_releases
from owlrec.tombstones import read_tombstones, write_tombstones
from owlrec.workspace import Workspace

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


class Server:
    """As much of Redis as a push and a lookup use."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    @staticmethod
    def _bytes(value: object) -> bytes:
        return value if isinstance(value, bytes) else str(value).encode()

    def set(self, key: object, value: object, ex: int | None = None) -> None:
        self.held[self._bytes(key)] = self._bytes(value)

    def mset(self, values: dict[object, object]) -> None:
        for key, value in values.items():
            self.set(key, value)

    def get(self, key: object) -> bytes | None:
        return self.held.get(self._bytes(key))

    def mget(self, keys: list[object]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def getrange(self, key: object, start: int, end: int) -> bytes:
        return (self.get(key) or b"")[start : None if end == -1 else end + 1]

    def exists(self, *keys: object) -> int:
        return sum(self._bytes(key) in self.held for key in keys)

    def expire(self, key: object, seconds: int) -> None:
        pass

    def unlink(self, *keys: object) -> int:
        return sum(self.held.pop(self._bytes(key), None) is not None for key in keys)

    delete = unlink

    def scan_iter(self, match: object = b"*", count: int = 0) -> Iterator[bytes]:
        pattern = self._bytes(match).decode()
        return iter([key for key in self.held if fnmatch.fnmatchcase(key.decode("latin-1"), pattern)])

    def pipeline(self, transaction: bool = False) -> "Pipeline":
        return Pipeline(self)


class Pipeline:
    """Calls that are made when they are executed."""

    def __init__(self, server: Server) -> None:
        self._server, self._calls = server, []

    def __getattr__(self, name: str):
        return lambda *arguments: self._calls.append((name, arguments))

    def execute(self) -> list[object]:
        return [getattr(self._server, name)(*arguments) for name, arguments in self._calls]


@pytest.fixture
def redis() -> RedisReleases:
    pytest.importorskip("redis")
    releases = RedisReleases("redis://localhost:1/0")
    releases.client = Server()
    return releases


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
    assert any(key.endswith(b"u" + user) for key in redis.client.held)
    assert forget_in_redis(redis, np.array([1, 77])) == 9  # two of texts, vectors, codes and behaviors; an older vector
    assert not any(b"u" + user in key for key in redis.client.held)
    assert not any(user[::-1] in value for key, value in redis.client.held.items() if b":ids:user" in key)
    assert check_store.get("user", [3])[0].text == "three"
    assert push(workspace, redis, replace=True) == name  # nothing of it comes back
    assert not any(user[::-1] in value for key, value in redis.client.held.items() if b":ids:user" in key)
    assert not any(b"u" + user in key for key in redis.client.held)


def test_a_store_of_any_kind_can_be_silenced(workspace: Workspace) -> None:
    write_tombstones(workspace, np.array([1]))
    store = TombstonedStore(MemoryStore(FULL, 2), read_tombstones(workspace))
    assert [k and k.text for k in store.get("user", [1, 3])] == [None, "three"]
    assert store.count("user") == 2
    assert Release(MemoryStore(FULL, 2), list_releases(workspace) or [None]).tombstones.mark == ""
