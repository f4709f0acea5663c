"""A publish or a compaction that is killed at any step leaves what was current in force, and simply runs again."""

import pytest
from release_rows import FULL, Rows, answers, check, publish_chain, publish_rows

from owlrec.storage import fingerprint
from owlrec.store import compact, current_release, open_release
from owlrec.store.manifest import read_manifest
from owlrec.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def killed(*args, **kwargs):
    raise KeyboardInterrupt


PUBLISH_STEPS = [
    "owlrec.store.publishing.remove_leftovers",
    "owlrec.store.publishing._building_folder",
    "owlrec.store.lmdb_writer.LmdbWriter.add_knowledge",
    "owlrec.store.lmdb_writer.LmdbWriter.add_vectors",
    "owlrec.store.lmdb_writer.LmdbWriter.add_memberships",
    "owlrec.store.lmdb_writer.LmdbWriter.add_rows",
    "owlrec.store.lmdb_writer.LmdbWriter.check_partitions",
    "owlrec.store.lmdb_writer.LmdbWriter.close",
    "owlrec.store.publishing._free_name",
    "owlrec.store.publishing.open_parts",
    "owlrec.store.publishing.count_new_ids",
    "owlrec.store.publishing.file_digest",
    "owlrec.store.publishing.open_store",
    "owlrec.store.publishing.check_files",
    "owlrec.store.publishing.place",
    "owlrec.store.placing._sync",
    "owlrec.store.publishing.make_current",
    "owlrec.store.release._write_pointer",
]


@pytest.mark.parametrize("step", PUBLISH_STEPS)
def test_a_delta_publish_killed_at_any_step_changes_nothing_and_runs_again(workspace, monkeypatch, step):
    full = publish_rows(workspace, "full", FULL).name
    rows = Rows(texts={("user", 1): (1, "new", "ok")}, vectors={("user", 1): [[5, 5]]}, cohorts={("user", 1): (8,)})
    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises(KeyboardInterrupt):
            publish_rows(workspace, "d", rows, delta_of=full)
    assert current_release(workspace) == full
    with open_release(workspace) as opened:
        assert opened.store.get("user", [1])[0].text == "one"
    delta = publish_rows(workspace, "d", rows, delta_of=full)
    assert delta.fingerprint == fingerprint("d")
    assert sorted(workspace.names("releases")) == sorted(["CURRENT", full, delta.name])
    with open_release(workspace) as opened:
        assert opened.store.get("user", [1])[0].text == "new"


COMPACT_STEPS = [
    "owlrec.store.compaction.open_release",
    "owlrec.store.compaction.merged_rows",
    "owlrec.store.lmdb_store.LmdbStore.items",
    "owlrec.store.lmdb_writer.LmdbWriter.add_rows",
    "owlrec.store.lmdb_writer.LmdbWriter.close",
    "owlrec.store.publishing._building_folder",
    "owlrec.store.publishing.file_digest",
    "owlrec.store.publishing.open_store",
    "owlrec.store.publishing.place",
    "owlrec.store.placing._sync",
    "owlrec.store.compaction.current_release",
    "owlrec.store.compaction.make_current",
    "owlrec.store.release._write_pointer",
]


@pytest.mark.parametrize("step", COMPACT_STEPS)
def test_a_compaction_killed_at_any_step_changes_nothing_and_runs_again(workspace, monkeypatch, step):
    names = publish_chain(workspace)
    expected = fingerprint("compaction", [read_manifest(workspace, name).fingerprint for name in reversed(names)])

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
