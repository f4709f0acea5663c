"""Splits each user's behaviors: the first are for the LLM to read, the later ones are samples to train and test on.

The rule is KAR's (RecSys 2024): the LLM reads the first min((N+1)//2, 30) behaviors. Counting alone leaks, though,
because the data sets' clocks are coarse: a sample with the timestamp of the last behavior read may have happened
before it. So `as_of` is that timestamp, samples must be strictly later, and a sample's own history is strictly earlier
than the sample.

Everything but the splits' two thresholds is a matter of one user, so a shard of users is built without the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from owlrec.config import Config
from owlrec.errors import LeakageError, SchemaError
from owlrec.ordered import rows_of, run_starts
from owlrec.schema import HISTORIES, INTERACTIONS, SAMPLE_ROWS, SAMPLES, conform, shard_of
from owlrec.workspace import Workspace

SPLITS = ("train", "valid", "test")
_HASH_RANGE = 1 << 62
# Lists are gathered this many at a time: it bounds the index arrays, and Arrow's 32-bit list offsets cannot overflow.
_LISTS_PER_CHUNK = 1 << 20
_EDGES = 4096  # of one round of the search for a threshold


class SplitConfig(Config):
    """How behaviors become samples: `user` keeps a user in one split, `time` trains on the past only."""

    method: Literal["user", "time"] = "user"
    ratios: tuple[PositiveInt, PositiveInt, PositiveInt] = (8, 1, 1)
    history_length: int = Field(default=10, ge=1)  # behaviors that a CTR model sees before a sample
    llm_history: int = Field(default=30, ge=1)  # behaviors that the LLM reads at most: the papers' 30
    seed: int = Field(default=0, ge=0)  # method user only


@dataclass(frozen=True)
class Behaviors:
    """Interactions of whole users by user, then by timestamp and item: four aligned arrays [n]."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    time: np.ndarray  # int64, ms
    rating: np.ndarray  # float32

    @classmethod
    def ordered(cls, interactions: pa.Table) -> "Behaviors":
        """Those of an interactions table, in any order. Ratings that are null throughout count as 1.

        Raises SchemaError where only some ratings are null.
        """
        interactions = conform(interactions, INTERACTIONS, name="interactions")
        rating = ratings(interactions["rating"], "interactions")
        user, item, time = (interactions[c].to_numpy() for c in ("user_id", "item_id", "timestamp"))
        order = np.lexsort((item, time, user))
        return cls(user[order], item[order], time[order], rating[order])


@dataclass(frozen=True)
class Samples:
    """Which rows of some behaviors the LLM reads, and which are samples. Users ascend."""

    start: np.ndarray  # int64 [users]: each user's first row
    n_read: np.ndarray  # int64 [users]: how many of their behaviors the LLM reads
    as_of: np.ndarray  # int64 [users]: the timestamp of the last of these
    row: np.ndarray  # int64 [samples]
    label: np.ndarray  # bool [samples]
    ties: int  # behaviors that are no sample because they have the timestamp `as_of`

    @classmethod
    def of(cls, behaviors: Behaviors, config: SplitConfig, positive_above: float) -> "Samples":
        """Applies the rule above; a label is 1 where the rating exceeds `positive_above`."""
        user, time = behaviors.user, behaviors.time
        first = run_starts(user)
        start = np.flatnonzero(first == np.arange(len(user)))
        n_read = np.minimum((np.diff(start, append=len(user)) + 1) // 2, config.llm_history)
        as_of = time[start + n_read - 1]
        place = np.cumsum(first == np.arange(len(user))) - 1
        unread = np.arange(len(user)) - first >= n_read[place]
        later = time > as_of[place]
        row = np.flatnonzero(unread & later)
        label = behaviors.rating[row] > positive_above
        return cls(start, n_read, as_of, row, label, int((unread & ~later).sum()))


@dataclass(frozen=True)
class SplitValues:
    """The values by which some samples are split, distinct and ascending, and how much lies up to each of them.

    Sums, so that a threshold is found in mapped files by touching few of their pages.
    """

    value: np.ndarray  # int64 [n]: a salted hash per user, or a timestamp
    weight: np.ndarray  # int64 [n]: what the ratios divide: users, or samples
    samples: np.ndarray  # int64 [n]
    positives: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, behaviors: Behaviors, samples: Samples, config: SplitConfig) -> "SplitValues":
        """Those of `samples`."""
        value = split_values(behaviors.user[samples.row], behaviors.time[samples.row], config)
        order = np.argsort(value, kind="stable")
        value = value[order]
        last = np.flatnonzero(np.diff(value, append=value[-1:] + 1))
        total, positives = last + 1, np.cumsum(samples.label[order], dtype=np.int64)[last]
        return cls(value[last], total if config.method == "time" else np.arange(1, len(last) + 1), total, positives)

    def table(self) -> pa.Table:
        """As a table that `of_table` reads back."""
        return pa.table({name: getattr(self, name) for name in ("value", "weight", "samples", "positives")})

    @classmethod
    def of_table(cls, table: pa.Table) -> "SplitValues":
        """From what `table` gave, without copying."""
        columns = (table[name] for name in ("value", "weight", "samples", "positives"))
        return cls(*(c.chunk(0).to_numpy() if c.num_chunks else np.zeros(0, dtype=np.int64) for c in columns))


def split_values(user: np.ndarray, time: np.ndarray, config: SplitConfig) -> np.ndarray:
    """What decides the split of each sample: its timestamp, or its user's salted hash; int64 [n]."""
    if config.method == "time":
        return time
    salt = shard_of(np.array([config.seed + 1]), _HASH_RANGE)
    return shard_of(user ^ salt, _HASH_RANGE)


def split_thresholds(parts: Sequence[SplitValues], config: SplitConfig) -> np.ndarray:
    """The two values where valid and test begin, int64 [2], exact whatever the size of `parts`.

    Values, not positions, divide the splits, so that equal timestamps fall on the same side. Memory does not grow with
    the parts, which may be mapped: each round counts them at a few thousand edges and goes on between two of them.
    """
    parts = [part for part in parts if len(part.value)]
    if not parts:
        return np.zeros(2, dtype=np.int64)
    total = sum(int(part.weight[-1]) for part in parts)
    bounds = [total * int(bound) // sum(config.ratios) for bound in np.cumsum(config.ratios)[:2]]
    return np.array([_value_at(rank, parts) for rank in bounds])


def _value_at(rank: int, parts: Sequence[SplitValues]) -> int:
    """The smallest value that, with all below it, weighs more than `rank`."""
    low, high = min(int(part.value[0]) for part in parts), max(int(part.value[-1]) for part in parts)
    while low < high:
        edges = np.arange(low, high, max(1, (high - low) // _EDGES))
        weight = sum(_up_to(part.weight, np.searchsorted(part.value, edges, side="right")) for part in parts)
        first = int(np.searchsorted(weight, rank, side="right"))  # the first edge that weighs enough
        low, high = int(edges[first - 1]) + 1 if first else low, int(edges[first]) if first < len(edges) else high
    return low


def _up_to(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of the first `rows` rows, for each."""
    return np.where(rows > 0, sums[np.maximum(rows, 1) - 1], 0)


def split_counts(parts: Sequence[SplitValues], thresholds: np.ndarray) -> dict[str, int]:
    """samples_train, positives_train and so on."""
    counts = dict.fromkeys((f"{what}_{name}" for name in SPLITS for what in ("samples", "positives")), 0)
    for part in parts:
        if len(part.value):
            rows = np.r_[0, np.searchsorted(part.value, thresholds, side="left"), len(part.value)]
            for what in ("samples", "positives"):
                for name, count in zip(SPLITS, np.diff(_up_to(getattr(part, what), rows)), strict=True):
                    counts[f"{what}_{name}"] += int(count)
    return counts


def refuse_empty(counts: dict[str, int], config: SplitConfig) -> None:
    """Raises SchemaError where a split holds no samples. counts: samples, users and samples_* among them."""
    empty = [name for name in SPLITS if counts[f"samples_{name}"] == 0]
    if empty:
        remedy = "use more users" if config.method == "user" else "use data over a longer time"
        raise SchemaError(
            f"interactions: {counts['samples']} samples of {counts['users'] - counts['users_without_samples']} users "
            f"leave the {' and '.join(empty)} split empty with split.method {config.method} and ratios "
            f"{':'.join(map(str, config.ratios))}. Change the ratios, {remedy}, or lower split.llm_history "
            f"({counts['ties_dropped']} samples had the timestamp of the last behavior that the LLM reads)."
        )


def refuse_one_label(counts: dict[str, int], positive_above: float) -> None:
    """Raises SchemaError where all labels of a split are the same. counts: samples_* and positives_* among them."""
    for name in SPLITS:
        if counts[f"positives_{name}"] in (0, counts[f"samples_{name}"]):
            raise SchemaError(
                f"samples: all labels of the {name} split are the same under the rule 'rating > {positive_above:g}'. "
                "Set positive_above in the recipe to a value that your ratings straddle."
            )


def sample_rows(behaviors: Behaviors, samples: Samples, config: SplitConfig, thresholds: np.ndarray) -> pa.Table:
    """The samples table (schema.SAMPLE_ROWS) by user, timestamp and item; history_* are rows of `behaviors`."""
    user, time, row = behaviors.user, behaviors.time, samples.row
    end = run_starts(user, time)[row]  # behaviors of the sample's moment are not its past
    start = np.maximum(run_starts(user)[row], end - config.history_length)
    split = np.searchsorted(thresholds, split_values(user[row], time[row], config), side="right")
    columns = {
        "user_id": user[row],
        "item_id": behaviors.item[row],
        "label": samples.label.astype(np.float32),
        "timestamp": time[row],
        "split": pa.array(SPLITS).take(pa.array(split)),
        "history_start": start.astype(np.int32),
        "history_end": end.astype(np.int32),
    }
    return pa.table(columns, schema=SAMPLE_ROWS)


def histories(behaviors: Behaviors, samples: Samples) -> pa.Table:
    """What the LLM reads of each user (schema.HISTORIES), by user."""
    start, end = samples.start, samples.start + samples.n_read
    columns = {
        "user_id": behaviors.user[start],
        "as_of": samples.as_of,
        "items": _lists(behaviors.item, start, end),
        "ratings": _lists(behaviors.rating, start, end),
    }
    return pa.table(columns, schema=HISTORIES)


def read_samples(workspace: Workspace, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard's samples as schema.SAMPLES, or only these of its columns: histories are gathered where asked for.

    Raises WorkspaceError where `prepare` has not run.
    """
    wanted = list(SAMPLES.names if columns is None else columns)
    stored = [name for name in wanted if name in SAMPLE_ROWS.names]
    lists = {"history": "item_id", "history_ratings": "rating"}
    if not lists.keys() & set(wanted):
        return workspace.read_shard("samples", number, stored).select(wanted)
    rows = workspace.read_shard("samples", number, [*stored, "history_start", "history_end"])
    needed = [column for name, column in lists.items() if name in wanted]
    return with_histories(rows, workspace.read_shard("interactions", number, needed)).select(wanted)


def with_histories(rows: pa.Table, interactions: pa.Table) -> pa.Table:
    """Sample rows with their histories as lists.

    rows: as schema.SAMPLE_ROWS, or some of its columns; interactions: of the same shard, item_id or rating or both.
    """
    start, end = (rows[name].to_numpy() for name in ("history_start", "history_end"))
    for name, column in (("history", "item_id"), ("history_ratings", "rating")):
        if column in interactions.column_names:
            rows = rows.append_column(name, _lists(interactions[column].to_numpy(), start, end))
    return rows.drop_columns(["history_start", "history_end"])


@dataclass(frozen=True)
class SplitTables:
    """samples and histories as in `schema`; counts of rows, positives, and what was dropped."""

    samples: pa.Table
    histories: pa.Table
    counts: dict[str, int]


def build_samples(interactions: pa.Table, config: SplitConfig, positive_above: float) -> SplitTables:
    """Samples and LLM histories of an interactions table that fits in memory, as `prepare` makes them by shard.

    Both tables are ordered by user, samples then by timestamp and item. Raises SchemaError where some ratings are
    null, or a split ends up empty.
    """
    behaviors = Behaviors.ordered(interactions)
    samples = Samples.of(behaviors, config, positive_above)
    values = [SplitValues.of(behaviors, samples, config)]
    thresholds = split_thresholds(values, config)
    counts = {**sample_counts(behaviors, samples), **split_counts(values, thresholds)}
    refuse_empty(counts, config)
    rows = sample_rows(behaviors, samples, config, thresholds)
    lists = pa.table({"item_id": behaviors.item, "rating": behaviors.rating})
    read = histories(behaviors, samples)
    refuse_leaks(rows, read)
    return SplitTables(with_histories(rows, lists).select(SAMPLES.names), read, counts)


def sample_counts(behaviors: Behaviors, samples: Samples) -> dict[str, int]:
    """What the report says of some users; add up over shards."""
    return {
        "interactions": len(behaviors.user),
        "users": len(samples.start),
        "users_without_samples": len(samples.start) - len(np.unique(behaviors.user[samples.row])),
        "read_by_llm": int(samples.n_read.sum()),
        "ties_dropped": samples.ties,
        "samples": len(samples.row),
    }


def last_behaviours(interactions: pa.Table, history_length: int) -> pa.Table:
    """What a CTR model reads of each user from now on: one row per user, ascending, with their last behaviors.

    Columns user_id, history and history_ratings, as in schema.SAMPLES. Errors: as of `build_samples`.
    """
    behaviors = Behaviors.ordered(interactions)
    ids, start = np.unique(behaviors.user, return_index=True)
    end = np.r_[start[1:], len(behaviors.user)]
    start = np.maximum(start, end - history_length)
    columns = {"history": behaviors.item, "history_ratings": behaviors.rating}
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


def ratings(column: pa.ChunkedArray, name: str, first_row: int = 0) -> np.ndarray:
    """float32 [n]; ones where the whole column is null. Raises SchemaError for a null or NaN among ratings.

    name: of the table, in errors; first_row: the column's, there.
    """
    if column.null_count == len(column):
        return np.ones(len(column), dtype=np.float32)
    values: np.ndarray = column.to_numpy()  # a null becomes NaN
    missing = np.isnan(values)
    if missing.any():
        raise SchemaError(
            f"{name}, row {first_row + int(missing.argmax())}: rating is null ({int(missing.sum())} such rows). "
            f"Drop the rows or rate them; for implicit feedback leave the rating column out altogether."
        )
    return values.astype(np.float32, copy=False)


def _lists(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> pa.ChunkedArray:
    """A list column whose i-th list is values[start[i]:end[i]]."""

    def chunks() -> Iterator[pa.Array]:
        for first in range(0, len(start), _LISTS_PER_CHUNK):
            begin, length = start[first : first + _LISTS_PER_CHUNK], (end - start)[first : first + _LISTS_PER_CHUNK]
            offsets = np.r_[0, np.cumsum(length, dtype=np.int64)]
            index = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length)
            yield pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[index]))

    return pa.chunked_array(list(chunks()), type=pa.list_(pa.from_numpy_dtype(values.dtype)))
