"""Vectors as JSON and as bytes."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from owlrec.serving.http_lookup import _as_bytes, vectors_as_json


@given(stn.arrays(np.float16, st.tuples(st.integers(0, 12), st.integers(1, 6))))
def test_json_reads_back_as_the_same_float16(rows):
    texts = vectors_as_json(rows)
    assert len(texts) == len(rows)
    for text, row in zip(texts, rows, strict=True):
        back = [np.nan if value is None else value for value in json.loads(text)]
        expected = np.where(np.isfinite(row), row, np.nan)
        np.testing.assert_array_equal(np.array(back, dtype=np.float16), expected)


def test_float32_is_rounded_as_a_release_stores_it():
    assert vectors_as_json(np.array([[0.1, -2.0, 1e-9, 65504.0]], dtype=np.float32)) == [b"[0.1,-2.0,0.0,65500.0]"]


def test_bytes_are_little_endian_and_missing_rows_are_nan():
    data = _as_bytes(np.array([[1.0, -2.0], [3.0, 4.0]], dtype=np.float32), np.array([True, False]))
    assert data[:4] == b"\x00\x3c\x00\xc0"
    assert np.isnan(np.frombuffer(data, "<f2")[2:]).all()
    assert len(data) == 8
