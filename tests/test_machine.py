"""The node's cache: fetched once whoever asks, checked, evicted by age and never while open."""

import hashlib
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from owlrec.errors import WorkspaceError
from owlrec.machine import NodeCache


def writing(data: bytes, calls: list[int] | None = None) -> object:
    def fetch(path: Path) -> None:
        if calls is not None:
            calls.append(1)
        path.write_bytes(data)

    return fetch


def names(cache: NodeCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}


def test_threads_that_ask_at_once_fetch_once(tmp_path: Path) -> None:
    cache, calls = NodeCache(tmp_path, 100), []

    def slow(path: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        path.write_bytes(b"12345")

    def ask() -> None:
        with cache.open("k", 5, slow) as copy:
            assert copy.path.read_bytes() == b"12345"

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_the_longest_unused_goes_first_and_what_is_open_never(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10)
    cache.open("old", 4, writing(b"1111")).close()
    held = cache.open("held", 4, writing(b"2222"))
    time.sleep(0.01)
    cache.open("new", 4, writing(b"3333")).close()
    assert names(cache) == {"held", "new"}
    with pytest.raises(WorkspaceError, match="do not fit in addition to 4"):
        cache.open("large", 8, writing(b"4" * 8))
    assert "held" in names(cache)
    held.close()
    cache.open("large", 8, writing(b"4" * 8)).close()
    assert names(cache) == {"large"}


def test_what_arrives_damaged_is_not_kept(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)
    with pytest.raises(WorkspaceError, match="3 of 5 bytes arrived"):
        cache.open("short", 5, writing(b"123"))
    with pytest.raises(WorkspaceError, match="stored file is damaged"):
        cache.open("wrong", 5, writing(b"12345"), hashlib.sha256(b"54321").hexdigest())
    assert names(cache) == set()
    cache.open("right", 5, writing(b"12345"), hashlib.sha256(b"12345").hexdigest()).close()
    assert names(cache) == {"right"}


def test_a_mapped_copy_stays_as_long_as_its_owner(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 5)

    class Owner:
        pass

    owner = Owner()
    cache.open("k", 5, writing(b"12345")).keep_for(owner)
    with pytest.raises(WorkspaceError):
        cache.open("other", 5, writing(b"54321"))
    del owner
    cache.open("other", 5, writing(b"54321")).close()


def _hold(folder: str, opened: object, done: object) -> None:
    copy = NodeCache(Path(folder), 5).open("k", 5, writing(b"12345"))
    opened.set()
    done.wait()
    copy.close()


def test_another_process_keeps_its_copy_until_it_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    opened, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), opened, done))
    other.start()
    opened.wait()
    cache, calls = NodeCache(tmp_path, 5), []
    cache.open("k", 5, writing(b"12345", calls)).close()
    assert not calls
    with pytest.raises(WorkspaceError):
        cache.open("other", 5, writing(b"54321"))
    other.kill()
    other.join()
    cache.open("other", 5, writing(b"54321")).close()
