"""Pruning takes nothing that is current, recent, young or needed, and leaves no half release behind."""

from datetime import UTC, datetime, timedelta

import pytest
from release_rows import DELTAS, FULL, publish_chain, publish_rows, texts

from owlrec.errors import ReleaseError
from owlrec.releases import current_release, list_releases, open_release, retention, roll_back
from owlrec.releases.release import release_events
from owlrec.releases.retention import prune
from owlrec.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def age(workspace, name, seconds):
    path = f"releases/{name}/release.json"
    manifest = workspace.read_json(path)
    manifest["created"] = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
    workspace.write_json(path, manifest)


def test_prune_keeps_what_is_current_recent_young_or_needed(workspace, monkeypatch):
    names = publish_chain(workspace)
    old = [publish_rows(workspace, text, FULL).name for text in "abc"]
    delta = publish_rows(workspace, "on c", texts({("user", 1): "x"}), delta_of=old[2]).name
    publish_rows(workspace, "d", FULL)
    for manifest in list_releases(workspace):
        age(workspace, manifest.name, 7200)
    young = publish_rows(workspace, "young", FULL).name
    current = roll_back(workspace)  # a reader of `young` may still be around
    history = workspace.read_json("releases/CURRENT")
    monkeypatch.setenv("OWLREC_ACTOR", "nightly")
    assert prune(workspace, keep=2) == sorted([*names, old[0], old[1]])
    events = release_events(workspace)
    assert {(e.event, e.release) for e in events if e.by == "nightly"} == {("remove", n) for n in (*names, *old[:2])}
    assert ("rollback", current) in [(e.event, e.release) for e in events if e.by != "nightly"]
    assert {e.release for e in events if e.event == "publish"} >= {*names, *old, delta, young}
    left = [m.name for m in list_releases(workspace)]
    assert sorted(left) == sorted([old[2], delta, current, young])  # c, since the delta is read on top of it
    assert workspace.read_json("releases/CURRENT") == history
    assert prune(workspace, keep=1, min_age_s=7000) == sorted([old[2], delta])
    assert prune(workspace, keep=0, min_age_s=0) == [young]
    assert [m.name for m in list_releases(workspace)] == [current]


def test_rolling_back_passes_over_what_was_pruned(workspace):
    a = publish_rows(workspace, "a", FULL).name
    b = publish_rows(workspace, "b", FULL).name
    for release in (a, b):
        age(workspace, release, 7200)
    for label in "abab":  # so that the history ends a, b, a, b
        publish_rows(workspace, label, FULL)
    c = publish_rows(workspace, "c", FULL).name
    assert prune(workspace, keep=2) == [a]
    assert roll_back(workspace) == b
    with pytest.raises(ReleaseError, match="nothing to roll back to"):
        roll_back(workspace)
    assert roll_back(workspace, to=c) == c


def test_prune_refuses_where_it_cannot_know_what_is_needed(workspace):
    assert prune(workspace) == []
    name = publish_rows(workspace, "a", FULL).name
    workspace.delete_file("releases/CURRENT")
    with pytest.raises(ReleaseError, match="no release is current"):
        prune(workspace, min_age_s=0)
    roll_back(workspace, to=name)
    other = publish_rows(workspace, "b", FULL).name
    workspace.write_bytes(f"releases/{name}/release.json", b"{")
    with pytest.raises(ReleaseError, match="unreadable"):
        prune(workspace, min_age_s=0)
    assert workspace.names("releases") == sorted([name, other, "CURRENT"])


def test_prune_spares_what_a_roll_back_makes_current_meanwhile(workspace, monkeypatch):
    names = [publish_rows(workspace, "full", FULL).name]
    names.append(publish_rows(workspace, "delta", DELTAS[0], delta_of=names[0]).name)
    gone, current = (publish_rows(workspace, label, FULL).name for label in ("gone", "current"))
    real = Workspace.delete_dir

    def rolled_back(self, *parts):
        real(self, *parts)
        if parts[0] == "releases" and current_release(workspace) == current:
            roll_back(workspace, to=names[-1])

    monkeypatch.setattr(Workspace, "delete_dir", rolled_back)
    monkeypatch.setattr(retention, "sorted", lambda doomed: [gone, *names], raising=False)
    assert prune(workspace, keep=1, min_age_s=0) == [gone]
    with open_release(workspace) as opened:
        assert opened.name == names[-1]


def test_a_prune_that_is_interrupted_leaves_no_half_release(workspace, monkeypatch):
    old = publish_rows(workspace, "a", FULL).name
    publish_rows(workspace, "b", FULL)
    real = Workspace.delete_dir

    def killed(self, *parts):
        if parts[0] == "releases":
            raise KeyboardInterrupt
        real(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "delete_dir", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(workspace, keep=1, min_age_s=0)
    assert workspace.exists("releases", old, "parts", "00000.lmdb")
    assert [m.name for m in list_releases(workspace)] == [current_release(workspace)]
