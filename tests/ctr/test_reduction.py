"""Knowledge vectors of fewer components: what they keep, that they are written once, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from worlds import write_vectors

from owlrec.ctr import dataset as reduction
from owlrec.ctr.dataset import open_tables, reduce_once, reduced, reduced_folders
from owlrec.ctr.knowledge_tables import KnowledgeTable
from owlrec.encoding.compression import Projection, unit_rows
from owlrec.errors import SchemaError
from owlrec.workspace import Workspace

FINGERPRINT = "beef" * 16
KINDS = ("user", "item")
FOLDERS = {"knowledge": dict.fromkeys(KINDS, "vectors/abc")}


def encoded(folder: Path, n: int = 30) -> Workspace:
    workspace = Workspace(folder)
    workspace.fix_shards({"user": 8, "item": 2})
    for kind in KINDS:
        write_vectors(workspace, "vectors/abc", f"knowledge-{kind}", table(n, len(kind)))
    return workspace


def table(n: int, seed: int, *, dim: int = 12, rank: int = 3) -> KnowledgeTable:
    """n vectors of `rank` directions, the same for all tables, and a share that all vectors have."""
    directions = np.random.default_rng(0).standard_normal((rank, dim))
    weights = np.random.default_rng(seed).standard_normal((n, rank))
    vectors = (weights + np.eye(rank)[0] * 3) @ directions
    codes = np.arange(n, dtype=np.uint16)[:, None]
    return KnowledgeTable(np.arange(n) * 7, vectors.astype(np.float16), codes=codes, code_sizes=(n,))


def test_angles_stay_and_ids_and_codes_keep_their_vectors() -> None:
    tables = {"user": table(50, 1), "item": table(40, 2)}
    small = reduced(tables, 3)
    for name, whole in tables.items():
        assert (small[name].dim, small[name].vectors.dtype) == (3, np.float16)
        np.testing.assert_array_equal(small[name].ids, whole.ids)
        np.testing.assert_array_equal(small[name].gather_codes(whole.ids), whole.gather_codes(whole.ids))
    # Of a user and an item too: one projection serves both.
    wide, narrow = (
        unit_rows(np.concatenate([t["user"].vectors, t["item"].vectors]).astype(np.float32)) for t in (tables, small)
    )
    np.testing.assert_allclose(narrow @ narrow.T, wide @ wide.T, atol=5e-3)


def test_what_all_vectors_share_is_not_taken_out() -> None:
    (small,) = reduced({"user": table(200, 1)}, 2).values()
    vectors = small.vectors.astype(np.float32)
    assert np.linalg.norm(vectors.mean(axis=0)) > 0.7
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)


@pytest.mark.parametrize("held", [True, False])
def test_a_grid_reads_its_own_copy_which_is_that_of_tables_in_memory(tmp_path: Path, held: bool) -> None:
    workspace = encoded(tmp_path)
    assert reduced_folders(workspace, FOLDERS, FINGERPRINT) == FOLDERS
    read = reduce_once(workspace, FOLDERS, 4, FINGERPRINT)
    assert read == reduced_folders(workspace, FOLDERS, FINGERPRINT) != FOLDERS
    whole = reduced({kind: table(30, len(kind)) for kind in KINDS}, 4)
    for kind, opened in open_tables(workspace, read, held=held)["knowledge"].items():
        ids = whole[kind].ids
        vectors, mask = opened.gather(ids)
        assert vectors.shape == (30, 4)
        assert mask.all()
        # The sample is the same, its rows in another order: signs and last bits of the directions may differ.
        theirs = whole[kind].vectors.astype(np.float32)
        np.testing.assert_allclose(vectors @ vectors.T.astype(np.float32), theirs @ theirs.T, atol=4e-3)
    projection = Projection.load(workspace, read["knowledge"]["user"], FINGERPRINT)
    assert projection.directions.shape == (4, 12)


def test_vectors_are_reduced_once_and_an_interrupted_reduction_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, made = encoded(tmp_path), []
    run = reduction.ReduceVectors.run
    monkeypatch.setattr(reduction.ReduceVectors, "run", lambda self, work: made.append(work.shard) or run(self, work))
    read = reduce_once(workspace, FOLDERS, 4, FINGERPRINT)
    assert len(made) == len(set(made)) == len(workspace.entries("vectors/abc"))
    workspace.delete_file(f"{read['knowledge']['user']}/done.json")
    workspace.delete_file(f"{read['knowledge']['user']}/{made[0].file('.arrow')}")
    assert reduce_once(workspace, FOLDERS, 4, FINGERPRINT) == read
    assert made[-1] == made[0]
    assert len(made) == len(set(made)) + 1
    assert reduce_once(workspace, FOLDERS, 4, FINGERPRINT) == read
    assert len(made) == len(set(made)) + 1


@pytest.mark.parametrize("components", [None, 12, 384])
def test_vectors_that_have_no_more_are_read_where_they_are(tmp_path: Path, components: int | None) -> None:
    whole = {"user": table(5, 1)}
    assert reduced(whole, components)["user"] is whole["user"]
    workspace = encoded(tmp_path)
    assert reduce_once(workspace, FOLDERS, components, FINGERPRINT) == FOLDERS
    assert reduce_once(workspace, {}, components, FINGERPRINT) == {}


def test_fewer_vectors_than_components_lose_nothing() -> None:
    (small,) = reduced({"user": table(2, 1)}, 5).values()
    assert small.dim == 2


def test_two_sizes_and_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SchemaError, match="vectors user have 12 components but vectors item have 8"):
        reduced({"user": table(5, 1), "item": table(5, 1, dim=8)}, 4)
    broken = table(5, 1)
    broken.vectors[3, 2] = np.nan
    with pytest.raises(SchemaError, match="vector of id 21 has a component that is not finite"):
        reduced({"user": broken}, 4)
