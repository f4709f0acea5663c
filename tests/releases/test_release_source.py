"""Stores by the scheme of their address: one file and one line make a new one, and an unknown scheme is refused."""

import pytest
from own_store import MemoryReleases
from release_rows import answers, check, publish_chain

from owlrec.errors import ReleaseError
from owlrec.releases.format import chain
from owlrec.releases.release import STORES, open_store
from owlrec.workspace import Workspace


def test_a_new_store_is_one_file_and_one_line(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STORES, "memory", "own_store.MemoryReleases")
    source = open_store("memory://here")
    assert source.current() is None
    newest = publish_chain(workspace)[-1]
    monkeypatch.setitem(MemoryReleases.held, "memory://here", (answers(), chain(workspace, newest)[0]))
    assert source.current() == newest
    with source.open(newest) as release:
        assert release.name == newest
        check(release.store, answers(), range(12))


def test_an_address_of_no_store_is_refused_with_the_nearest() -> None:
    with pytest.raises(ReleaseError, match=r"'redi' is not a known store scheme\. Did you mean 'redis'"):
        open_store("redi://127.0.0.1:6379/0")
