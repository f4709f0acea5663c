"""Knowledge vectors of fewer components: what they keep, that they are written once, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from worlds import write_vectors

from owlrec.ctr import dataset as reduction
from owlrec.ctr.dataset import open_tables, reduce_once, reduced, reduced_folders
from owlrec.ctr.experiment import grid_folder
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


def test_angles_around_each_tables_center_stay_and_ids_and_codes_keep_their_vectors() -> None:
    tables = {"user": table(50, 1), "item": table(40, 2)}
    small = reduced(tables, 0.9999)
    for name, whole in tables.items():
        assert (small[name].dim, small[name].vectors.dtype) == (3, np.float16)
        np.testing.assert_array_equal(small[name].ids, whole.ids)
        np.testing.assert_array_equal(small[name].gather_codes(whole.ids), whole.gather_codes(whole.ids))
    # Of a user and an item too: one projection serves both.
    centered = [t.vectors.astype(np.float32) - t.vectors.astype(np.float32).mean(axis=0) for t in tables.values()]
    wide = unit_rows(np.concatenate(centered))
    narrow = np.concatenate([t.vectors for t in small.values()]).astype(np.float32)
    np.testing.assert_allclose(narrow @ narrow.T, wide @ wide.T, atol=5e-3)


def test_as_many_components_are_kept_as_the_variance_needs() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0].T
    signs = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T  # variances along three directions: 9, 4 and 1
    vectors = (5 + signs * [3, 2, 1] @ basis[:3]).astype(np.float16)
    whole = KnowledgeTable(np.arange(len(vectors)), vectors)
    kept = {share: reduced({"user": whole}, share)["user"].dim for share in (0.5, 0.64, 0.66, 0.92, 0.95, 1.0)}
    assert kept == {0.5: 1, 0.64: 1, 0.66: 2, 0.92: 2, 0.95: 3, 1.0: kept[1.0]}
    assert reduced({"user": whole}, None)["user"] is whole


@pytest.mark.parametrize("held", [True, False])
def test_a_grid_reads_its_own_copy_which_is_that_of_tables_in_memory(tmp_path: Path, held: bool) -> None:
    workspace = encoded(tmp_path)
    assert reduced_folders(workspace, FOLDERS, FINGERPRINT) == FOLDERS
    read = reduce_once(workspace, FOLDERS, 0.9, FINGERPRINT)
    assert read == reduced_folders(workspace, FOLDERS, FINGERPRINT) != FOLDERS
    whole = reduced({f"knowledge-{kind}": table(30, len(kind)) for kind in KINDS}, 0.9)
    for kind, opened in open_tables(workspace, read, held=held)["knowledge"].items():
        ids = whole[f"knowledge-{kind}"].ids
        vectors, mask = opened.gather(ids)
        assert vectors.shape == whole[f"knowledge-{kind}"].vectors.shape
        assert mask.all()
        # The sample is the same, its rows in another order: signs and last bits of the directions may differ.
        theirs = whole[f"knowledge-{kind}"].vectors.astype(np.float32)
        np.testing.assert_allclose(vectors @ vectors.T.astype(np.float32), theirs @ theirs.T, atol=4e-3)
    projection = Projection.load(workspace, read["knowledge"]["user"], FINGERPRINT)
    assert projection.directions.shape == (opened.dim, 12)
    assert 1 < opened.dim < 12


def test_vectors_are_reduced_once_and_an_interrupted_reduction_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, made = encoded(tmp_path), []
    run = reduction.ReduceVectors.run
    monkeypatch.setattr(reduction.ReduceVectors, "run", lambda self, work: made.append(work.shard) or run(self, work))
    read = reduce_once(workspace, FOLDERS, 0.9, FINGERPRINT)
    assert len(made) == len(set(made)) == len(workspace.entries("vectors/abc"))
    workspace.delete_file(f"{grid_folder(FINGERPRINT)}/vectors/done.json")
    workspace.delete_file(f"{read['knowledge']['user']}/{made[0].file('.arrow')}")
    assert reduce_once(workspace, FOLDERS, 0.9, FINGERPRINT) == read
    assert made[-1] == made[0]
    assert len(made) == len(set(made)) + 1
    assert reduce_once(workspace, FOLDERS, 0.9, FINGERPRINT) == read
    assert len(made) == len(set(made)) + 1


def test_without_a_share_whole_vectors_are_read_where_they_are(tmp_path: Path) -> None:
    workspace = encoded(tmp_path)
    assert reduce_once(workspace, FOLDERS, None, FINGERPRINT) == FOLDERS
    assert reduce_once(workspace, {}, 0.9, FINGERPRINT) == {}


def test_vectors_of_another_size_have_a_projection_of_their_own(tmp_path: Path) -> None:
    workspace = encoded(tmp_path)
    write_vectors(workspace, "vectors/images", "images-item", table(30, 1, dim=5))
    read = reduce_once(workspace, {**FOLDERS, "images": {"item": "vectors/images"}}, 0.9, FINGERPRINT)
    assert read["images"]["item"] != read["knowledge"]["item"] == read["knowledge"]["user"]
    assert len(Projection.load(workspace, read["images"]["item"], FINGERPRINT).center) == 5
    assert open_tables(workspace, read)["images"]["item"].dim <= 3


def test_two_sizes_in_memory_and_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SchemaError, match="vectors user have 12 components but vectors item have 8"):
        reduced({"user": table(5, 1), "item": table(5, 1, dim=8)}, 0.9)
    broken = table(5, 1)
    broken.vectors[3, 2] = np.nan
    with pytest.raises(SchemaError, match="vector of id 21 has a component that is not finite"):
        reduced({"user": broken}, 0.9)
