"""Vectors made elsewhere: sharded by id, aligned, finite, in float16; pickles are never opened."""

from pathlib import Path

import numpy as np
import pytest

from owlrec.encoding import inputs as module
from owlrec.encoding.inputs import import_vectors, imported_vectors
from owlrec.encoding.vectors import VectorShards
from owlrec.errors import SourceError, WorkspaceError
from owlrec.ids import shard_of, stable_id
from owlrec.workspace import Workspace


@pytest.fixture
def prepared(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    workspace.fix_shards({"user": 2, "item": 8})
    return workspace


def rows_of(workspace: Workspace, kind: str) -> dict[int, list[float]]:
    imported = imported_vectors(workspace, kind)
    assert imported is not None
    shards = VectorShards(workspace, *imported.folder.rsplit("/", 1))
    assert shards.dim == imported.dim
    rows = {}
    for number in shards.numbers:
        shard = shards.shard(number)
        assert shard is not None
        assert (np.diff(shard.ids) > 0).all()
        assert (shard_of(shard.ids, shards.n_shards) == number).all()
        rows |= dict(zip(shard.ids.tolist(), shard.vectors.tolist(), strict=True))
    assert len(rows) == imported.rows
    return rows


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    return saved(tmp_path / "v.npy", np.array([[1, 0.5], [-2, 65504], [0, 3]], dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_vectors_and_int64_ids_become_shards(tmp_path: Path, prepared: Workspace, dtype: str) -> None:
    values = np.array([[1, 0.5], [-2, 65504], [0, 3]])
    ids = saved(tmp_path / "ids.npy", np.array([7, 2**63 - 1, -1]))
    import_vectors(prepared, "item", saved(tmp_path / "v.npy", values.astype(dtype)), ids)
    assert rows_of(prepared, "item") == dict(zip([7, 2**63 - 1, -1], values.tolist(), strict=True))
    assert imported_vectors(prepared, "user") is None


def test_raw_ids_are_read_one_per_line(tmp_path: Path, prepared: Workspace, npy: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("\ufeff7\r\nB 00X \n007".encode())
    with pytest.raises(SourceError, match="Set as_of_ms"):
        import_vectors(prepared, "user", npy, tmp_path / "ids.txt")
    import_vectors(prepared, "user", npy, tmp_path / "ids.txt", 1_600_000_000_000)
    assert set(rows_of(prepared, "user")) == {7, stable_id("B 00X "), stable_id("007")}


def test_slices_and_buckets_make_the_whole(
    tmp_path: Path, prepared: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE_VALUES", 7)
    monkeypatch.setattr(module, "_BUCKET_BYTES", 100)
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16)
    ids = saved(tmp_path / "ids.npy", np.arange(20)[::-1])
    array = saved(tmp_path / "v.npy", np.asfortranarray(values.astype(np.float64)))
    import_vectors(prepared, "item", array, ids)
    assert rows_of(prepared, "item") == {19 - i: row for i, row in enumerate(values.tolist())}
    assert not any(prepared.local_path(".scratch").iterdir())
    values[19, 1] = np.nan
    with pytest.raises(SourceError, match=r"v.npy, row 19: a component is nan, which is not finite"):
        import_vectors(prepared, "item", saved(tmp_path / "v.npy", values), ids)
    assert len(rows_of(prepared, "item")) == 20  # what was refused wrote nothing


def test_an_import_replaces_the_one_before(tmp_path: Path, prepared: Workspace, npy: Path) -> None:
    first = import_vectors(prepared, "item", npy, saved(tmp_path / "ids.npy", np.arange(3)))
    assert import_vectors(prepared, "item", npy, saved(tmp_path / "ids.npy", np.arange(3))) == first
    second = import_vectors(prepared, "item", npy, saved(tmp_path / "ids.npy", np.arange(4, 7)))
    assert set(rows_of(prepared, "item")) == {4, 5, 6}
    assert second.folder != first.folder
    assert not prepared.exists(first.folder)


def test_a_workspace_without_shards_is_refused(tmp_path: Path, npy: Path) -> None:
    with pytest.raises(WorkspaceError, match="Run `prepare` first"):
        import_vectors(Workspace(tmp_path / "w"), "item", npy, saved(tmp_path / "ids.npy", np.arange(3)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.inf, "row 1: a component is inf, which is not finite"),
        (70000, "row 1: .*70000, which is too large for float16"),
    ],
)
def test_component_that_float16_cannot_hold_is_refused(
    tmp_path: Path, prepared: Workspace, value: float, message: str
) -> None:
    ids = saved(tmp_path / "ids.npy", np.arange(2))
    with pytest.raises(SourceError, match=message):
        import_vectors(prepared, "item", saved(tmp_path / "v.npy", np.array([[1.0, 2.0], [3.0, value]])), ids)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((3, 2), int), np.zeros((3, 0)), np.zeros((0, 2)), np.zeros((3, 2), complex)]
)
def test_array_of_another_shape_or_type_is_refused(tmp_path: Path, prepared: Workspace, array: np.ndarray) -> None:
    with pytest.raises(SourceError, match=r"must be float \[n, dim\]"):
        import_vectors(prepared, "item", saved(tmp_path / "w.npy", array), saved(tmp_path / "ids.npy", np.arange(3)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(2), "has 3 vectors, but .*ids.npy has 2 ids"),
        (np.array([5, 6, 5]), r"ids.npy, row 2: id 5 is also in row 0"),
        (np.array([1.0, 2.0, 3.0]), r"must be int64 \[n\]"),
        (np.arange(3, dtype=np.uint64), r"must be int64 \[n\]"),
        (np.arange(3)[:, None], r"must be int64 \[n\]"),
    ],
)
def test_wrong_ids_are_refused(tmp_path: Path, prepared: Workspace, npy: Path, ids: np.ndarray, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        import_vectors(prepared, "item", npy, saved(tmp_path / "ids.npy", ids))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\n\n3\n", "line 2: the id is empty"),
        (b"1\n\xff\n3\n", "line 2: not UTF-8"),
        (b"1\n1\n3\n", "row 1: id 1 "),
    ],
)
def test_wrong_id_lines_are_refused(
    tmp_path: Path, prepared: Workspace, npy: Path, content: bytes, message: str
) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        import_vectors(prepared, "item", npy, tmp_path / "ids.txt")


class Trap:
    """Unpickling it makes a file."""

    path = ""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_pickled_arrays_are_refused_unopened(tmp_path: Path, prepared: Workspace, npy: Path) -> None:
    Trap.path = str(tmp_path / "sprung")
    trap = tmp_path / "trap.npy"
    np.save(trap, np.array([[Trap()]], dtype=object), allow_pickle=True)
    for vectors, ids in ((trap, npy), (npy, trap)):
        with pytest.raises(SourceError, match="not a pickle-free NumPy array"):
            import_vectors(prepared, "item", vectors, ids)
    assert not (tmp_path / "sprung").exists()


def test_other_files_are_refused(tmp_path: Path, prepared: Workspace, npy: Path) -> None:
    ids = saved(tmp_path / "ids.npy", np.arange(3))
    np.savez(tmp_path / "v.npz", np.zeros((3, 2)))
    with pytest.raises(SourceError, match="an archive of arrays"):
        import_vectors(prepared, "item", tmp_path / "v.npz", ids)
    (tmp_path / "cut.npy").write_bytes(npy.read_bytes()[:-4])
    for name in ("cut.npy", "absent.npy"):
        with pytest.raises(SourceError, match=name):
            import_vectors(prepared, "item", tmp_path / name, ids)
    with pytest.raises(SourceError, match="file not found"):
        import_vectors(prepared, "item", npy, tmp_path / "ids.txt")
