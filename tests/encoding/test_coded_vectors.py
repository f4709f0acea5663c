"""Vectors tables with codes: of their own quantiser at first, of the same one for what comes later."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.encoding.coded_vectors import (
    code_new_vectors,
    code_vectors,
    codes_of,
    read_quantisers,
    read_reports,
    with_codes,
)
from owlrec.encoding.semantic_ids import Quantiser, SemanticIdConfig
from owlrec.errors import SchemaError
from owlrec.schema import vectors_schema, vectors_table
from owlrec.workspace import Workspace

CONFIG = SemanticIdConfig(levels=2, codes_per_level=8, method="kmeans")
CORNERS = np.array([[0, 0], [4, 0], [0, 4], [4, 4]], dtype=np.float32)
BY_HAND = Quantiser(SemanticIdConfig(levels=2, codes_per_level=4, method="kmeans"), (CORNERS, CORNERS / 4))


def some_vectors(n: int, seed: int = 0) -> pa.Table:
    ids = np.random.default_rng(seed).permutation(n).astype(np.int64)
    return vectors_table("user", ids, np.random.default_rng(seed).normal(size=(n, 4)))


def test_a_table_gets_the_codes_that_its_quantiser_gives() -> None:
    table = some_vectors(100)
    coded = code_vectors(table, CONFIG)
    assert coded.table.schema == vectors_schema(4)
    assert coded.table.drop_columns("codes") == table.drop_columns("codes")
    codes, mask = codes_of(coded.table)
    assert mask.all()
    vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
    np.testing.assert_array_equal(codes[:, :2], coded.quantiser.encode(vectors))
    assert len({tuple(row) for row in codes.tolist()}) == 100
    assert coded.report.vectors == 100
    assert coded.report.unique_rate == len({tuple(row) for row in codes[:, :2].tolist()}) / 100 < 1
    assert coded.report.unique_rate_with_digit == 1


def test_quantisers_and_reports_are_found_by_source_and_kind(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert read_quantisers(workspace, "v", "knowledge") == {}
    assert read_reports(workspace, "v") == {}
    users, items = code_vectors(some_vectors(50), CONFIG), code_vectors(some_vectors(60), CONFIG)
    users.save(workspace, "v", "knowledge-user")
    items.save(workspace, "v", "metadata-item")
    [(kind, found)] = read_quantisers(workspace, "v", "knowledge").items()
    assert kind == "user"
    np.testing.assert_array_equal(found.codebooks[0], users.quantiser.codebooks[0])
    assert read_reports(workspace, "v") == {"knowledge-user": users.report, "metadata-item": items.report}


def test_codes_are_read_beside_rows_without_any() -> None:
    table = with_codes(vectors_table("item", np.arange(3), np.zeros((3, 2))), np.array([[1, 2]] * 3, np.uint16))
    mixed = pa.concat_tables([table.slice(1, 1), vectors_table("item", np.array([7]), np.zeros((1, 2)))])
    codes, mask = codes_of(mixed)
    assert (codes.dtype, codes.tolist(), mask.tolist()) == (np.uint16, [[1, 2], [0, 0]], [True, False])
    none, nowhere = codes_of(mixed.slice(1))
    assert (none.shape, nowhere.tolist()) == ((1, 0), [False])
    other = with_codes(table, np.zeros((3, 4), np.uint16))
    with pytest.raises(SchemaError, match="rows have 2 and 4 codes"):
        codes_of(pa.concat_tables([table, other]))


def new_codes(
    ids: list[int], vectors: list[list[float]], earlier: dict[int, tuple[int, ...]], last_digit: int
) -> list[list[int]]:
    width = 3 if earlier else 0
    before = np.array([earlier.get(i, (0,) * width) for i in ids], np.uint16).reshape(len(ids), width)
    known = np.array([i in earlier for i in ids])
    table = vectors_table("user", np.array(ids, np.int64), np.array(vectors))
    return code_new_vectors(table, BY_HAND, (before, known), last_digit=last_digit)["codes"].to_pylist()


def test_new_vectors_are_told_apart_from_all_that_have_ids_already() -> None:
    ids, vectors = [5, 9, 2, 4], [[4, 0], [4, 0], [0, 5], [4.1, 0]]
    # 9 stays where it was, 4 comes from elsewhere, 2 and 5 are new: their digits begin above the greatest.
    earlier = {9: (1, 0, 3), 4: (2, 2, 0)}
    assert new_codes(ids, vectors, earlier, 7) == [[1, 0, 9], [1, 0, 3], [2, 2, 8], [1, 0, 8]]
    assert new_codes(ids, vectors, {}, 0) == [[1, 0, 2], [1, 0, 3], [2, 2, 1], [1, 0, 1]]


def test_digits_run_out_with_a_way_on() -> None:
    assert new_codes([1], [[4, 0]], {}, 65_534) == [[1, 0, 65_535]]
    assert new_codes([1], [[4, 0]], {1: (1, 0, 65_535)}, 65_535) == [[1, 0, 65_535]]
    with pytest.raises(SchemaError, match="Run `encode` and `publish`"):
        new_codes([1], [[4, 0]], {}, 65_535)


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 3), max_size=10), min_size=1, max_size=5))
def test_ids_stay_unique_over_any_number_of_refreshes(rounds: list[dict[int, int]]) -> None:
    """Each round gives some ids the vector of one of four corners."""
    held: dict[int, tuple[int, ...]] = {}
    for moved in rounds:
        if moved:
            ids = list(moved)
            last = max((codes[-1] for codes in held.values()), default=-1)
            found = new_codes(ids, [CORNERS[moved[i]].tolist() for i in ids], held, last)
            held |= {i: tuple(codes) for i, codes in zip(ids, found, strict=True)}
            assert all(held[i][0] == moved[i] for i in ids)
        assert len(set(held.values())) == len(held)
