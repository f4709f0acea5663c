"""Synthetic worlds of any size for `benchmarks.scale`: users, items and interactions as Parquet fragments.

A fragment is drawn, written and forgotten, from a seed of its own, so that a world of 10^8 interactions takes a few
minutes and the memory of one fragment, and is the same on every machine. Items are chosen by Zipf's law with exponent
one: then the rank of a uniform u is (n + 1)^u and needs no table of probabilities. Users are as active as a log-normal
draw says, and prefer one genre, without which there would be nothing for cohorts to find.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GENRES = ("Action", "Animation", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Horror")
AGES = ("18-24", "25-34", "35-44", "45-54", "55-64", "65-99")
START = 1_600_000_000  # seconds since 1970
DAYS = 730  # of the first interactions; those of `grow` come after
_FRAGMENT_ROWS = 1 << 20
_LEAST = 4  # interactions of a user, where the mean allows: enough for each split
_OWN_GENRE = 0.7  # of a user's interactions
_LATER_MEAN = 3  # interactions of an active user in `grow`
_FIRST = np.array(["Silent", "Last", "Golden", "Broken", "Distant", "Secret", "Northern", "Burning"])
_SECOND = np.array(["River", "Winter", "Garden", "Harbor", "Machine", "Empire", "Letter", "Shadow", "Road", "Orchard"])


@dataclass(frozen=True)
class World:
    """The size of a world; equal ones have equal bytes."""

    users: int
    items: int
    interactions: int
    seed: int = 0


def write_world(world: World, folder: Path) -> None:
    """Writes users/, items/ and interactions/ below `folder`, and then world.json; where that stands, only takes back
    what `grow` added.

    Raises ValueError where world.json is of another world.
    """
    done = folder / "world.json"
    for later in folder.glob("*/later*.parquet"):
        later.unlink()
    if done.exists():
        if json.loads(done.read_text()) != asdict(world):
            raise ValueError(f"{done}: another world, {done.read_text()}. Choose another folder, or delete this one.")
        return
    for number, (start, stop) in enumerate(_ranges(world.items, _FRAGMENT_ROWS // 8)):
        _write(folder / "items" / f"{number:05d}.parquet", _items(world, start, stop))
    per_fragment = max(1, _FRAGMENT_ROWS * world.users // world.interactions)
    for number, (start, stop) in enumerate(_ranges(world.users, per_fragment)):
        rng = np.random.default_rng([world.seed, number])
        ids = np.arange(start, stop)
        total = world.interactions * stop // world.users - world.interactions * start // world.users
        _write(folder / "users" / f"{number:05d}.parquet", _users(world, ids))
        user_ids = np.repeat(ids, _activity(rng, len(ids), total))
        _write(folder / "interactions" / f"{number:05d}.parquet", _interactions(world, rng, user_ids, first_day=0))
    done.write_text(json.dumps(asdict(world)))


def grow(world: World, folder: Path, *, new: float = 0.01, active: float = 0.05) -> tuple[int, int]:
    """Adds fragments with a share `new` of further users, and later interactions of a share `active` of the earlier.

    Returns how many users are new and how many of the earlier ones have new interactions.
    """
    n_new, n_active = round(world.users * new), 0
    rng = np.random.default_rng([world.seed, 1 << 31])
    ids = np.arange(world.users, world.users + n_new)
    _write(folder / "users" / "later.parquet", _users(world, ids))
    total = max(n_new, world.interactions * n_new // world.users)
    user_ids = np.repeat(ids, _activity(rng, n_new, total))
    _write(folder / "interactions" / "later-new.parquet", _interactions(world, rng, user_ids, first_day=DAYS))
    for number, (start, stop) in enumerate(_ranges(world.users, _FRAGMENT_ROWS)):
        rng = np.random.default_rng([world.seed, 1 << 31, number])
        chosen = start + np.flatnonzero(rng.random(stop - start) < active)
        user_ids = np.repeat(chosen, 1 + rng.poisson(_LATER_MEAN - 1, len(chosen)))
        n_active += len(chosen)
        path = folder / "interactions" / f"later-{number:05d}.parquet"
        _write(path, _interactions(world, rng, user_ids, first_day=DAYS))
    return n_new, n_active


def _ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, n)) for start in range(0, n, step))


def _activity(rng: np.random.Generator, users: int, total: int) -> np.ndarray:
    """Interactions of each user, int64 [users], which sum up to `total`: a few for all, the rest by a heavy tail."""
    least = min(_LEAST, total // max(users, 1))
    weights = rng.lognormal(size=users)
    return least + rng.multinomial(total - least * users, weights / weights.sum())


def _interactions(world: World, rng: np.random.Generator, user_ids: np.ndarray, first_day: int) -> pa.Table:
    n, genres = len(user_ids), len(GENRES)
    rank = np.minimum(np.exp(rng.random(n) * np.log(world.items + 1)).astype(np.int64), world.items) - 1
    own = rng.random(n) < _OWN_GENRE
    rank = np.where(own, rank - rank % genres + _genre_of(user_ids), rank)
    item = np.where(rank < world.items, rank, rank - genres)
    item = np.where(item < 0, 0, item)  # fewer items than genres
    # A user's interactions differ in time, so that none is refused as a duplicate: each has its own millisecond.
    position = np.arange(n) - np.searchsorted(user_ids, user_ids)
    second = START + first_day * 86_400 + rng.integers(DAYS * 86_400, size=n)
    return pa.table(
        {
            "user_id": user_ids,
            "item_id": item,
            "rating": np.clip(rng.integers(1, 5, size=n) + own, 1, 5).astype(np.int8),
            "timestamp": second * 1000 + position % 1000,
        }
    )


def _users(world: World, ids: np.ndarray) -> pa.Table:
    mixed = _mixed(ids, world.seed)
    gender = pa.array(["female", "male"]).take(pa.array(mixed % 2))
    return pa.table({"user_id": ids, "gender": gender, "age": pa.array(AGES).take(pa.array(mixed // 2 % len(AGES)))})


def _items(world: World, start: int, stop: int) -> pa.Table:
    ids = np.arange(start, stop)
    mixed = _mixed(ids, world.seed)
    words = [pa.array(w[mixed // 10**i % len(w)]) for i, w in ((1, _FIRST), (3, _SECOND), (5, _SECOND))]
    number = pc.cast(pa.array(ids), pa.string())
    title = pc.binary_join_element_wise("The", words[0], words[1], "of the", words[2], number, " ")
    genre = pa.array(GENRES).take(pa.array(ids % len(GENRES)))
    genres = pa.ListArray.from_arrays(pa.array(np.arange(len(ids) + 1, dtype=np.int32)), genre)
    return pa.table({"item_id": ids, "title": title, "genres": genres, "year": (1950 + mixed % 75).astype(np.int16)})


def _genre_of(ids: np.ndarray) -> np.ndarray:
    return _mixed(ids, 7) % len(GENRES)


def _mixed(ids: np.ndarray, seed: int) -> np.ndarray:
    """Numbers below 2^31 that look random beside ids: a multiplicative hash."""
    with np.errstate(over="ignore"):
        hashed = (ids.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return (hashed >> np.uint64(33)).astype(np.int64)


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, use_dictionary=False, compression="zstd", compression_level=1)
