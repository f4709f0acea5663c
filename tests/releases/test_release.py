"""Publishing is atomic and idempotent, the pointer rolls back, readers keep what they opened, damage is found."""

import os
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pyarrow as pa
import pytest

from owlrec.errors import ReleaseError, SchemaError
from owlrec.releases import (
    ReleaseInfo,
    current_release,
    list_releases,
    measure_lookup,
    open_release,
    publish,
    publishing,
    roll_back,
)
from owlrec.schema import KNOWLEDGE, vectors_schema
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace


def knowledge(text: str, n: int = 3, kind: str = "user") -> pa.Table:
    defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    rows = [{**defaults, "kind": kind, "id": i, "as_of": 1000 + i, "text": f"{text} {i}"} for i in range(n)]
    return pa.Table.from_pylist(rows, KNOWLEDGE)


def vectors(n: int = 3, kind: str = "user", dim: int = 4) -> pa.Table:
    rows = [np.full(dim, i, dtype=np.float16) for i in range(n)]
    return pa.table(
        {"kind": [kind] * n, "id": list(range(n)), "vector": rows, "codes": [[]] * n}, schema=vectors_schema(dim)
    )


def info(text: str) -> ReleaseInfo:
    return ReleaseInfo(fingerprint=fingerprint(text), model="smollm2-135m", encoder="minilm")


def published(workspace: Workspace, text: str) -> str:
    return publish(workspace, knowledge=[knowledge(text)], vectors=[vectors()], info=info(text)).name


def current_text(workspace: Workspace) -> str:
    with open_release(workspace) as release:
        return release.store.get("user", [1])[0].text


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


@pytest.fixture
def remote():
    return Workspace(f"memory://bucket-{uuid.uuid4().hex}/ws")


def test_a_release_says_what_it_holds(workspace):
    manifest = publish(
        workspace,
        knowledge=[knowledge("a"), knowledge("f", 2, "item")],
        vectors=[vectors(), vectors(2, "item")],
        info=info("a"),
    )
    assert manifest.name.endswith(fingerprint("a")[:8])
    assert (manifest.knowledge, manifest.vectors) == ({"user": 3, "item": 2}, {"user": 3, "item": 2})
    assert (manifest.dim, manifest.as_of_min, manifest.as_of_max) == (4, 1000, 1002)
    assert list_releases(workspace) == [manifest]
    assert current_release(workspace) == manifest.name
    with open_release(workspace) as release:
        assert release.manifest == manifest
        assert [k and k.text for k in release.store.get("item", [1, 2])] == ["f 1", None]
        assert release.store.vectors("item", [1, 2])[0].tolist() == [[1] * 4, [0] * 4]
        assert release.store.count("user") == 3
        assert release.store.count("cohort") == 0


def test_publishing_the_same_again_gives_the_same_release_and_reads_no_row(workspace):
    first, second = published(workspace, "a"), published(workspace, "b")

    def unread():
        raise AssertionError("the tables of a release that exists must not be read")
        yield

    assert publish(workspace, knowledge=unread(), vectors=unread(), info=info("a")).name == first
    assert current_release(workspace) == first
    assert [m.name for m in list_releases(workspace)] == sorted([first, second])
    assert current_text(workspace) == "a 1"


def test_a_damaged_release_is_built_again_under_a_new_name(workspace):
    first = published(workspace, "a")
    store = workspace.local_path("releases", first, "store.lmdb")
    store.write_bytes(store.read_bytes()[:-1] + b"!")
    assert published(workspace, "a") != first
    assert current_text(workspace) == "a 1"


def test_rolling_back_goes_back_step_by_step_and_forward_by_name(workspace):
    a, b, c = (published(workspace, text) for text in "abc")
    assert roll_back(workspace) == b
    assert current_text(workspace) == "b 1"
    assert roll_back(workspace) == a
    with pytest.raises(ReleaseError, match="nothing to roll back to"):
        roll_back(workspace)
    assert current_text(workspace) == "a 1"
    assert roll_back(workspace, to=c) == c
    assert roll_back(workspace) == a
    with pytest.raises(ReleaseError, match="holds no release 'nope'"):
        roll_back(workspace, to="nope")
    assert current_release(workspace) == a


def test_rolling_back_skips_releases_that_were_deleted(workspace):
    a, b, _ = (published(workspace, text) for text in "abc")
    workspace.delete_dir("releases", b)
    assert roll_back(workspace) == a


def test_a_reader_keeps_its_release_across_a_swap(workspace):
    published(workspace, "a")
    with open_release(workspace) as reader:
        published(workspace, "b")
        assert reader.store.get("user", [1])[0].text == "a 1"
        assert current_text(workspace) == "b 1"
        roll_back(workspace)
        assert reader.store.get("user", [1])[0].text == "a 1"


KILLED = """
import sys, time
sys.path[:0] = [{platform!r}, {tests!r}]
from test_release import Workspace, info, knowledge, publish, vectors
def tables():
    yield knowledge("b")
    print("in the middle", flush=True)
    time.sleep(60)
publish(Workspace({root!r}), knowledge=tables(), vectors=[vectors()], info=info("b"))
"""


def test_a_publish_killed_in_the_middle_leaves_nothing_visible_and_is_cleaned_up(workspace):
    first = published(workspace, "a")
    here = os.path.dirname(__file__)
    code = KILLED.format(platform=os.path.join(here, "../../platform"), tests=here, root=workspace.base)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"in the middle\n"
    assert publishing.remove_leftovers(workspace) == []  # the child is alive: its build is none of our business
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folder = workspace.local_path("releases")
    assert [m.name for m in list_releases(workspace)] == [first]
    assert current_text(workspace) == "a 1"
    assert len([p for p in folder.iterdir() if p.name.startswith(".building")]) == 1
    second = published(workspace, "b")
    assert sorted(p.name for p in folder.iterdir()) == sorted([first, second, "CURRENT"])
    assert current_text(workspace) == "b 1"


def test_old_builds_of_other_hosts_are_cleaned_up_and_foreign_folders_are_not(workspace):
    folder = workspace.local_path("releases")
    for name in (".building-elsewhere-1-0123abcd", ".building-elsewhere-2-0123abcd", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "store.lmdb").touch()
    long_ago = time.time() - 3700
    for path in (folder / ".building-elsewhere-1-0123abcd", folder / "notes"):
        os.utime(path / "store.lmdb", (long_ago, long_ago))
        os.utime(path, (long_ago, long_ago))
    assert publishing.remove_leftovers(workspace) == [".building-elsewhere-1-0123abcd"]
    assert (folder / "notes").exists()


def test_a_failing_publish_leaves_nothing(workspace):
    def tables():
        yield knowledge("a")
        yield knowledge("a")

    with pytest.raises(SchemaError, match="user 0 occurs twice"):
        publish(workspace, knowledge=tables(), vectors=[], info=info("a"))
    with pytest.raises(ReleaseError, match="no knowledge to publish"):
        publish(workspace, knowledge=[], vectors=[], info=info("a"))
    assert list(workspace.local_path("releases").iterdir()) == []
    with pytest.raises(ReleaseError, match="nothing was published yet"):
        open_release(workspace)


def test_a_row_that_does_not_read_back_stops_the_publish(workspace, monkeypatch):
    monkeypatch.setattr("owlrec.releases.lmdb_store.LmdbStore.raw", lambda self, database, key: b"other")
    with pytest.raises(ReleaseError, match="does not read back"):
        published(workspace, "a")
    assert list_releases(workspace) == []


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])


@pytest.mark.parametrize(("how", "message"), [("missing", "missing"), ("cut short", "bytes"), ("flipped", "SHA-256")])
def test_damage_to_the_data_is_found_on_opening(workspace, how, message):
    name = published(workspace, "a")
    damage(workspace.local_path("releases", name, "store.lmdb"), how)
    with pytest.raises(ReleaseError, match=rf"store\.lmdb.*{message}.*publish again"):
        open_release(workspace)


def test_an_unreadable_manifest_or_pointer_is_an_error_with_the_next_step(workspace):
    name = published(workspace, "a")
    manifest = workspace.local_path("releases", name, "release.json")
    good = manifest.read_text()
    manifest.write_text(good[:20])
    with pytest.raises(ReleaseError, match="publish again"):
        open_release(workspace)
    manifest.write_text(good.replace('"format": 1', '"format": 99'))
    with pytest.raises(ReleaseError, match="format 99"):
        open_release(workspace)
    manifest.write_text(good)
    workspace.local_path("releases", "CURRENT").write_text("{}")
    with pytest.raises(ReleaseError, match="CURRENT is unreadable"):
        open_release(workspace)
    assert open_release(workspace, name).name == name


def test_a_wrong_name_is_answered_with_the_nearest(workspace):
    name = published(workspace, "a")
    with pytest.raises(ReleaseError, match=f"Did you mean '{name}'"):
        open_release(workspace, name[:-1])


def test_a_remote_release_is_copied_once_verified_and_mended(remote, tmp_path):
    first = published(remote, "a")
    with open_release(remote, cache=tmp_path) as release:
        assert release.store.get("user", [1, 9])[0].text == "a 1"
        copy = release.folder / "store.lmdb"
        stamp = copy.stat().st_mtime_ns
    with open_release(remote, cache=tmp_path):
        assert copy.stat().st_mtime_ns == stamp
    damage(copy, "flipped")
    with open_release(remote, cache=tmp_path) as release:
        assert release.store.vectors("user", [1])[0].tolist() == [[1] * 4]
    published(remote, "b")
    assert roll_back(remote) == first
    assert [p.name for p in tmp_path.iterdir()] == [copy.parent.name]  # no temporary copies stay


def test_a_remote_release_damaged_at_its_origin_is_refused(remote, tmp_path):
    name = published(remote, "a")
    path = f"releases/{name}/store.lmdb"
    remote.write_bytes(path, remote.read_bytes(path)[:-1] + b"!")
    with pytest.raises(ReleaseError, match="SHA-256"):
        open_release(remote, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_upload_is_no_release(remote, monkeypatch):
    first = published(remote, "a")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            published(remote, "b")
    assert len(remote.names("releases")) == 3  # CURRENT, the release, the upload without release.json
    assert [m.name for m in list_releases(remote)] == [first]
    assert current_release(remote) == first


def test_lookup_latency_is_measured(workspace):
    published(workspace, "a")
    with open_release(workspace) as release:
        figures = measure_lookup(release, "user", release.store.ids("user"), n=50)
        assert figures["n"] == 50
        assert 0 < figures["knowledge_p50_us"] <= figures["knowledge_p99_us"] < 1e6
        assert measure_lookup(release, "cohort", release.store.ids("cohort")) == {"n": 0.0}
