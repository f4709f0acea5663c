"""Knowledge vectors of fewer components: what they keep, that they are written once, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from owlrec.ctr.knowledge import KnowledgeTable
from owlrec.ctr.reduction import reduce_once, reduced, reduced_folders
from owlrec.encoding.projection import unit_rows
from owlrec.errors import SchemaError
from owlrec.workspace import Workspace

FINGERPRINT = "beef" * 16
FOLDERS = {"knowledge": {"user": "vectors/knowledge-user", "item": "vectors/knowledge-item"}}


def table(n: int, seed: int, *, dim: int = 12, rank: int = 3) -> KnowledgeTable:
    """n vectors of `rank` directions, the same for all tables, and a share that all vectors have."""
    directions = np.random.default_rng(0).standard_normal((rank, dim))
    weights = np.random.default_rng(seed).standard_normal((n, rank))
    vectors = (weights + np.eye(rank)[0] * 3) @ directions
    codes = np.arange(n, dtype=np.uint16)[:, None]
    return KnowledgeTable(np.arange(n) * 7, vectors.astype(np.float16), codes=codes, code_sizes=(n,))


def test_angles_stay_and_ids_and_codes_keep_their_vectors() -> None:
    tables = {"user": table(50, 1), "item": table(40, 2)}
    found = reduced(tables, 3)
    for name, whole in tables.items():
        assert (found[name].dim, found[name].vectors.dtype) == (3, np.float16)
        np.testing.assert_array_equal(found[name].ids, whole.ids)
        np.testing.assert_array_equal(found[name].gather_codes(whole.ids), whole.gather_codes(whole.ids))
    # Of a user and an item too: one projection serves both.
    wide, narrow = (
        unit_rows(np.concatenate([t["user"].vectors, t["item"].vectors]).astype(np.float32)) for t in (tables, found)
    )
    np.testing.assert_allclose(narrow @ narrow.T, wide @ wide.T, atol=5e-3)


def test_what_all_vectors_share_is_not_taken_out() -> None:
    (found,) = reduced({"user": table(200, 1)}, 2).values()
    vectors = found.vectors.astype(np.float32)
    assert np.linalg.norm(vectors.mean(axis=0)) > 0.7
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)


def test_a_grid_reads_its_own_copy_which_is_written_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for side, folder in FOLDERS["knowledge"].items():
        table(30, len(side)).save(workspace.local_path(folder))
    assert reduced_folders(workspace, FOLDERS, FINGERPRINT) == FOLDERS
    read = reduce_once(workspace, FOLDERS, 4, FINGERPRINT)
    assert read == reduced_folders(workspace, FOLDERS, FINGERPRINT) != FOLDERS
    path = workspace.local_path(read["knowledge"]["user"])
    first = KnowledgeTable.open(path).vectors
    assert first.shape == (30, 4)
    table(30, 99).save(workspace.local_path(FOLDERS["knowledge"]["user"]))
    assert reduce_once(workspace, FOLDERS, 4, FINGERPRINT) == read
    np.testing.assert_array_equal(KnowledgeTable.open(path).vectors, first)


@pytest.mark.parametrize("components", [None, 12, 384])
def test_vectors_that_have_no_more_are_read_where_they_are(tmp_path: Path, components: int | None) -> None:
    whole = {"user": table(5, 1)}
    assert reduced(whole, components)["user"] is whole["user"]
    workspace = Workspace(tmp_path)
    for folder in FOLDERS["knowledge"].values():
        table(30, 1).save(workspace.local_path(folder))
    assert reduce_once(workspace, FOLDERS, components, FINGERPRINT) == FOLDERS
    assert reduce_once(workspace, {}, components, FINGERPRINT) == {}


def test_fewer_vectors_than_components_lose_nothing() -> None:
    (found,) = reduced({"user": table(2, 1)}, 5).values()
    assert found.dim == 2


def test_two_sizes_and_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SchemaError, match="vectors user have 12 components but vectors item have 8"):
        reduced({"user": table(5, 1), "item": table(5, 1, dim=8)}, 4)
    broken = table(5, 1)
    broken.vectors[3, 2] = np.nan
    with pytest.raises(SchemaError, match="vector of id 21 has a component that is no finite number"):
        reduced({"user": broken}, 4)
