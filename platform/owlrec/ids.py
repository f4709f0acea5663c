"""Ids: int64 throughout, made of raw ids by `stable_id`, and spread over shards by `shard_of`.

Without Arrow, which a lookup does not need. The tables that hold ids are in owlrec.schema.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import numpy as np

from owlrec.errors import SchemaError

Kind = Literal["user", "item", "cohort"]  # what a text or a vector is about
KINDS: tuple[Kind, ...] = get_args(Kind)
TABLES: dict[Kind, str] = {"user": "users", "item": "items"}  # of each kind that has one
# By the hash of whose id each table's rows are sharded.
TABLE_KINDS: dict[str, Kind] = {
    "users": "user",
    "items": "item",
    "interactions": "user",
    "histories": "user",
    "samples": "user",
}
EventName = Literal["impression", "click", "cart", "play", "install", "purchase"]
EVENTS: tuple[EventName, ...] = get_args(EventName)
# A behavior in memory. rating: NaN if not graded; event: place among EVENTS, from 1; 0 if unknown.
BEHAVIOR = np.dtype([("time", "<i8"), ("item", "<i8"), ("rating", "<f4"), ("label", "<f4"), ("event", "u1")])


def stable_id(raw: str) -> int:
    """int64 id of a raw id: a canonical decimal integer stays the same, any other text is hashed (BLAKE2b, 63
    bits).
    """
    raw = str(raw)
    if raw.isascii() and raw.isdigit() and len(raw) <= 18 and (raw == "0" or raw[0] != "0"):
        return int(raw)
    return int.from_bytes(hashlib.blake2b(raw.encode(), digest_size=8).digest(), "big") >> 1


def as_ids(names: Iterable[int | str]) -> np.ndarray:
    """int64 ids [n]: a text is a raw id (`stable_id`), an integer is an int64 id as in tables.

    names: a sequence, an array or a pandas Series. Raises SchemaError for anything but text and integers.
    """
    if isinstance(names, str | bytes):
        raise SchemaError(f"ids: {names!r} is a single id, not a list. Write [{names!r}].")
    kind = getattr(getattr(names, "dtype", None), "kind", "")
    if kind in ("i", "u"):
        return np.asarray(names, dtype=np.int64)
    ids = []
    for row, name in enumerate(names):
        if isinstance(name, str):
            ids.append(stable_id(name))
        elif isinstance(name, int | np.integer) and not isinstance(name, bool):
            ids.append(int(name))
        else:
            raise SchemaError(f"ids, row {row}: {name!r} is neither text nor an integer. Convert it or drop the row.")
    return np.array(ids, dtype=np.int64)


def shard_of(ids: np.ndarray, n_shards: int) -> np.ndarray:
    """Shard of each id, out of `n_shards`.

    ids: int64 [n]. Returns int64 [n] in [0, n_shards). A multiplicative hash (splitmix64's finalizer), so ids
    with a common stride still spread evenly.
    """
    x = np.asarray(ids, dtype=np.int64).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x % np.uint64(n_shards)).astype(np.int64)


def hash_of(*keys: int | np.ndarray) -> np.ndarray:
    """Hash of aligned keys (int64 [n] each) and numbers, int64 [n] in [0, 2^62): randomness that depends on a row
    alone."""
    mixed = np.zeros(1, dtype=np.int64)
    for key in keys:
        mixed = shard_of(mixed ^ np.asarray(key, dtype=np.int64), 1 << 62)
    return mixed


def by_shard(ids: np.ndarray, n_shards: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each shard of some of `ids` (int64 [n]), and the positions of those."""
    numbers = shard_of(ids, n_shards)
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for at in np.split(order, starts[1:]) if len(ids) else ():
        yield int(numbers[at[0]]), at


# -------------------------------------------------------------------------------------------------------------- ordered
# Columns in ascending order: positions of ids, and starts of runs of equal keys.


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each wanted id in sorted `ids`, or -1: int64 of the same shape."""
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[rows] == wanted, rows, -1)


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """For each row, the first row of its run of equal values in all `columns`: int64 [n]."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def last_rows(ids: np.ndarray) -> np.ndarray:
    """The last row of each run of equal `ids`, which ascend: int64."""
    return np.flatnonzero(np.diff(ids, append=ids[-1:] + 1))


def newest_rows(ids: np.ndarray, as_of: np.ndarray, wanted: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Newest row of each wanted id: int64 of the same shape, -1 for none.

    ids, as_of: int64 [n], in ascending order of both, with distinct moments per id. before: int64 aligned with wanted;
    then only rows with a strictly earlier as_of count.
    """
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.searchsorted(ids, wanted, side="right") - 1
    if before is not None:
        while True:  # once per row of an id that is too new
            late = (rows >= 0) & (ids[rows] == wanted) & (as_of[rows] >= before)
            if not late.any():
                break
            rows = rows - late
    return np.where((rows >= 0) & (ids[rows] == wanted), rows, -1)
