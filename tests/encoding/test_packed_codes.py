"""Semantic ids as bytes: nothing is lost, bytes sort as codes do, and few are needed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.encoding.compression import pack_codes, packed_bytes, unpack_codes
from owlrec.errors import SchemaError

SIZES = st.lists(st.sampled_from([2, 255, 256, 257, 65_536]), min_size=1, max_size=4)


@given(sizes=SIZES, data=st.data())
def test_what_was_packed_unpacks_and_sorts_as_it_did(sizes: list[int], data: st.DataObject) -> None:
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes), st.integers(0, 65_535))
    rows = data.draw(st.lists(row, max_size=8))
    packed = pack_codes(np.array(rows, np.uint16).reshape(len(rows), len(sizes) + 1), sizes)
    assert [unpack_codes(value, sizes) for value in packed] == rows
    assert sorted(packed) == [value for _, value in sorted(zip([r[:-1] for r in rows], packed, strict=True))]
    assert packed_bytes([r[-1] for r in rows], sizes) == sum(map(len, packed))


def test_three_levels_of_256_take_three_bytes_and_a_fourth_where_codes_are_shared() -> None:
    codes = np.array([[1, 2, 255, 0], [1, 2, 255, 1], [0, 0, 0, 255], [0, 0, 0, 256]], np.uint16)
    assert pack_codes(codes, (256, 256, 256)) == [
        b"\x01\x02\xff",
        b"\x01\x02\xff\x01",
        b"\x00\x00\x00\xff",
        b"\x00\x00\x00\x01\x00",
    ]
    assert pack_codes(np.array([[300, 7, 0]], np.uint16), (512, 256)) == [b"\x01\x2c\x07"]


def test_codes_of_another_quantizer_are_refused() -> None:
    with pytest.raises(SchemaError, match="row 1: code 4 is out of range: level 1 has 4 codes"):
        pack_codes(np.array([[0, 3, 9], [0, 4, 9]], np.uint16), (4, 4))
    with pytest.raises(SchemaError, match=r"\[1, 2\], but must be \[n, 3\]"):
        pack_codes(np.array([[0, 3]], np.uint16), (4, 4))
