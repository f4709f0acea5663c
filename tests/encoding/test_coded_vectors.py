"""Codebooks are fitted once per source and kind, kept beside the vectors, and measured on their sample."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.encoding.compression import SemanticIdConfig, code_vectors
from owlrec.encoding.vectors import codes_of, fit_codebooks, read_quantizers, read_reports, with_codes
from owlrec.errors import SchemaError
from owlrec.schema import vectors_table
from owlrec.workspace import Workspace

CONFIG = SemanticIdConfig(levels=2, codes_per_level=8)


def some_vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float16)


def test_codebooks_and_reports_are_kept_by_source_and_kind(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert read_quantizers(workspace, "v", "knowledge") == {}
    assert read_reports(workspace, "v") == {}
    vectors, ids = some_vectors(100), np.arange(100)
    users = fit_codebooks(workspace, "v", "knowledge-user", ids, vectors, CONFIG)
    items = fit_codebooks(workspace, "v", "metadata-item", ids[:60], some_vectors(60, 1), CONFIG)
    [(kind, quantizer)] = read_quantizers(workspace, "v", "knowledge").items()
    assert kind == "user"
    codes = code_vectors(quantizer, ids, vectors)
    assert users.vectors == 100
    assert users.unique_rate == len({tuple(row) for row in codes[:, :2].tolist()}) / 100 < 1
    assert users.unique_rate_with_digit == 1
    assert read_reports(workspace, "v") == {"knowledge-user": users, "metadata-item": items}


def test_codebooks_that_are_there_stay(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    fit_codebooks(workspace, "v", "knowledge-item", np.arange(50), some_vectors(50), CONFIG)
    first = read_quantizers(workspace, "v", "knowledge")["item"].fingerprint
    fit_codebooks(workspace, "v", "knowledge-item", np.arange(50), some_vectors(50, 1), CONFIG)
    assert read_quantizers(workspace, "v", "knowledge")["item"].fingerprint == first


def test_codes_are_read_beside_rows_without_any() -> None:
    table = with_codes(vectors_table("item", np.arange(3), np.zeros((3, 2))), np.array([[1, 2]] * 3))
    mixed = pa.concat_tables([table.slice(1, 1), vectors_table("item", np.array([7]), np.zeros((1, 2)))])
    codes, mask = codes_of(mixed)
    assert (codes.dtype, codes.tolist(), mask.tolist()) == (np.uint16, [[1, 2], [0, 0]], [True, False])
    none, nowhere = codes_of(mixed.slice(1))
    assert (none.shape, nowhere.tolist()) == ((1, 0), [False])
    other = with_codes(table, np.zeros((3, 4)))
    with pytest.raises(SchemaError, match="rows have 2 and 4 codes"):
        codes_of(pa.concat_tables([table, other]))
