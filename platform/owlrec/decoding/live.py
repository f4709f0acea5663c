"""The live tier of a retrieval pool: an n-gram index that grows by one finished text at a time.

For each of the `LEVELS` n, a table holds the latest position after each hash of n tokens, and every position links to
the one before it with the same hash: inserting a token is a few stores, and the latest texts are found first. Hashes
collide without harm, since the search compares the tokens themselves. 36 bytes a token when full, 72 just after
growing; bounded, oldest texts dropped first.
"""

from collections.abc import Sequence

import numpy as np

from owlrec.decoding.compiled import compiled
from owlrec.decoding.sealed import BORDER

LEVELS = (1, 2, 4, 8)
_NO_POSITION = -1
_FIRST_CAPACITY = 1 << 10
_KEPT_SHARE = 0.75  # of max_tokens stays when the pool is full: dropping text by text would rebuild at every insertion


class LivePool:
    """Recent texts of one cohort, searchable at once.

    tokens: int32 [capacity], each text followed by BORDER. size: int64 [1], tokens in use.
    heads: int32 [levels, capacity], latest position by hash. earlier: int32 [levels, capacity], the position before it.
    """

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: bound on tokens held, borders included; beyond it the oldest texts go."""
        if max_tokens < _FIRST_CAPACITY:
            raise ValueError(f"a live pool needs room for at least {_FIRST_CAPACITY} tokens, not {max_tokens}")
        self.max_tokens = max_tokens
        self.dropped = 0  # texts
        self._allocate(_FIRST_CAPACITY)

    def __len__(self) -> int:
        return int(self.size[0])

    def insert(self, sequence: Sequence[int] | np.ndarray) -> bool:
        """Adds one text; returns whether the arrays were replaced by larger ones, so that holders of the old ones must
        fetch them anew.

        A text longer than half the pool is cut to its end. Raises ValueError for a negative token id.
        """
        new = np.asarray(sequence, dtype=np.int32)[-(self.max_tokens // 2) :]
        if len(new) == 0:
            return False
        if new.min() < 0:
            raise ValueError(f"token ids are not negative, but a text holds {new.min()}")
        replaced = self._make_room(len(new) + 1)
        _insert(self.tokens, self.size, self.heads, self.earlier, new)
        return replaced

    def sequences(self) -> list[np.ndarray]:
        """The texts held, oldest first, each int32 [length]."""
        used = self.tokens[: len(self)]
        return [part[:-1] for part in np.split(used, np.flatnonzero(used == BORDER) + 1) if len(part)]

    def _make_room(self, extra: int) -> bool:
        needed = len(self) + extra
        if needed <= min(len(self.tokens), self.max_tokens):
            return False
        kept = self.sequences()
        if needed > self.max_tokens:
            room = int(self.max_tokens * _KEPT_SHARE) - extra
            first = len(kept)
            while first and room >= len(kept[first - 1]) + 1:
                first -= 1
                room -= len(kept[first]) + 1
            self.dropped += first
            kept = kept[first:]
            needed = sum(len(k) + 1 for k in kept) + extra
        capacity = len(self.tokens)
        while capacity < needed:
            capacity *= 2
        kept = [k.copy() for k in kept]
        self._allocate(capacity)
        for sequence in kept:
            _insert(self.tokens, self.size, self.heads, self.earlier, sequence)
        return True

    def _allocate(self, capacity: int) -> None:
        self.tokens = np.full(capacity, BORDER, dtype=np.int32)
        self.size = np.zeros(1, dtype=np.int64)
        self.heads = np.full((len(LEVELS), capacity), _NO_POSITION, dtype=np.int32)
        self.earlier = np.full((len(LEVELS), capacity), _NO_POSITION, dtype=np.int32)


@compiled
def hash_before(tokens: np.ndarray, end: int, n: int, mask: int) -> int:
    """Hash of the `n` tokens before position `end`, within `mask` (a power of two less one)."""
    value = np.uint64(0x9E3779B97F4A7C15)
    for i in range(end - n, end):
        value = (value ^ np.uint64(tokens[i])) * np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(29)
    return np.int64(value & np.uint64(mask))  # type: ignore[return-value]  # numba knows no Python integers


@compiled
def _insert(tokens: np.ndarray, size: np.ndarray, heads: np.ndarray, earlier: np.ndarray, new: np.ndarray) -> None:
    start, mask = size[0], heads.shape[1] - 1
    tokens[start : start + len(new)] = new
    tokens[start + len(new)] = BORDER
    for position in range(start + 1, start + len(new)):  # positions with a token before and at them
        for level, n in enumerate(LEVELS):
            if position - start >= n:
                slot = hash_before(tokens, position, n, mask)
                earlier[level, position] = heads[level, slot]
                heads[level, slot] = position
    size[0] = start + len(new) + 1
