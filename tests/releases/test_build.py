"""Parts: unions of whole shards, built on workers, resumable one by one; and what a part of any size is uploaded as."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from release_rows import CODE_SIZES, QUANTIZERS, Rows, check, tables

from owlrec import storage
from owlrec.errors import ReleaseError, SchemaError
from owlrec.ids import shard_of, stable_id
from owlrec.releases import build, current_release, open_release
from owlrec.releases.build import BUILDS, ReleaseInfo, ShardRows, publish_rows
from owlrec.releases.lmdb import part_of
from owlrec.releases.retention import prune
from owlrec.runner import Pool
from owlrec.schema import COHORTS, INTERACTIONS
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

N = 60  # users and items
LAST = 3  # behaviors that a release keeps
COHORT = stable_id("c")
INFO = ReleaseInfo(fingerprint=fingerprint("shards"), model="m", encoder="e")


def world() -> Rows:
    """Texts of most users and all items, vectors and codes of some, a cohort that stands in for the rest."""
    random = np.random.default_rng(0)
    rows = Rows(texts={("cohort", COHORT): (9, "group", "ok")}, vectors={("cohort", COHORT): [[0.0, 2.0]]})
    for kind in ("user", "item"):
        for id_ in range(N):
            if kind == "item" or id_ % 3:
                rows.texts[kind, id_] = (id_, f"{kind} {id_}", "ok")
            if id_ % 2:
                rows.vectors[kind, id_] = [[float(id_), 1.0]]
                rows.codes[kind, id_] = (*(int(random.integers(0, size)) for size in CODE_SIZES), id_ * 1000)
    rows.cohorts = {("user", id_): (COHORT,) for id_ in range(0, N, 5)}
    rows.behaviors = {
        user: [(100 + n, n, float(n % 5) if n % 2 else None, float(n % 2)) for n in range(max(0, user - LAST), user)]
        for user in range(1, N)
    }
    return rows


def interactions() -> pa.Table:
    """What `behaviors` of the world are the last of: user n's first item is 0, and so on up to n - 1."""
    rows = [
        {"user_id": user, "item_id": n, "timestamp": 100 + n, "label": float(n % 2)}
        | ({"rating": float(n % 5)} if n % 2 else {})
        for user in range(1, N)
        for n in range(user)
    ]
    return pa.Table.from_pylist(rows, INTERACTIONS)


def write_shards(workspace: Workspace, rows: Rows, shards: dict[str, int]) -> ShardRows:
    """Writes rows as `generate`, `encode` and `cohorts` do."""
    workspace.fix_shards(shards)
    given = {name: pa.concat_tables(pieces) for name, pieces in tables(rows).items()}
    given["vectors"] = given["vectors"].drop_columns(["partition"])
    members = [
        {"kind": kind, "id": id_, "facet": "liked", "cohort": "c", "similarity": 1.0}
        for (kind, id_), _ in rows.cohorts.items()
    ]
    given["cohorts"] = pa.Table.from_pylist([{k: r.get(k) for k in COHORTS.names} for r in members], COHORTS)
    for kind, n in shards.items():
        for folder, table, suffix in (
            (f"knowledge/k/{kind}", given["knowledge"], ".parquet"),
            (f"vectors/v/knowledge-{kind}", given["vectors"], ".arrow"),
            (f"cohorts/c/{kind}", given["cohorts"], ".parquet"),
        ):
            own = table.filter(pa.compute.equal(table["kind"], kind)).sort_by("id")
            homes = shard_of(own["id"].to_numpy(), n)
            for number in range(n):
                shard = own.filter(pa.array(homes == number))
                path = f"{folder}/{shard_file(number, suffix)}"
                if suffix == ".arrow":
                    workspace.write_arrow(path, shard, shard.schema)
                elif shard.num_rows:
                    workspace.write_parquet(path, shard)
    workspace.write_table("interactions", interactions(), key="user_id")
    return ShardRows("knowledge/k", "vectors/v", "cohorts/c", LAST)


@pytest.mark.parametrize("n_parts", [1, 4, 16])
def test_parts_hold_what_shards_hold_however_many_there_are(workspace, n_parts):
    rows = world()
    source = write_shards(workspace, rows, {"user": 8, "item": 2, "cohort": 1})
    cards = []
    manifest = publish_rows(workspace, INFO, source, n_parts, quantizers=QUANTIZERS, on_card=cards.append)
    assert len(cards) == len(manifest.parts) == n_parts
    assert manifest.totals == manifest.knowledge == dict(Counter(kind for kind, _ in rows.texts))
    assert manifest.vectors == dict(Counter(kind for kind, _ in rows.vectors))
    assert [part.ids.get("user", 0) for part in manifest.parts] == [
        sum(part_of(id_, n_parts) == part for kind, id_ in rows.texts if kind == "user") for part in range(n_parts)
    ]
    with open_release(workspace) as release:
        check(release.store, rows, range(N + 3))
        shuffled = np.random.default_rng(1).permutation(N + 20)
        answers = release.store.get("item", shuffled)
        assert [k and k.text for k in answers] == [f"item {i}" if i < N else None for i in shuffled.tolist()]


def test_the_part_of_an_id_is_its_hash():
    ids = np.random.default_rng(0).integers(0, 2**63, 1000)
    for n_parts in (1, 2, 512):
        assert [part_of(id_, n_parts) for id_ in ids.tolist()] == shard_of(ids, n_parts).tolist()


@pytest.mark.ray
def test_parts_are_built_on_ray(workspace, ray_local):
    rows = world()
    source = write_shards(workspace, rows, {"user": 8, "item": 2, "cohort": 1})
    pool = Pool(here=False, max_workers=2)
    publish_rows(workspace, INFO, source, 4, quantizers=QUANTIZERS, pool=pool)
    with open_release(workspace) as release:
        check(release.store, rows, range(N + 3))


def test_parts_are_built_from_and_on_an_object_store(s3_root):
    rows, workspace = world(), Workspace(s3_root)
    source = write_shards(workspace, rows, {"user": 8, "item": 2, "cohort": 1})
    publish_rows(workspace, INFO, source, 4, quantizers=QUANTIZERS)
    with open_release(workspace) as release:
        check(release.store, rows, range(N + 3))
        assert release.quantizers().keys() == QUANTIZERS.keys()


def test_codes_of_other_codebooks_are_refused(workspace):
    source = write_shards(workspace, world(), {"user": 1, "item": 1, "cohort": 1})
    path = f"vectors/v/knowledge-user/{shard_file(0, '.arrow')}"
    table = workspace.map_arrow(path)
    coded = table.replace_schema_metadata({"quantizer": "0" * 64})
    workspace.write_arrow(path, coded, coded.schema)
    with pytest.raises(SchemaError, match=r"00000000\.arrow: its codes .* codebooks 00000000"):
        publish_rows(workspace, INFO, source, 1, quantizers=QUANTIZERS)


KILLED = """
import sys, time
sys.path[:0] = [{platform!r}, {tests!r}]
from test_build import INFO, LAST, QUANTIZERS, ShardRows, Workspace, publish_rows
class Slow(ShardRows):
    def write(self, workspace, writer, part, n_parts):
        if part == 2:
            print("in the middle", flush=True)
            time.sleep(60)
        super().write(workspace, writer, part, n_parts)
slow = Slow("knowledge/k", "vectors/v", "cohorts/c", LAST)
publish_rows(Workspace({root!r}), INFO, slow, 4, quantizers=QUANTIZERS)
"""


@pytest.mark.process
def test_a_killed_publish_shows_nothing_and_the_next_builds_only_the_missing_parts(workspace):
    source = write_shards(workspace, world(), {"user": 8, "item": 2, "cohort": 1})
    here = os.path.dirname(__file__)
    code = KILLED.format(platform=os.path.join(here, "../../platform"), tests=here, root=workspace.base)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"in the middle\n"
        assert prune(workspace) == []  # its build is alive
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    [folder] = workspace.names("releases")
    assert current_release(workspace) is None
    cards = []
    manifest = publish_rows(workspace, INFO, source, 4, quantizers=QUANTIZERS, on_card=cards.append)
    assert manifest.name == folder
    assert sorted(card.shard for card in cards) == ["part/00000002", "part/00000003"]
    assert workspace.names(BUILDS) == []
    with open_release(workspace) as release:
        check(release.store, world(), range(N + 3))


def test_two_that_publish_the_same_build_one_release(workspace):
    source = write_shards(workspace, world(), {"user": 8, "item": 2, "cohort": 1})
    first = build._begin(workspace, INFO)
    assert build._begin(workspace, INFO) == first
    assert publish_rows(workspace, INFO, source, 2, quantizers=QUANTIZERS).name == first["name"]


def test_builds_are_given_up_after_a_day(workspace):
    source = write_shards(workspace, world(), {"user": 8, "item": 2, "cohort": 1})
    whole = publish_rows(workspace, INFO, source, 2, quantizers=QUANTIZERS).name
    names = []
    for label in ("old", "young"):
        info = INFO.model_copy(update={"fingerprint": fingerprint(label)})
        names.append(build._begin(workspace, info)["name"])
        workspace.write_bytes(f"releases/{names[-1]}/parts/00000.ids", b"")
    long_ago = workspace.entry(build._build_file(INFO.model_copy(update={"fingerprint": fingerprint("old")}))).modified
    file = workspace.local_path(build._build_file(INFO.model_copy(update={"fingerprint": fingerprint("old")})))
    os.utime(file, (long_ago - 90_000, long_ago - 90_000))
    workspace.write_bytes("releases/half-removed/parts/00000.lmdb", b"")
    workspace.write_bytes("releases/notes", b"")
    assert prune(workspace) == sorted([names[0], "half-removed"])
    assert workspace.names("releases") == sorted([whole, names[1], "CURRENT", "notes"])
    assert [json.loads(workspace.read_bytes(f"{BUILDS}/{f}"))["name"] for f in workspace.names(BUILDS)] == [names[1]]


def test_a_part_of_120_gb_is_planned_in_few_enough_pieces(tmp_path, monkeypatch):
    size = 120 * 10**9
    file = tmp_path / "part.lmdb"
    with file.open("wb") as sparse:
        sparse.truncate(size)
    plans = []

    def put(store, path, source, *, chunk_size, max_concurrency):
        plans.append((path, source.stat().st_size, chunk_size))
        return {"e_tag": "tag"}

    monkeypatch.setattr("obstore.put", put)
    remote = Workspace("memory://sparse")
    entry = remote.upload(file, "releases/r/parts/00000.lmdb", sha256="given")
    assert (entry.bytes, entry.e_tag) == (size, "tag")
    [(path, planned, piece)] = plans
    assert (path, planned) == ("releases/r/parts/00000.lmdb", size)
    assert -(-size // piece) <= 10_000  # what S3 takes
    assert piece <= 5 * 2**30  # bytes of a piece
    assert storage._piece_bytes(1) == 8 << 20
    for terabytes in (1, 5):  # the largest object
        assert -(-terabytes * 10**12 // storage._piece_bytes(terabytes * 10**12)) <= 10_000


def test_parts_whose_vectors_differ_in_length_are_refused(workspace, monkeypatch):
    workspace.fix_shards({"user": 4, "item": 1, "cohort": 1})
    source = write_shards(workspace, world(), {"user": 4, "item": 1, "cohort": 1})
    path = f"vectors/v/knowledge-user/{shard_file(1, '.arrow')}"
    table = workspace.map_arrow(path)
    wide = pa.array([[1.0, 2.0, 3.0]] * len(table), pa.list_(pa.float16(), 3))
    table = table.set_column(table.column_names.index("vector"), "vector", wide)
    workspace.write_arrow(path, table, table.schema)
    with pytest.raises((ReleaseError, SchemaError), match=r"2 and 3 components|3 components, but earlier ones have 2"):
        publish_rows(workspace, INFO, source, 4, quantizers=QUANTIZERS)
    assert current_release(workspace) is None
