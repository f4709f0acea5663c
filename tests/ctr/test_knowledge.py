"""Knowledge vectors by id: what is found, what is missing, and what a shuffle does."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.ctr.knowledge import KnowledgeTable
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.schema import vectors_schema


def vectors_table(rows: list[tuple[str, int, list[float]]], codes: list[list[int]] | None = None) -> pa.Table:
    schema = vectors_schema(2)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.array([v for _, _, v in rows], dtype=np.float16).ravel(), pa.float16()), 2
    )
    kinds, ids = pa.array([k for k, _, _ in rows], pa.string()), pa.array([i for _, i, _ in rows], pa.int64())
    ids_of = pa.array(codes or [[]] * len(rows), pa.list_(pa.uint16()))
    return pa.table([kinds, ids, vectors, ids_of], schema=schema)


ROWS: list[tuple[str, int, list[float]]] = [
    ("user", 30, [3, 3.5]),
    ("item", 30, [9, 9]),
    ("user", 10, [1, 1.5]),
    ("user", 2**62, [4, 4.5]),
]


def test_saved_table_gathers_in_the_order_asked_with_zeros_and_mask_for_misses(tmp_path: Path) -> None:
    KnowledgeTable.from_table(vectors_table(ROWS), "user").save(tmp_path / "users")
    table = KnowledgeTable.open(tmp_path / "users")
    assert isinstance(table.vectors, np.memmap)
    assert (len(table), table.dim) == (3, 2)
    vectors, mask = table.gather(np.array([2**62, 11, 10, 30, 10, -1, 2**63 - 1]))
    assert vectors.dtype == np.float16
    assert vectors.tolist() == [[4, 4.5], [0, 0], [1, 1.5], [3, 3.5], [1, 1.5], [0, 0], [0, 0]]
    assert mask.tolist() == [True, False, True, True, True, False, False]


CODES = [[0, 299, 5], [9, 9, 9], [3, 0, 0], [1, 1, 0]]  # of ROWS, the duplicate digit last


def test_saved_codes_are_gathered_one_up_with_zeros_for_misses(tmp_path: Path) -> None:
    KnowledgeTable.from_table(vectors_table(ROWS, CODES), "user", (4, 300)).save(tmp_path)
    table = KnowledgeTable.open(tmp_path)
    assert isinstance(table.codes, np.memmap)
    assert table.code_sizes == (4, 300)
    codes = table.gather_codes(np.array([2**62, 11, 10, 30]))
    assert codes.dtype == np.int64
    assert codes.tolist() == [[2, 2], [0, 0], [4, 1], [1, 300]]
    shuffled = table.shuffled(2)
    shuffled.save(tmp_path / "shuffled")
    again = KnowledgeTable.open(tmp_path / "shuffled").gather_codes(table.ids)
    assert again.tolist() == shuffled.gather_codes(table.ids).tolist() != table.gather_codes(table.ids).tolist()


def test_codes_are_left_out_or_missed_or_refused(tmp_path: Path) -> None:
    without = KnowledgeTable.from_table(vectors_table(ROWS, CODES), "user")
    with pytest.raises(SchemaError, match="no semantic ids"):
        without.gather_codes(np.array([1]))
    with pytest.raises(SchemaError, match="1 rows have no codes"):
        KnowledgeTable.from_table(vectors_table(ROWS, [[], *CODES[1:]]), "user", (4, 300))
    with pytest.raises(SchemaError, match="3 and a duplicate digit are meant"):
        KnowledgeTable.from_table(vectors_table(ROWS, CODES), "user", (4, 300, 4))
    KnowledgeTable.from_table(vectors_table(ROWS, CODES), "user", (4, 300)).save(tmp_path)
    np.save(tmp_path / "codes.npy", np.zeros((2, 2), np.uint16))
    with pytest.raises(WorkspaceError, match="2 levels, but codes of shape"):
        KnowledgeTable.open(tmp_path)


def test_empty_table_round_trips_and_misses_everything(tmp_path: Path) -> None:
    KnowledgeTable.from_table(vectors_table(ROWS), "cohort").save(tmp_path)
    vectors, mask = KnowledgeTable.open(tmp_path).gather(np.array([1, 2]))
    assert vectors.tolist() == [[0, 0], [0, 0]]
    assert not mask.any()


def test_doubled_id_is_refused() -> None:
    with pytest.raises(SchemaError, match="id 10 occurs more than once"):
        KnowledgeTable.from_table(vectors_table([*ROWS, ("user", 10, [0, 0])]), "user")


def test_missing_and_damaged_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="Run `encode`"):
        KnowledgeTable.open(tmp_path / "nowhere")
    KnowledgeTable.from_table(vectors_table(ROWS), "user").save(tmp_path)
    np.save(tmp_path / "ids.npy", np.array([1, 2]))
    with pytest.raises(WorkspaceError, match="different runs"):
        KnowledgeTable.open(tmp_path)
    (tmp_path / "vectors.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(WorkspaceError, match="Run `encode`"):
        KnowledgeTable.open(tmp_path)


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


def test_shuffled_table_saves_what_it_gathers(tmp_path: Path) -> None:
    table = KnowledgeTable.from_table(vectors_table(ROWS), "user").shuffled(1)
    table.save(tmp_path)
    assert np.array_equal(KnowledgeTable.open(tmp_path).gather(table.ids)[0], table.gather(table.ids)[0])
