"""The texts that a retrieval call may search, held as the lists of arrays that compiled kernels take.

A row names its sources by kind and place, so that one call serves rows of any pools. Places are reused: building
numba's lists anew for each change would cost more than the search.
"""

from typing import Any

import numpy as np

from owlrec.decoding.compiled import typed_list
from owlrec.decoding.live import LivePool
from owlrec.decoding.sealed import BORDER, SealedPool

NOTHING, SEALED, LIVE, TEXT, CONTEXT = -1, 0, 1, 2, 3  # kinds of source; CONTEXT is the row's own prompt and output

_NO_TOKENS = np.zeros(0, np.int32)
_STAND_INS: dict[int, tuple[np.ndarray, ...]] = {
    SEALED: (_NO_TOKENS, _NO_TOKENS, np.zeros(0, np.uint8)),
    LIVE: (_NO_TOKENS, np.zeros((1, 0), np.int32), np.zeros((1, 0), np.int32)),
    TEXT: (_NO_TOKENS,),
}


class Shelf:
    """Places for sealed pools, live pools and single texts."""

    def __init__(self) -> None:
        # Place 0 of each kind holds a stand-in that nothing names: numba cannot pass an empty list.
        self.lists: dict[int, tuple[Any, ...]] = {
            k: tuple(typed_list([a]) for a in arrays) for k, arrays in _STAND_INS.items()
        }
        self._free: dict[int, list[int]] = {kind: [] for kind in _STAND_INS}

    def add_sealed(self, pool: SealedPool) -> int:
        """Gives a sealed pool a place."""
        return self._add(SEALED, (pool.tokens, pool.order, pool.shared))

    def add_live(self, pool: LivePool) -> int:
        """Gives a live pool a place."""
        return self._add(LIVE, (pool.tokens, pool.heads, pool.earlier))

    def renew_live(self, place: int, pool: LivePool) -> None:
        """Puts a live pool's arrays at its place anew, after they were replaced."""
        self._set(LIVE, place, (pool.tokens, pool.heads, pool.earlier))

    def add_text(self, tokens: np.ndarray) -> int:
        """Gives a single text a place. tokens: int32 [n]."""
        # A border at the end: only a row's own context may be read on past its end, into its draft.
        return self._add(TEXT, (np.append(tokens, np.int32(BORDER)),))

    def remove(self, kind: int, place: int) -> None:
        """Frees a place; what stood there may then be unmapped."""
        self._set(kind, place, _STAND_INS[kind])
        self._free[kind].append(place)

    def _add(self, kind: int, arrays: tuple[np.ndarray, ...]) -> int:
        if self._free[kind]:
            place = self._free[kind].pop()
            self._set(kind, place, arrays)
            return place
        for list_, array in zip(self.lists[kind], arrays, strict=True):
            list_.append(array)
        return len(self.lists[kind][0]) - 1

    def _set(self, kind: int, place: int, arrays: tuple[np.ndarray, ...]) -> None:
        for list_, array in zip(self.lists[kind], arrays, strict=True):
            list_[place] = array
