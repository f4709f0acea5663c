"""Parts each user's behaviours: the first are for the LLM to read, the later ones are samples to train and test on.

The rule is KAR's (RecSys 2024): the LLM reads the first min((N+1)//2, 30) behaviours. Counting alone leaks, though,
because the data sets' clocks are coarse: a sample with the timestamp of the last behaviour read may have happened
before it. So `as_of` is that timestamp, samples must be strictly later, and a sample's own history is strictly earlier
than the sample. Everything is vectorised.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from owlrec.config import Config
from owlrec.errors import LeakageError, SchemaError
from owlrec.ordered import rows_of, run_starts
from owlrec.schema import HISTORIES, INTERACTIONS, SAMPLES, conform, shard_of

SPLITS = ("train", "valid", "test")
_HASH_RANGE = 1 << 62
# Lists are gathered this many at a time: it bounds the index arrays, and Arrow's 32-bit list offsets cannot overflow.
_LISTS_PER_CHUNK = 1 << 20


class SplitConfig(Config):
    """How behaviours become samples: `user` keeps a user in one split, `time` trains on the past only."""

    method: Literal["user", "time"] = "user"
    ratios: tuple[PositiveInt, PositiveInt, PositiveInt] = (8, 1, 1)
    history_length: int = Field(default=10, ge=1)  # behaviours that a CTR model sees before a sample
    llm_history: int = Field(default=30, ge=1)  # behaviours that the LLM reads at most: the papers' 30
    seed: int = Field(default=0, ge=0)  # method user only


@dataclass(frozen=True)
class SplitTables:
    """samples and histories as in `schema`; counts of rows, positives, and what was dropped."""

    samples: pa.Table
    histories: pa.Table
    counts: dict[str, int]


def build_samples(interactions: pa.Table, config: SplitConfig, positive_above: float) -> SplitTables:
    """Samples and LLM histories of an interactions table.

    A sample's label is 1 where its rating exceeds `positive_above`. A rating column that is null throughout means
    implicit feedback (rating 1). Both tables are ordered by user, samples then by timestamp and item. Raises
    SchemaError where some ratings are null, or a split ends up empty.
    """
    user, item, time, rating = _in_order(interactions)
    _, start, of_user, n_behaviours = np.unique(user, return_index=True, return_inverse=True, return_counts=True)
    n_read = np.minimum((n_behaviours + 1) // 2, config.llm_history)
    as_of = time[start + n_read - 1]

    unread = np.arange(len(user)) - start[of_user] >= n_read[of_user]
    later = time > as_of[of_user]
    sample = np.flatnonzero(unread & later)
    history_end = run_starts(user, time)[sample]  # behaviours of the sample's moment are not its past
    history_start = np.maximum(start[of_user[sample]], history_end - config.history_length)

    label = rating[sample] > positive_above
    split = _split(user[sample], time[sample], config)
    counts = {
        "interactions": len(user),
        "users": len(start),
        "users_without_samples": len(start) - len(np.unique(of_user[sample])),
        "read_by_llm": int(n_read.sum()),
        "ties_dropped": int((unread & ~later).sum()),
        "samples": len(sample),
    }
    for code, name in enumerate(SPLITS):
        counts[f"samples_{name}"] = int((split == code).sum())
        counts[f"positives_{name}"] = int(label[split == code].sum())
    _refuse_empty(counts, config)

    samples = pa.table(
        {
            "user_id": user[sample],
            "item_id": item[sample],
            "label": label.astype(np.float32),
            "timestamp": time[sample],
            "history": _lists(item, history_start, history_end),
            "history_ratings": _lists(rating, history_start, history_end),
            "split": pa.array(SPLITS).take(pa.array(split)),
        },
        schema=SAMPLES,
    )
    histories = pa.table(
        {
            "user_id": user[start],
            "as_of": as_of,
            "items": _lists(item, start, start + n_read),
            "ratings": _lists(rating, start, start + n_read),
        },
        schema=HISTORIES,
    )
    refuse_leaks(samples, histories)
    return SplitTables(samples=samples, histories=histories, counts=counts)


def last_behaviours(interactions: pa.Table, history_length: int) -> pa.Table:
    """What a CTR model reads of each user from now on: one row a user, ascending, with their last behaviours.

    Columns user_id, history and history_ratings, as in schema.SAMPLES. Errors: as of `build_samples`.
    """
    user, item, _, rating = _in_order(interactions)
    ids, start = np.unique(user, return_index=True)
    end = np.r_[start[1:], len(user)]
    start = np.maximum(start, end - history_length)
    columns = {"history": item, "history_ratings": rating}
    return pa.table({"user_id": ids, **{name: _lists(values, start, end) for name, values in columns.items()}})


def refuse_leaks(samples: pa.Table, histories: pa.Table) -> None:
    """Raises LeakageError, naming the first user, where a sample is not later than its user's `as_of` or has none."""
    if samples.num_rows == 0:
        return
    user, time = samples["user_id"].to_numpy(), samples["timestamp"].to_numpy()
    known, as_of = histories["user_id"].to_numpy(), histories["as_of"].to_numpy()
    order = np.argsort(known, kind="stable")
    known, as_of = known[order], as_of[order]
    place = rows_of(known, user)
    if (unknown := place < 0).any():
        raise LeakageError(
            f"samples, row {int(unknown.argmax())}: user {user[unknown.argmax()]} has no row in histories, so nothing "
            "says what the LLM read of them. Run `prepare` again."
        )
    leaks = time <= as_of[place]
    if leaks.any():
        row = int(leaks.argmax())
        raise LeakageError(
            f"samples, row {row}: user {user[row]} has a sample at timestamp {time[row]}, but the LLM read their "
            f"history up to {as_of[place[row]]} ({int(leaks.sum())} such samples). Run `prepare` again: samples must "
            "be later than what was read."
        )


def _in_order(interactions: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User, item, timestamp and rating of all interactions, by user, then by timestamp and item."""
    interactions = conform(interactions, INTERACTIONS, name="interactions")
    rating = _ratings(interactions)
    user, item, time = (interactions[c].to_numpy() for c in ("user_id", "item_id", "timestamp"))
    order = np.lexsort((item, time, user))
    return user[order], item[order], time[order], rating[order]


def _ratings(interactions: pa.Table) -> np.ndarray:
    """float32 [n]; ones where the whole column is null. Raises SchemaError for a null or NaN among ratings."""
    if interactions["rating"].null_count == interactions.num_rows:
        return np.ones(interactions.num_rows, dtype=np.float32)
    ratings: np.ndarray = interactions["rating"].to_numpy()  # a null becomes NaN
    missing = np.isnan(ratings)
    if missing.any():
        raise SchemaError(
            f"interactions, row {int(missing.argmax())}: rating is null ({int(missing.sum())} such rows). "
            f"Drop the rows or rate them; for implicit feedback leave the rating column out altogether."
        )
    return ratings


def _split(user: np.ndarray, time: np.ndarray, config: SplitConfig) -> np.ndarray:
    """The index into SPLITS of each sample, int64 [n]."""
    bounds = np.cumsum(config.ratios)[:2]
    total = sum(config.ratios)
    if config.method == "time":
        # Values, not positions, part the splits: equal timestamps fall on the same side.
        ordered = np.sort(time)
        thresholds = ordered[len(ordered) * bounds // total] if len(ordered) else np.zeros(2, dtype=np.int64)
        return np.searchsorted(thresholds, time, side="right")
    users, of_user = np.unique(user, return_inverse=True)
    salt = shard_of(np.array([config.seed + 1]), _HASH_RANGE)
    rank = np.empty(len(users), dtype=np.int64)
    rank[np.lexsort((users, shard_of(users ^ salt, _HASH_RANGE)))] = np.arange(len(users))
    return np.searchsorted(len(users) * bounds // total, rank, side="right")[of_user]


def _refuse_empty(counts: dict[str, int], config: SplitConfig) -> None:
    empty = [name for name in SPLITS if counts[f"samples_{name}"] == 0]
    if empty:
        remedy = "use more users" if config.method == "user" else "use data over a longer time"
        raise SchemaError(
            f"interactions: {counts['samples']} samples of {counts['users'] - counts['users_without_samples']} users "
            f"leave the {' and '.join(empty)} split empty with split.method {config.method} and ratios "
            f"{':'.join(map(str, config.ratios))}. Change the ratios, {remedy}, or lower split.llm_history "
            f"({counts['ties_dropped']} samples had the timestamp of the last behaviour that the LLM reads)."
        )


def _lists(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> pa.ChunkedArray:
    """A list column whose i-th list is values[start[i]:end[i]]."""

    def chunks() -> Iterator[pa.Array]:
        for first in range(0, len(start), _LISTS_PER_CHUNK):
            begin, length = start[first : first + _LISTS_PER_CHUNK], (end - start)[first : first + _LISTS_PER_CHUNK]
            offsets = np.r_[0, np.cumsum(length)]
            index = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length)
            yield pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[index]))

    return pa.chunked_array(list(chunks()), type=pa.list_(pa.from_numpy_dtype(values.dtype)))
