"""Publishing is atomic and idempotent, the pointer rolls back, readers keep what they opened, damage is found."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from owlrec.errors import ReleaseError, SchemaError, WorkspaceError
from owlrec.machine import NodeCache
from owlrec.releases import build, current_release, list_releases, measure_lookup, open_release, roll_back
from owlrec.releases.build import BUILDS, ReleaseInfo, publish
from owlrec.releases.format import read_manifest
from owlrec.releases.lmdb import part_of
from owlrec.releases.release import make_current, pointer
from owlrec.schema import KNOWLEDGE, vectors_schema
from owlrec.storage import PointerHeld, fingerprint
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
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OWLREC_CACHE", str(tmp_path / "cache"))
    NodeCache.default.cache_clear()
    yield tmp_path / "cache"
    NodeCache.default.cache_clear()


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
    store = workspace.local_path("releases", first, "parts", "00000.lmdb")
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
    with pytest.raises(ReleaseError, match="no release 'nope'"):
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


def test_a_failing_publish_leaves_nothing(workspace):
    with pytest.raises(SchemaError, match="user 0 occurs twice"):
        publish(workspace, knowledge=[knowledge("a"), knowledge("a")], vectors=[], info=info("a"))
    with pytest.raises(ReleaseError, match="no knowledge to publish"):
        publish(workspace, knowledge=[], vectors=[], info=info("a"))
    assert workspace.names("releases") == workspace.names(BUILDS) == []
    with pytest.raises(ReleaseError, match="nothing has been published"):
        open_release(workspace)


def test_a_row_that_does_not_read_back_stops_the_publish(workspace, monkeypatch):
    monkeypatch.setattr("owlrec.releases.lmdb.LmdbFile.get_many", lambda self, database, keys: [b"other" for _ in keys])
    with pytest.raises(ReleaseError, match="read back differently"):
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
    damage(workspace.local_path("releases", name, "parts", "00000.lmdb"), how)
    with pytest.raises(ReleaseError, match=rf"00000\.lmdb.*{message}.*publish again"):
        open_release(workspace)


def test_an_unreadable_manifest_or_pointer_is_an_error_with_the_next_step(workspace):
    name = published(workspace, "a")
    manifest = workspace.local_path("releases", name, "release.json")
    good = manifest.read_text()
    manifest.write_text(good[:20])
    with pytest.raises(ReleaseError, match="publish again"):
        open_release(workspace)
    manifest.write_text(good.replace('"format": 6', '"format": 99'))
    with pytest.raises(ReleaseError, match="format 99"):
        open_release(workspace)
    manifest.write_text(good)
    workspace.local_path("releases", "CURRENT").write_text("{}")
    with pytest.raises(WorkspaceError, match="CURRENT is not a pointer"):
        open_release(workspace)
    assert open_release(workspace, name).name == name


def test_a_wrong_name_is_answered_with_the_nearest(workspace):
    name = published(workspace, "a")
    with pytest.raises(ReleaseError, match=f"Did you mean '{name}'"):
        open_release(workspace, name[:-1])


def copies(cache):
    return sorted(path for path in cache.glob("files/*") if path.suffix == "")


def test_a_remote_release_is_copied_once(remote, cache):
    first = published(remote, "a")
    with open_release(remote) as release:
        assert release.store.get("user", [1, 9])[0].text == "a 1"
        [copy] = copies(cache)
        stamp = copy.stat().st_ino
    with open_release(remote) as release:
        assert copy.stat().st_ino == stamp
        assert release.store.vectors("user", [1])[0].tolist() == [[1] * 4]
    published(remote, "b")
    assert roll_back(remote) == first
    assert copies(cache) == [copy]


def test_a_stage_that_needs_few_ids_fetches_few_parts(remote, cache, monkeypatch):
    monkeypatch.setattr(build, "PART_IDS", 10)
    publish(remote, knowledge=[knowledge("a", 80)], vectors=[vectors(80)], info=info("a"))
    with open_release(remote, lazily=True) as release:
        assert len(release.manifest.parts) == 8
        assert copies(cache) == []
        one_part = [id_ for id_ in range(80) if part_of(id_, 8) == 3]
        assert [k.text for k in release.store.get("user", one_part)] == [f"a {id_}" for id_ in one_part]
        assert len(copies(cache)) == 1
        assert release.store.ids("user").tolist() == list(range(80))
        assert len(copies(cache)) == 8


def test_a_remote_release_damaged_at_its_origin_is_refused(remote, cache):
    name = published(remote, "a")
    path = f"releases/{name}/parts/00000.lmdb"
    remote.write_bytes(path, remote.read_bytes(path)[:-1] + b"!")
    with pytest.raises(WorkspaceError, match="SHA-256"):
        open_release(remote)
    assert copies(cache) == []


def test_a_cache_that_holds_one_release_takes_them_in_turns(remote, cache, monkeypatch):
    names = [published(remote, text) for text in "abc"]
    size = read_manifest(remote, names[0]).bytes
    monkeypatch.setattr(NodeCache.default(), "max_bytes", size * 3 // 2)
    for name, text in [*zip(names, "abc", strict=True), (names[0], "a")]:
        with open_release(remote, name) as release:
            assert release.store.get("user", [1])[0].text == f"{text} 1"
            assert len(copies(cache)) == 1
    with open_release(remote, names[0]) as held:
        with pytest.raises(WorkspaceError, match=r"do not fit .*OWLREC_CACHE_GIB"):
            open_release(remote, names[1])
        assert held.store.get("user", [2])[0].text == "a 2"
    monkeypatch.setattr(NodeCache.default(), "max_bytes", size // 2)
    with pytest.raises(ReleaseError, match=rf"has {size:,} bytes, but .* {size // 2:,}"):
        open_release(remote, names[1])


def test_many_releases_pass_through_a_cache_of_two(remote, cache, monkeypatch):
    names = [published(remote, str(number)) for number in range(9)]
    size = read_manifest(remote, names[0]).bytes
    monkeypatch.setattr(NodeCache.default(), "max_bytes", 2 * size)
    held = open_release(remote, names[0])
    for number, name in enumerate(names):  # as a server does: the next one opens before the last one closes
        following = open_release(remote, name)
        held.close()
        held = following
        assert held.store.get("user", [0])[0].text == f"{number} 0"
        assert sum(path.stat().st_size for path in copies(cache)) <= 2 * size
    held.close()


def test_an_interrupted_upload_is_no_release(remote, monkeypatch):
    first = published(remote, "a")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            published(remote, "b")
    assert len(remote.names("releases")) == 3  # CURRENT, the release, the upload without release.json
    assert [m.name for m in list_releases(remote)] == [first]
    assert current_release(remote) == first
    published(remote, "b")
    assert len(remote.names("releases")) == 3


def test_a_hold_stops_every_swap_and_says_by_whom(workspace):
    first, second = published(workspace, "a"), published(workspace, "b")
    pointer(workspace).hold("bad texts", "ann@ops")
    delta = info("c").model_copy(update={"parent": second, "delta": True})
    for swap in (
        lambda: published(workspace, "c"),
        lambda: publish(workspace, knowledge=[knowledge("c", 1)], vectors=[], info=delta),
        lambda: roll_back(workspace),
    ):
        with pytest.raises(PointerHeld, match=r"on HOLD since 20.*Z by ann@ops: bad texts.*owlrec release unhold"):
            swap()
        assert current_release(workspace) == second
    pointer(workspace).lift()
    assert roll_back(workspace) == first


@pytest.mark.parametrize("place", ["workspace", "remote"])
def test_of_sixteen_that_publish_on_one_release_one_becomes_current(place, request):
    workspace = request.getfixturevalue(place)
    first = published(workspace, "first")
    names = []
    for number in range(16):
        names.append(published(workspace, str(number)))
        roll_back(workspace, to=first)
    ready = threading.Barrier(16)

    def swap(name):
        ready.wait()
        try:
            make_current(workspace, name, expected=first)
            return name
        except ReleaseError:
            return None

    with ThreadPoolExecutor(16) as pool:
        winners = [name for name in pool.map(swap, names) if name]
    assert winners == [current_release(workspace)]
    assert pointer(workspace).history == [first, *winners]


def test_a_delta_does_not_bring_back_what_was_rolled_back_meanwhile(workspace):
    first, second = published(workspace, "a"), published(workspace, "b")
    real = build.build_release

    def slow(*args, **kwargs):
        manifest = real(*args, **kwargs)
        roll_back(workspace)
        return manifest

    delta = info("c").model_copy(update={"parent": second, "delta": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_release", slow)
        with pytest.raises(ReleaseError, match=f"was built on {second}, but {first} is"):
            publish(workspace, knowledge=[knowledge("c", 1)], vectors=[], info=delta)
    assert current_release(workspace) == first


def test_lookup_latency_is_measured(workspace):
    published(workspace, "a")
    with open_release(workspace) as release:
        figures = measure_lookup(release.store, "user", release.store.ids("user"), n=50)
        assert figures["n"] == 50
        assert 0 < figures["knowledge_p50_us"] <= figures["knowledge_p99_us"] < 1e6
        assert measure_lookup(release.store, "cohort", release.store.ids("cohort")) == {"n": 0.0}
