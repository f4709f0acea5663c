"""Knowledge vectors by id: what is gathered, what is missing, and what a shuffle does, in memory and on disk alike."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import write_vectors

from owlrec.ctr import knowledge_tables
from owlrec.ctr.knowledge_tables import (
    SIMILARITIES,
    Cosines,
    Deciles,
    KnowledgeTable,
    MappedTable,
    VectorTable,
    open_vectors,
    refuse_two_encoders,
    similarity_features,
)
from owlrec.encoding.vectors import VectorShards
from owlrec.errors import RecipeError, SchemaError, WorkspaceError
from owlrec.ids import shard_of
from owlrec.workspace import Workspace

IDS = np.array([10, 30, 2**62])
VECTORS = np.array([[1, 1.5], [3, 3.5], [4, 4.5]], dtype=np.float16)
CODES = np.array([[3, 0], [0, 299], [1, 1]], dtype=np.uint16)
TABLE = KnowledgeTable(IDS, VECTORS, codes=CODES, code_sizes=(4, 300))


def on_disk(workspace: Workspace, table: KnowledgeTable = TABLE, n_shards: int = 4) -> VectorShards:
    workspace.fix_shards({"user": n_shards})
    write_vectors(workspace, "vectors/abc", "knowledge-user", table)
    return VectorShards(workspace, "vectors/abc", "knowledge-user")


def forms(workspace: Workspace) -> list[VectorTable]:
    shards = on_disk(workspace)
    return [TABLE, open_vectors(shards, (4, 300)), open_vectors(shards, (4, 300), held=False)]


def test_small_tables_are_held_and_large_ones_mapped(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = on_disk(workspace)
    assert isinstance(open_vectors(shards), KnowledgeTable)
    monkeypatch.setattr(knowledge_tables, "_HELD_BYTES", {"user": 100})
    assert isinstance(open_vectors(shards), MappedTable)


def test_all_forms_gather_in_the_order_asked_with_zeros_and_mask_for_misses(workspace: Workspace) -> None:
    for table in forms(workspace):
        assert (table.dim, table.code_sizes) == (2, (4, 300))
        vectors, mask = table.gather(np.array([2**62, 11, 10, 30, 10, -1, 2**63 - 1]))
        assert vectors.dtype == np.float16
        assert vectors.tolist() == [[4, 4.5], [0, 0], [1, 1.5], [3, 3.5], [1, 1.5], [0, 0], [0, 0]]
        assert mask.tolist() == [True, False, True, True, True, False, False]
        codes = table.gather_codes(np.array([2**62, 11, 10, 30]))
        assert codes.dtype == np.int64
        assert codes.tolist() == [[2, 2], [0, 0], [4, 1], [1, 300]]
        vectors, mask = table.gather(np.zeros(0, np.int64))
        assert (vectors.shape, mask.shape) == ((0, 2), (0,))
        assert table.gather(IDS)[1].all()
        assert not table.gather(np.setdiff1d(np.arange(100), IDS))[1].any()


def test_codes_are_left_out_or_refused(workspace: Workspace) -> None:
    shards = on_disk(workspace)
    for held in (True, False):
        with pytest.raises(SchemaError, match="no semantic ids"):
            open_vectors(shards, held=held).gather_codes(np.array([1]))
    with pytest.raises(SchemaError, match="rows have 3 codes; expected 3 and a duplicate digit"):
        open_vectors(shards, (4, 300, 4))


def test_missing_vectors_say_what_to_do(workspace: Workspace) -> None:
    workspace.fix_shards({"user": 2})
    with pytest.raises(WorkspaceError, match=r"knowledge-user holds no vectors. Run `encode`"):
        open_vectors(VectorShards(workspace, "vectors/abc", "knowledge-user"))


@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_shuffle_is_a_derangement_of_the_same_vectors(n: int, seed: int, again: int) -> None:
    own = np.arange(n, dtype=np.float16).reshape(n, 1)
    table = KnowledgeTable(np.arange(n, dtype=np.int64), own)
    given_, mask = table.shuffled(seed).gather(table.ids)
    assert mask.all()
    assert (given_ != own).all()
    assert sorted(given_.ravel()) == list(range(n))
    assert np.array_equal(given_, table.shuffled(seed).gather(table.ids)[0])
    twice, _ = table.shuffled(seed).shuffled(again).gather(table.ids)
    assert sorted(twice.ravel()) == list(range(n))


def test_a_mapped_table_shuffles_vectors_and_codes_within_each_shard(workspace: Workspace) -> None:
    n = 200
    table = KnowledgeTable(
        np.arange(n),
        np.arange(n, dtype=np.float16)[:, None],
        codes=np.arange(n, dtype=np.uint16)[:, None],
        code_sizes=(n,),
    )
    mapped = open_vectors(on_disk(workspace, table), (n,), held=False)
    shuffled = mapped.shuffled(3)
    given_, mask = shuffled.gather(table.ids)
    others = given_[:, 0].astype(int)
    assert mask.all()
    assert (others != table.ids).all()
    assert sorted(others) == list(range(n))
    assert (shard_of(others, 4) == shard_of(table.ids, 4)).all()
    assert (shuffled.gather_codes(table.ids)[:, 0] == others + 1).all()
    assert np.array_equal(given_, mapped.shuffled(3).gather(table.ids)[0])
    assert not np.array_equal(given_, mapped.shuffled(4).gather(table.ids)[0])


def test_the_only_id_of_a_shard_has_nobody_to_change_with(workspace: Workspace) -> None:
    alone = replace(TABLE, ids=IDS[:1], vectors=VECTORS[:1], codes=CODES[:1])
    mapped = open_vectors(on_disk(workspace, alone), (4, 300), held=False)
    assert mapped.gather(IDS[:1])[1].tolist() == [True]
    assert mapped.shuffled(0).gather(IDS[:1])[1].tolist() == [False]


def test_controls_exchange_vectors_within_deciles_of_a_count_and_leave_no_id_its_own() -> None:
    n = 500
    table = KnowledgeTable(np.arange(n), np.arange(n, dtype=np.float16)[:, None])
    counts = np.random.default_rng(0).zipf(1.5, n)
    shuffled = table.shuffled(3, Deciles(table.ids, counts))
    other = shuffled.gather(table.ids)[0][:, 0].astype(np.int64)
    assert sorted(other) == list(range(n))
    assert (other != table.ids).all()
    strata = Deciles(table.ids, counts)(table.ids)
    assert len(np.unique(strata)) > 3
    same = strata == strata[other]
    assert same.mean() > 0.99  # an id that is alone in its stratum exchanges with a neighbor
    plain = table.shuffled(3).gather(table.ids)[0][:, 0].astype(np.int64)
    assert (strata == strata[plain]).mean() < 0.7
    np.testing.assert_array_equal(Deciles(np.zeros(0, np.int64), np.zeros(0, np.int64))(np.array([4])), [0])


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (1, 2, 1), (2, 1, 1, 3), (5,), (1, 1, 1)])
def test_an_id_alone_in_its_stratum_joins_its_neighbors(sizes: tuple[int, ...]) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    ends = knowledge_tables._cycle_ends(strata)
    assert ends[-1] == len(strata)
    assert np.diff(ends, prepend=0).min() >= min(2, len(strata))


def test_similarities_by_hand() -> None:
    cosines = np.array([[0.5, 0.1, 0.9, -1.0], [0.3, 0.2, 0.1, 0.0]], dtype=np.float32)
    known = np.array([[True, True, True, True], [False, False, False, False]])
    liked = np.array([[True, True, False, False], [True, True, True, True]])
    first, second = similarity_features(cosines, known, liked)
    # .5 is a center; .1 is .4 of the way from 0 to .25. Each has half of the mass of the liked.
    np.testing.assert_allclose(first[:6], [0.3, 0.5, 0.3, 0.2, 0.5, 0], atol=1e-6)
    # .9 and -1 are beyond the last and the first center.
    np.testing.assert_allclose(first[6:], [-0.05, 0.9, 0.5, 0, 0, 0.5], atol=1e-6)
    assert not second.any()
    assert first.shape == (SIMILARITIES,)


def test_cosines_of_small_tables_are_those_of_large_ones(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table = KnowledgeTable(np.arange(30), rng.normal(size=(30, 6)).astype(np.float16))
    rows, others = rng.integers(30, size=8), rng.integers(-1, 30, size=(8, 5))
    small = Cosines(table).of(rows, others)
    unit = table.vectors.astype(float) / np.linalg.norm(table.vectors.astype(float), axis=1, keepdims=True)
    by_hand = np.einsum("bd,bld->bl", unit[rows], unit[others])
    np.testing.assert_allclose(small[others >= 0], by_hand[others >= 0], atol=1e-6)
    monkeypatch.setattr(knowledge_tables, "_COSINE_ROWS", 5)
    monkeypatch.setattr(knowledge_tables, "_COSINE_VALUES", 60)  # two rows at once
    np.testing.assert_allclose(Cosines(table).of(rows, others)[others >= 0], small[others >= 0], atol=1e-6)


def test_vectors_of_several_encoders_in_one_arm_are_refused() -> None:
    tables = {"a": replace(TABLE, encoder="minilm@256"), "b": replace(TABLE, encoder="minilm@256"), "c": TABLE}
    refuse_two_encoders("mine", tables)
    with pytest.raises(
        RecipeError, match=r"ctr\.arms: arm 'mine' .* several encoders \(a from minilm@256, .*b from clip"
    ):
        refuse_two_encoders("mine", {**tables, "b": replace(TABLE, encoder="clip")})
