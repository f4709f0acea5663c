"""The one door to numba: kernels of this package are compiled, cached on disk, and run without the GIL.

numba refuses to decorate at all where it finds no writable folder for its cache (a read-only image without a home), so
such a place compiles afresh at every start instead of failing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba  # type: ignore[import-untyped]
from llvmlite.binding import ffi  # type: ignore[import-untyped]

F = TypeVar("F", bound=Callable[..., Any])


def _answer_without_dict() -> None:
    """vLLM 0.32 asks every value of every module for its `__dict__` when an engine starts.

    See triton_utils/dispatcher.py:138. llvmlite's library object answers with a foreign function, which ends the start
    of any engine after numba is imported.
    """
    lookup = ffi._lib_wrapper.__getattr__

    def getattr_(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return lookup(self, name)

    ffi._lib_wrapper.__getattr__ = getattr_


_answer_without_dict()


def compiled(function: F) -> F:
    """`function` as a numba kernel (nopython, nogil), cached where the disk allows it."""
    try:
        kernel: F = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        kernel = numba.njit(nogil=True)(function)
    return kernel


def typed_list(arrays: list[Any]) -> Any:
    """`arrays` (all of one type, at least one) as the list that kernels take."""
    return numba.typed.List(arrays)
