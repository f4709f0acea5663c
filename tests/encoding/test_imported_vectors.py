"""Vectors made elsewhere: aligned with their ids, finite, in float16; pickles are never opened."""

from pathlib import Path

import numpy as np
import pytest

from owlrec.encoding import importing_vectors
from owlrec.encoding.importing_vectors import read_vectors
from owlrec.errors import SourceError
from owlrec.schema import stable_id, vectors_schema


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    return saved(tmp_path / "v.npy", np.array([[1, 0.5], [-2, 65504], [0, 3]], dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_vectors_and_int64_ids_become_a_vectors_table(tmp_path: Path, dtype: str) -> None:
    values = np.array([[1, 0.5], [-2, 65504], [0, 3]])
    ids = saved(tmp_path / "ids.npy", np.array([7, 2**63 - 1, -1]))
    table = read_vectors(saved(tmp_path / "v.npy", values.astype(dtype)), ids, "item")
    assert table.schema == vectors_schema(2)
    assert table.to_pydict() == {
        "kind": ["item"] * 3,
        "id": [7, 2**63 - 1, -1],
        "vector": values.tolist(),
        "codes": [[], [], []],
    }


def test_raw_ids_are_read_one_a_line(tmp_path: Path, npy: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("\ufeff7\r\nB 00X \n007".encode())
    table = read_vectors(npy, tmp_path / "ids.txt", "user")
    assert table["id"].to_pylist() == [7, stable_id("B 00X "), stable_id("007")]


def test_slices_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing_vectors, "_SLICE_VALUES", 7)
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16)
    ids = saved(tmp_path / "ids.npy", np.arange(20))
    table = read_vectors(saved(tmp_path / "v.npy", np.asfortranarray(values.astype(np.float64))), ids, "item")
    assert table["vector"].to_pylist() == values.tolist()
    values[19, 1] = np.nan
    with pytest.raises(SourceError, match=r"v.npy, row 19: a component is nan, which is not finite"):
        read_vectors(saved(tmp_path / "v.npy", values), ids, "item")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.inf, "row 1: a component is inf, which is not finite"),
        (70000, "row 1: .*70000, which is too large for float16"),
    ],
)
def test_component_that_float16_cannot_hold_is_refused(tmp_path: Path, value: float, message: str) -> None:
    ids = saved(tmp_path / "ids.npy", np.arange(2))
    with pytest.raises(SourceError, match=message):
        read_vectors(saved(tmp_path / "v.npy", np.array([[1.0, 2.0], [3.0, value]])), ids, "item")


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((3, 2), int), np.zeros((3, 0)), np.zeros((0, 2)), np.zeros((3, 2), complex)]
)
def test_array_of_another_shape_or_type_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(SourceError, match=r"but float \[n, dim\] is meant"):
        read_vectors(saved(tmp_path / "w.npy", array), saved(tmp_path / "ids.npy", np.arange(3)), "item")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(2), "has 3 vectors, but .*ids.npy has 2 ids"),
        (np.array([5, 6, 5]), r"ids.npy, row 2: id 5 stands in row 0 too"),
        (np.array([1.0, 2.0, 3.0]), r"but int64 \[n\] is meant"),
        (np.arange(3, dtype=np.uint64), r"but int64 \[n\] is meant"),
        (np.arange(3)[:, None], r"but int64 \[n\] is meant"),
    ],
)
def test_wrong_ids_are_refused(tmp_path: Path, npy: Path, ids: np.ndarray, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_vectors(npy, saved(tmp_path / "ids.npy", ids), "item")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\n\n3\n", "line 2: the id is empty"),
        (b"1\n\xff\n3\n", "line 2: no UTF-8"),
        (b"1\n1\n3\n", "row 1: id 1 stands"),
    ],
)
def test_wrong_id_lines_are_refused(tmp_path: Path, npy: Path, content: bytes, message: str) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_vectors(npy, tmp_path / "ids.txt", "item")


class Trap:
    """Unpickling it makes a file."""

    path = ""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_pickled_arrays_are_refused_unopened(tmp_path: Path, npy: Path) -> None:
    Trap.path = str(tmp_path / "sprung")
    trap = tmp_path / "trap.npy"
    np.save(trap, np.array([[Trap()]], dtype=object), allow_pickle=True)
    for vectors, ids in ((trap, npy), (npy, trap)):
        with pytest.raises(SourceError, match="no NumPy array without pickled objects"):
            read_vectors(vectors, ids, "item")
    assert not (tmp_path / "sprung").exists()


def test_other_files_are_refused(tmp_path: Path, npy: Path) -> None:
    ids = saved(tmp_path / "ids.npy", np.arange(3))
    np.savez(tmp_path / "v.npz", np.zeros((3, 2)))
    with pytest.raises(SourceError, match="an archive of arrays"):
        read_vectors(tmp_path / "v.npz", ids, "item")
    (tmp_path / "cut.npy").write_bytes(npy.read_bytes()[:-4])
    for name in ("cut.npy", "absent.npy"):
        with pytest.raises(SourceError, match=name):
            read_vectors(tmp_path / name, ids, "item")
    with pytest.raises(SourceError, match="there is no such file"):
        read_vectors(npy, tmp_path / "ids.txt", "item")
