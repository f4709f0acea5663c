"""A publish or a compaction that is killed at any step leaves what was current, and simply runs again."""

import pytest
from release_rows import FULL, Rows, answers, check, publish_chain, publish_rows

from owlrec.releases import current_release, open_release
from owlrec.releases.format import read_manifest
from owlrec.releases.retention import compact
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def killed(*args, **kwargs):
    raise KeyboardInterrupt


PUBLISH_STEPS = [
    "owlrec.releases.build.whole_release",
    "owlrec.releases.build.RowsInMemory.of",
    "owlrec.releases.build._begin",
    "owlrec.releases.build.PartStage.run",
    "owlrec.releases.parts.PartWriter.add_knowledge",
    "owlrec.releases.parts.PartWriter.add_vectors",
    "owlrec.releases.parts.PartWriter.add_memberships",
    "owlrec.releases.parts.PartWriter.add_rows",
    "owlrec.releases.parts.PartWriter.close",
    "owlrec.storage.Storage.upload",
    "owlrec.releases.build.read_part_ids",
    "owlrec.shards.Artifact.finish",
    "owlrec.releases.build._manifest",
    "owlrec.releases.build.make_current",
    "owlrec.storage.Pointer._swap",
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
    "owlrec.releases.retention.check_files",
    "owlrec.releases.retention.open_part",
    "owlrec.releases.retention.merged_rows",
    "owlrec.releases.lmdb.LmdbFile.items",
    "owlrec.releases.parts.PartWriter.add_rows",
    "owlrec.releases.parts.PartWriter.close",
    "owlrec.releases.build._write_quantizers",
    "owlrec.storage.Storage.upload",
    "owlrec.releases.build._manifest",
    "owlrec.releases.retention.make_current",
    "owlrec.storage.Pointer._swap",
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
