"""Semantic ids as bytes: one a level (two where it has more than 256 codes), then the duplicate digit, if it is not 0.

The digit takes as few bytes as it needs, and none for 0, so that an id of 3 x 256 codes is 3 bytes, or 4 where others
share its codes. Bytes sort as the codes do: what begins alike is alike.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from owlrec.errors import SchemaError

_ONE_BYTE = 1 << 8


def pack_codes(codes: np.ndarray, sizes: Sequence[int]) -> list[bytes]:
    """The bytes of semantic ids: integers [n, levels + 1], the digit last; sizes: how many codes each level has.

    Raises SchemaError for another number of levels, and for a code that its level does not have.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes) + 1:
        raise SchemaError(
            f"semantic ids: they are {list(codes.shape)}, but [n, {len(sizes) + 1}] is meant: {len(sizes)} codes and "
            "the duplicate digit. Code the vectors with the quantiser of the release."
        )
    check_codes(codes[:, :-1], sizes, "Code the vectors with the quantiser of the release.")
    columns = [codes[:, level : level + 1].astype(f">u{_width(size)}") for level, size in enumerate(sizes)]
    heads = np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns], axis=1)
    return [head.tobytes() + _digit_bytes(digit) for head, digit in zip(heads, codes[:, -1].tolist(), strict=True)]


def check_codes(codes: np.ndarray, sizes: Sequence[int], remedy: str) -> None:
    """Raises SchemaError, which ends in the remedy, for a code [n, levels] that its level does not have."""
    bad = np.argwhere((codes < 0) | (codes >= np.array(sizes)))
    if len(bad):
        row, level = bad[0]
        raise SchemaError(
            f"semantic ids, row {row}: code {codes[row, level]} of level {level}, which has {sizes[level]} codes. "
            f"{remedy}"
        )


def unpack_codes(value: bytes, sizes: Sequence[int]) -> tuple[int, ...]:
    """The codes and, last, the duplicate digit that `pack_codes` made a value of."""
    codes, at = [], 0
    for size in sizes:
        codes.append(int.from_bytes(value[at : at + _width(size)], "big"))
        at += _width(size)
    return (*codes, int.from_bytes(value[at:], "big"))


def packed_bytes(digits: Iterable[int], sizes: Sequence[int]) -> int:
    """How many bytes the semantic ids with these duplicate digits take."""
    return sum(len(_digit_bytes(digit)) + sum(map(_width, sizes)) for digit in digits)


def _width(size: int) -> int:
    return 1 if size <= _ONE_BYTE else 2


def _digit_bytes(digit: int) -> bytes:
    return digit.to_bytes((digit.bit_length() + 7) // 8, "big")
