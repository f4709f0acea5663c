"""The one door to numba: kernels of this package are compiled, cached on disk, and run without the GIL.

numba refuses to decorate at all where it finds no writable folder for its cache (a read-only image without a home), so such a
place compiles afresh at every start instead of failing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba  # type: ignore[import-untyped]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """`function` as a numba kernel (nopython, nogil), cached where the disk allows it."""
    try:
        kernel: F = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        kernel = numba.njit(nogil=True)(function)
    return kernel


def inlined(function: F) -> F:
    """A small kernel that others call; compiled into each of them."""
    kernel: F = numba.njit(nogil=True, inline="never")(function)
    return kernel


def typed_list(arrays: list[Any]) -> Any:
    """`arrays` (all of one type, at least one) as the list that kernels take."""
    return numba.typed.List(arrays)
