"""Vectors are found by id in whichever shard they are, mapped, and told apart from ids without one."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.encoding import vectors as vector_shards
from owlrec.encoding.compression import Quantizer, SemanticIdConfig
from owlrec.encoding.vectors import VectorShard, VectorShards
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ids import shard_of
from owlrec.workspace import Workspace, shard_file

CORNERS = np.array([[0, 0], [4, 0], [0, 4], [4, 4]], dtype=np.float32)
BY_HAND = Quantizer(SemanticIdConfig(levels=2, codes_per_level=4), (CORNERS, CORNERS / 4))


def write_shards(
    workspace: Workspace, ids: np.ndarray, vectors: np.ndarray, n_shards: int, quantizer: Quantizer | None = None
) -> VectorShards:
    """Shards of `ids`, the digest of each being its id in the first eight bytes."""
    workspace.fix_shards({"user": n_shards})
    for number in np.unique(shard_of(ids, n_shards)).tolist():
        rows = np.flatnonzero(shard_of(ids, n_shards) == number)
        rows = rows[np.argsort(ids[rows])]
        digests = np.zeros((len(rows), 16), np.uint8)
        digests[:, :8] = ids[rows].astype("<i8")[:, None].view(np.uint8)
        codes, fingerprint = np.zeros((len(rows), 0), np.uint16), ""
        if quantizer:
            codes = np.c_[quantizer.encode(vectors[rows]), rows].astype(np.uint16)
            fingerprint = quantizer.fingerprint
        as_of = np.zeros(len(rows), np.int64)
        shard = VectorShard("user", ids[rows], as_of, vectors[rows].astype(np.float16), digests, codes, fingerprint)
        table = shard.table()
        workspace.write_arrow(f"v/knowledge-user/{shard_file(number, '.arrow')}", table, table.schema)
    return VectorShards(workspace, "v", "knowledge-user")


@settings(max_examples=40)
@given(
    st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.integers(-2048, 2048), min_size=1, max_size=40),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10),
    st.sampled_from([1, 4, 64]),
)
def test_gather_equals_a_dictionary(held: dict[int, int], others: list[int], n_shards: int) -> None:
    """Integers to 2,048 are exact in float16."""
    workspace = Workspace(f"memory://{np.random.default_rng().integers(2**62)}")
    ids = np.array(list(held), np.int64)
    shards = write_shards(workspace, ids, np.array([[value, 1] for value in held.values()]), n_shards)
    wanted = np.array([*others, *held, *held], np.int64)
    vectors, mask = shards.gather(wanted)
    assert (vectors.dtype, vectors.shape) == (np.float16, (len(wanted), 2))
    assert mask.tolist() == [i in held for i in wanted.tolist()]
    assert vectors.tolist() == [[held[i], 1] if i in held else [0, 0] for i in wanted.tolist()]
    handles = shards.find(wanted)
    assert (handles >= 0).tolist() == mask.tolist()
    seen = np.zeros(len(wanted), np.int64)
    for _, shard, at, rows in shards.at(handles):
        seen[at] = shard.ids[rows]
    assert seen[mask].tolist() == wanted[mask].tolist()
    written = [shards.shard(number) for number in shards.numbers]
    assert sorted(i for shard in written if shard for i in shard.ids.tolist()) == sorted(held)


@settings(max_examples=60)
@given(
    st.sets(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 11)), max_size=20),
)
def test_who_names_a_moment_gets_what_was_known_before(
    known: set[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    workspace = Workspace(f"memory://{np.random.default_rng().integers(2**62)}")
    workspace.fix_shards({"user": 2})
    for number in range(2):
        keys = [(id_, as_of) for id_, as_of in sorted(known) if shard_of(np.array([id_]), 2)[0] == number]
        if keys:
            ids, as_of = np.array(keys).T
            vectors, no_codes = np.c_[ids, as_of].astype(np.float16), np.zeros((len(ids), 0), np.uint16)
            table = VectorShard("user", ids, as_of, vectors, np.zeros((len(ids), 16), np.uint8), no_codes).table()
            workspace.write_arrow(f"v/knowledge-user/{shard_file(number, '.arrow')}", table, table.schema)
    shards = VectorShards(workspace, "v", "knowledge-user")
    ids, moments = np.array(asked, np.int64).reshape(-1, 2).T
    vectors, mask = shards.gather(ids, moments)
    for (id_, moment), vector, has in zip(asked, vectors.tolist(), mask.tolist(), strict=True):
        earlier = [as_of for other, as_of in known if other == id_ and as_of < moment]
        assert has == bool(earlier)
        assert vector == ([id_, max(earlier)] if earlier else [0, 0])
    newest, mask = shards.gather(ids)
    for (id_, _), vector in zip(asked, newest.tolist(), strict=True):
        moments = [as_of for other, as_of in known if other == id_]
        assert vector == ([id_, max(moments)] if moments else [0, 0])


def test_vectors_are_mapped_not_copied(tmp_path: Path) -> None:
    shards = write_shards(Workspace(tmp_path), np.arange(10_000), np.ones((10_000, 64)), 2)
    before = pa.total_allocated_bytes()
    held = [shards.shard(number) for number in range(2)]
    assert pa.total_allocated_bytes() - before < 10_000 * 64  # half of what the vectors take
    assert all(not shard.vectors.flags.owndata and not shard.vectors.flags.writeable for shard in held if shard)


def test_few_of_many_shards_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_shards, "_MOST_OPEN", 3)
    read: list[str] = []
    original = VectorShard.read
    monkeypatch.setattr(VectorShard, "read", lambda w, path: (read.append(path), original(w, path))[1])
    workspace = Workspace(tmp_path)
    ids = np.arange(50)
    shards = write_shards(workspace, ids, np.c_[ids, ids], 1 << 17)
    first = shards.gather(ids[:1])
    assert len(read) == 1
    assert first[0].tolist() == [[0, 0]]
    assert shards.gather(ids)[0].tolist() == [[i, i] for i in range(50)]
    assert len(shards._open) == 3


def test_codes_come_with_the_digit_last(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    vectors = np.array([[4, 0], [5, 1], [0, 5]])
    shards = write_shards(workspace, np.array([30, 10, 20]), vectors, 4, BY_HAND)
    BY_HAND.save(workspace, "v/quantizers/knowledge-user")
    codes, mask = shards.codes(np.array([10, 99, 30]))
    assert (codes.tolist(), mask.tolist()) == ([[1, 3, 1], [0, 0, 0], [1, 0, 0]], [True, False, True])


def test_codes_of_other_codebooks_are_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    shards = write_shards(workspace, np.array([1]), np.array([[4, 0]]), 1)
    with pytest.raises(SchemaError, match=r"encoder\.semantic_ids"):
        shards.codes(np.array([1]))
    BY_HAND.save(workspace, "v/quantizers/knowledge-user")
    with pytest.raises(SchemaError, match=r"shard 0 .*none"):
        shards.codes(np.array([1]))


def test_a_sample_is_bounded_and_the_same_for_a_seed(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 2**62, 1000)
    shards = write_shards(Workspace(tmp_path), ids, np.c_[ids % 7, ids % 5], 16)
    drawn, vectors = shards.sample(300, seed=3)
    assert len(set(drawn.tolist())) == 300
    assert vectors.tolist() == np.c_[drawn % 7, drawn % 5].tolist()
    assert shards.sample(300, seed=3)[0].tolist() == drawn.tolist() != shards.sample(300, seed=4)[0].tolist()
    assert sorted(shards.sample(5000, seed=0)[0].tolist()) == sorted(ids.tolist())


def test_a_pickled_reader_finds_the_same(tmp_path: Path) -> None:
    shards = write_shards(Workspace(tmp_path), np.array([7]), np.array([[1.0, 2.0]]), 8)
    shards.gather(np.array([7]))
    assert pickle.loads(pickle.dumps(shards)).gather(np.array([7, 8]))[0].tolist() == [[1, 2], [0, 0]]


def test_damaged_or_missing_files_are_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.fix_shards({"user": 1})
    shards = VectorShards(workspace, "v", "knowledge-user")
    with pytest.raises(WorkspaceError, match="Run `encode` first"):
        shards.gather(np.array([1]))
    workspace.write_arrow("v/knowledge-user/00000000.arrow", t := pa.table({"id": [1], "kind": ["user"]}), t.schema)
    with pytest.raises(WorkspaceError, match=r"00000000\.arrow.*Run|00000000\.arrow.*run `encode` again"):
        VectorShards(workspace, "v", "knowledge-user").shard(0)
    workspace.write_bytes("v/knowledge-user/00000000.arrow", b"ARROW1 cut off")
    with pytest.raises(WorkspaceError, match=r"00000000\.arrow"):
        VectorShards(workspace, "v", "knowledge-user").shard(0)
