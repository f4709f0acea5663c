"""Compaction changes no answer, pruning takes nothing that is needed, and readers notice neither."""

import json
import threading
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from release_rows import Rows, check, publish_rows, texts
from typer.testing import CliRunner

from owlrec.errors import ReleaseError
from owlrec.store import compact, compaction, current_release, list_releases, open_release, prune, roll_back
from owlrec.store.lmdb_writer import LmdbWriter
from owlrec.store.manifest import read_manifest
from owlrec.workspace import Workspace, fingerprint
from pipelines.cli import app

FULL = Rows(
    texts={("user", 1): (1000, "one", "ok"), ("user", 3): (1000, "three", "ok"), ("cohort", 8): (2000, "war", "ok")},
    vectors={("user", 1): [[1, 0], [2, 0]], ("cohort", 8): [[3, 4]]},
    cohorts={("user", 2): (8,)},
)
DELTAS = [
    Rows(texts={("user", 1): (3000, "uno", "ok"), ("item", 5): (0, "film", "short")}, vectors={("user", 1): [[5, 5]]}),
    Rows(texts={("cohort", 8): (4000, "peace", "ok")}, cohorts={("user", 4): (8,), ("user", 2): ()}),
]


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def publish_chain(workspace):
    """A full release and two deltas, the last one current: their names, oldest first."""
    names = [publish_rows(workspace, "full", FULL).name]
    for number, rows in enumerate(DELTAS):
        names.append(publish_rows(workspace, f"delta {number}", rows, delta_of=names[-1]).name)
    return names


def answers():
    rows = Rows()
    for newer in (FULL, *DELTAS):
        rows.update(newer)
    return rows


def age(workspace, name, seconds):
    path = f"releases/{name}/release.json"
    manifest = workspace.read_json(path)
    manifest["created"] = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
    workspace.write_json(path, manifest)


def test_compaction_gives_one_full_release_with_the_same_answers(workspace):
    names = publish_chain(workspace)
    written = []
    manifest = compact(workspace, written.append)
    assert (manifest.delta, manifest.parent, manifest.dim) == (False, names[-1], 2)
    assert manifest.knowledge == manifest.totals == read_manifest(workspace, names[-1]).totals
    assert manifest.knowledge == {"user": 2, "item": 1, "cohort": 1}
    assert (manifest.vectors, manifest.partitions) == ({"user": 1, "cohort": 1}, {})  # the delta has one partition
    assert manifest.memberships == {"user": 2}
    assert (manifest.as_of_min, manifest.as_of_max) == (0, 4000)
    assert sum(written) == 4 + 2 + 2
    assert current_release(workspace) == manifest.name
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))
        assert opened.chain == (manifest,)


def test_compacting_a_full_release_does_nothing(workspace):
    with pytest.raises(ReleaseError, match="nothing was published yet"):
        compact(workspace)
    publish_rows(workspace, "full", FULL)
    before = list_releases(workspace)
    assert compact(workspace) == before[0]
    assert list_releases(workspace) == before


def test_rows_are_copied_in_bounded_batches(workspace, monkeypatch):
    publish_chain(workspace)
    sizes, real = [], LmdbWriter.add_rows

    def counted(self, database, pairs, *, name):
        sizes.append(len(pairs))
        real(self, database, pairs, name=name)

    monkeypatch.setattr(LmdbWriter, "add_rows", counted)
    monkeypatch.setattr(compaction, "_ROWS_AT_ONCE", 3)
    monkeypatch.setattr("owlrec.store.lmdb_store._ROWS_A_READ", 1)
    compact(workspace)
    assert sizes == [3, 1, 2, 2]
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))


def test_a_pointer_that_moves_meanwhile_is_left_alone(workspace):
    names = publish_chain(workspace)

    def refreshed(n):
        if len(names) == 3:
            names.append(publish_rows(workspace, "newer", texts({("user", 1): "newest"}), delta_of=names[-1]).name)

    with pytest.raises(ReleaseError, match=r"became current while .*Run `owlrec compact` again"):
        compact(workspace, refreshed)
    assert current_release(workspace) == names[-1]
    assert len([m for m in list_releases(workspace) if not m.delta]) == 2
    compact(workspace)
    with open_release(workspace) as opened:
        assert not opened.manifest.delta
        assert opened.store.get("user", [1])[0].text == "newest"


STEPS = [
    "owlrec.store.compaction.open_release",
    "owlrec.store.compaction.merged_rows",
    "owlrec.store.lmdb_store.LmdbStore.items",
    "owlrec.store.lmdb_writer.LmdbWriter.add_rows",
    "owlrec.store.lmdb_writer.LmdbWriter.close",
    "owlrec.store.publishing._building_folder",
    "owlrec.store.publishing.file_digest",
    "owlrec.store.publishing.open_store",
    "owlrec.store.publishing._place",
    "owlrec.store.publishing._sync",
    "owlrec.store.compaction.current_release",
    "owlrec.store.compaction.make_current",
    "owlrec.store.release._write_pointer",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_compaction_killed_at_any_step_changes_nothing_and_runs_again(workspace, monkeypatch, step):
    names = publish_chain(workspace)
    expected = fingerprint("compaction", [read_manifest(workspace, name).fingerprint for name in reversed(names)])

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises(KeyboardInterrupt):
            compact(workspace)
    assert current_release(workspace) == names[-1]
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))
    manifest = compact(workspace)
    assert manifest.fingerprint == expected
    assert sorted(workspace.names("releases")) == sorted([*names, manifest.name, "CURRENT"])


def test_damage_is_not_copied(workspace):
    names = publish_chain(workspace)
    file = workspace.local_path("releases", names[0], "store.lmdb")
    data = file.read_bytes()
    file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(ReleaseError, match="SHA-256"):
        compact(workspace)
    assert current_release(workspace) == names[-1]


def test_prune_keeps_what_is_current_recent_young_or_needed(workspace):
    names = publish_chain(workspace)
    old = [publish_rows(workspace, text, FULL).name for text in "abc"]
    delta = publish_rows(workspace, "on c", texts({("user", 1): "x"}), delta_of=old[2]).name
    publish_rows(workspace, "d", FULL)
    for manifest in list_releases(workspace):
        age(workspace, manifest.name, 7200)
    young = publish_rows(workspace, "young", FULL).name
    current = roll_back(workspace)  # a reader of `young` may still be around
    for release in (*names, old[0], old[1]):
        workspace.write_bytes(f"pools/{release}/user/tokens", b"")
    workspace.write_bytes(f"pools/{old[2]}/user/tokens", b"")
    history = workspace.read_json("releases/CURRENT")
    assert prune(workspace, keep=2) == sorted([*names, old[0], old[1]])
    left = [m.name for m in list_releases(workspace)]
    assert sorted(left) == sorted([old[2], delta, current, young])  # c, since the delta is read on top of it
    assert workspace.names("pools") == [old[2]]
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
    monkeypatch.setattr(compaction, "sorted", lambda doomed: [gone, *names], raising=False)
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
    assert workspace.exists("releases", old, "store.lmdb")
    assert [m.name for m in list_releases(workspace)] == [current_release(workspace)]


def test_a_reader_goes_on_reading_what_was_pruned(workspace):
    names = publish_chain(workspace)
    with open_release(workspace) as reader:
        compact(workspace)
        assert prune(workspace, keep=1, min_age_s=0) == sorted(names)
        assert not workspace.exists("releases", names[0])
        check(reader.store, answers(), range(10))
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))


def test_a_remote_workspace_is_compacted_and_pruned(tmp_path):
    remote = Workspace(f"memory://bucket-{uuid.uuid4().hex}/ws")
    name = publish_rows(remote, "full", FULL).name
    compacted = compact(remote, cache=tmp_path)
    assert compacted.name == name
    other = publish_rows(remote, "other", FULL).name
    assert prune(remote, keep=1, min_age_s=0) == [name]
    assert remote.names("releases") == sorted([other, "CURRENT"])


N = 5  # users with texts; user N is a member of cohort 8, item 0 tells the number of its release
ROUNDS = 40


def round_rows(number):
    """What release `number` changes: one user, the cohort and the item; every text and vector says `number`."""
    users = range(N) if number == 0 else [number % N]
    keys = [*(("user", u) for u in users), ("cohort", 8), ("item", 0)]
    return Rows(
        texts={key: (1, str(number), "ok") for key in keys},
        vectors={key: [[number, 1]] for key in keys},
        cohorts={("user", N): (8,)},
    )


def expected_numbers(number):
    """The number that each user's text has in release `number`, the member's last."""
    return [max((n for n in range(1, number + 1) if n % N == user), default=0) for user in range(N)] + [number]


def test_lookups_never_fail_nor_mix_releases_while_deltas_are_compacted_and_pruned(workspace):
    publish_rows(workspace, "0", round_rows(0))
    stop, wrong, seen = threading.Event(), [], [[], []]  # the numbers that each reader saw

    def read(numbers):
        while not stop.is_set():
            try:
                with open_release(workspace) as opened:
                    numbers.append(int(opened.store.get("item", [0])[0].text))
                    found = [int(k.text) for k in opened.store.get("user", range(N + 1))]
                    vectors = opened.store.vectors("user", range(N))[0][:, 0].tolist()
                    if found != expected_numbers(numbers[-1]) or vectors != found[:N]:
                        wrong.append((numbers[-1], found, vectors))
            except BaseException as error:  # whatever it is, the test must hear of it
                wrong.append(error)

    readers = [threading.Thread(target=read, args=(numbers,)) for numbers in seen]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, ROUNDS):
            publish_rows(workspace, str(number), round_rows(number), delta_of=current_release(workspace))
            if number % 4 == 0:
                compact(workspace)
            prune(workspace, keep=1, min_age_s=0)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    for numbers in seen:
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > ROUNDS // 4


def test_the_commands_say_what_they_did(workspace):
    names = publish_chain(workspace)
    run, root = CliRunner().invoke, ["--workspace", workspace.root]
    listed = run(app, ["releases", *root])
    assert listed.exit_code == 0
    lines = [line for line in listed.output.splitlines() if names[-1][-8:] in line]
    assert [names[-2] in line for line in lines] == [True]
    shown = run(app, ["lookup", "user", "4", *root])
    assert "peace" in shown.output
    assert "peace" in run(app, ["lookup", "cohort", "8", *root]).output
    compacted = run(app, ["compact", *root])
    assert f"release {current_release(workspace)} is current, in place of {names[-1]}" in compacted.output
    assert "full already" in run(app, ["compact", *root]).output
    assert "nothing to remove" in run(app, ["prune", *root]).output
    pruned = run(app, ["prune", "--keep", "1", "--min-age-hours", "0", *root])
    assert all(name in pruned.output for name in names)
    assert json.loads((workspace.local_path("releases", "CURRENT")).read_text())["history"][:3] == names
