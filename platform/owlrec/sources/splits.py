"""Splits each user's behaviors: the first are for the LLM to read, the later ones are samples to train and test on.

The rule is KAR's (RecSys 2024): the LLM reads the first min((N+1)//2, 30) behaviors, of those that the user took. What
a user passed over is a sample, too, and never read as taken. Counting alone leaks, though,
because the data sets' clocks are coarse: a sample with the timestamp of the last behavior read may have happened
before it. So `as_of` is that timestamp, samples must be strictly later, and a sample's own history is strictly earlier
than the sample.

Everything but the splits' two thresholds is a matter of one user, so a shard of users is built without the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from owlrec.config import Config
from owlrec.errors import LeakageError, SchemaError
from owlrec.ordered import rows_of, run_starts
from owlrec.schema import BEHAVIORS, HISTORIES, INTERACTIONS, SAMPLE_ROWS, SAMPLES, conform, shard_of
from owlrec.sources.outcomes import POSITIVE, SPLITS, Labels, drawn_negatives, taken, with_outcomes
from owlrec.workspace import Workspace

_HASH_RANGE = 1 << 62
# Lists are gathered this many at a time: it bounds the index arrays, and Arrow's 32-bit list offsets cannot overflow.
_LISTS_PER_CHUNK = 1 << 20
PASSED_QUOTED = 10  # of what a user passed over, an LLM reads so much at most
_TAKEN_ALONE = {b"histories_of": b"taken"}  # in the schema of stored interactions
_HISTORY_COLUMNS = {"history": "item_id", "history_ratings": "rating", "history_labels": "label"}
_EDGES = 4096  # of one round of the search for a threshold


class SplitConfig(Config):
    """How behaviors become samples: `user` keeps a user in one split, `time` trains on the past only, `column` reads
    the split of each from a column `split` of the interactions (train, valid or test).
    """

    method: Literal["user", "time", "column"] = "user"
    ratios: tuple[PositiveInt, PositiveInt, PositiveInt] = (8, 1, 1)
    history_length: int = Field(default=10, ge=1)  # behaviors that a CTR model sees before a sample
    passed_over: bool = True  # whether these hold what was passed over; false where little of what is shown is taken
    llm_history: int = Field(default=30, ge=1)  # behaviors that the LLM reads at most: the papers' 30
    seed: int = Field(default=0, ge=0)  # method user only


@dataclass(frozen=True)
class Behaviors:
    """Interactions of whole users by user, then by timestamp and item: six aligned arrays [n]."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    time: np.ndarray  # int64, ms
    rating: np.ndarray  # float32, NaN where not graded
    label: np.ndarray  # float32
    split: np.ndarray  # int8: a predefined one, -1 where there is none

    @classmethod
    def ordered(cls, interactions: pa.Table) -> "Behaviors":
        """Those of a table of schema.INTERACTIONS, in any order."""
        interactions = conform(interactions, INTERACTIONS, name="interactions")
        behaviors = cls.of(interactions)
        order = np.lexsort((behaviors.item, behaviors.time, behaviors.user))
        return cls(*(getattr(behaviors, field.name)[order] for field in fields(cls)))

    @classmethod
    def of(cls, interactions: pa.Table) -> "Behaviors":
        """Those of a table of schema.INTERACTIONS that is in order already."""
        columns = (interactions[name] for name in INTERACTIONS.names[:-1])
        user, item, rating, time, label = (column.to_numpy() for column in columns)
        split = interactions["split"].fill_null(-1).to_numpy()
        return cls(user, item, time, rating, label, split)

    @property
    def taken(self) -> np.ndarray:
        """bool [n]; the others were passed over."""
        return taken(self.rating, self.label)


@dataclass(frozen=True)
class Samples:
    """Which rows of some behaviors the LLM reads, and which are samples. Users ascend."""

    start: np.ndarray  # int64 [users]: each user's first row
    n_read: np.ndarray  # int64 [users]: how many behaviors the LLM reads, all of them taken; 0 of users who took none
    as_of: np.ndarray  # int64 [users]: the timestamp of the last of these; of users without any, before their first row
    read: np.ndarray  # int64: the rows that it reads, user by user
    row: np.ndarray  # int64 [samples]
    label: np.ndarray  # float32 [samples]
    ties: int  # behaviors that are no sample because they have the timestamp `as_of`

    @classmethod
    def of(cls, behaviors: Behaviors, config: SplitConfig) -> "Samples":
        """Applies the rule above."""
        user, time, took = behaviors.user, behaviors.time, behaviors.taken
        first = run_starts(user)
        start = np.flatnonzero(first == np.arange(len(user)))
        place = np.cumsum(first == np.arange(len(user))) - 1
        total = np.cumsum(took)
        before = total[start] - took[start] if len(start) else np.zeros(0, dtype=np.int64)
        rank = total - before[place]  # of each row that was taken among its user's, from 1
        n_taken = np.diff(np.append(before, total[-1:]))
        n_read = np.minimum((n_taken + 1) // 2, config.llm_history)
        read = np.flatnonzero(took & (rank <= n_read[place]))
        as_of = time[start] - 1
        as_of[n_read > 0] = time[read[np.cumsum(n_read)[n_read > 0] - 1]]
        later = time > as_of[place]
        unread = ~took | (rank > n_read[place])
        row = np.flatnonzero(unread & later)
        ties = int((took & unread & ~later).sum())
        return cls(start, n_read, as_of, read, row, behaviors.label[row], ties)


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
        value = split_values(behaviors, samples.row, config)
        order = np.argsort(value, kind="stable")
        value = value[order]
        last = np.flatnonzero(np.diff(value, append=value[-1:] + 1))
        total, positives = last + 1, np.cumsum(samples.label[order] >= POSITIVE, dtype=np.int64)[last]
        users = np.arange(1, len(last) + 1)
        return cls(value[last], users if config.method == "user" else total, total, positives)

    def table(self) -> pa.Table:
        """As a table that `of_table` reads back."""
        return pa.table({name: getattr(self, name) for name in ("value", "weight", "samples", "positives")})

    @classmethod
    def of_table(cls, table: pa.Table) -> "SplitValues":
        """From what `table` gave, without copying."""
        columns = (table[name] for name in ("value", "weight", "samples", "positives"))
        return cls(*(c.chunk(0).to_numpy() if c.num_chunks else np.zeros(0, dtype=np.int64) for c in columns))


def split_values(behaviors: Behaviors, rows: np.ndarray, config: SplitConfig) -> np.ndarray:
    """What decides the split of the samples at some rows: their timestamp, their predefined split, or the salted hash
    of their user; int64 [n].
    """
    if config.method == "time":
        return behaviors.time[rows]
    if config.method == "column":
        return behaviors.split[rows].astype(np.int64)
    salt = shard_of(np.array([config.seed + 1]), _HASH_RANGE)
    return shard_of(behaviors.user[rows] ^ salt, _HASH_RANGE)


def split_thresholds(parts: Sequence[SplitValues], config: SplitConfig) -> np.ndarray:
    """The two values where valid and test begin, int64 [2], exact whatever the size of `parts`.

    Values, not positions, divide the splits, so that equal timestamps fall on the same side. Memory does not grow with
    the parts, which may be mapped: each round counts them at a few thousand edges and goes on between two of them.
    """
    parts = [part for part in parts if len(part.value)]
    if config.method == "column":
        return np.array([1, 2])
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


def refuse_one_label(counts: dict[str, int], labels: Labels) -> None:
    """Raises SchemaError where all labels of a split are the same. counts: samples_* and positives_* among them."""
    remedy = {
        "rating_above": "Set labels.rating_above in the recipe to a value that your ratings straddle.",
        "column": "Log what was passed over as well, or set labels.rule: positives_only in the recipe.",
    }
    for name in SPLITS:
        if labels.rule in remedy and counts[f"positives_{name}"] in (0, counts[f"samples_{name}"]):
            raise SchemaError(
                f"samples: all labels of the {name} split are the same under the rule '{labels.about}'. "
                f"{remedy[labels.rule]}"
            )


def sample_rows(
    behaviors: Behaviors,
    samples: Samples,
    config: SplitConfig,
    thresholds: np.ndarray,
    labels: Labels,
    catalog: np.ndarray,
) -> pa.Table:
    """The samples table (schema.SAMPLE_ROWS) by user, timestamp and item; history_* are rows of `behaviors`, or of
    those that were taken where the split leaves out what was passed over.

    catalog: all item ids, ascending, from which samples of label 0 are drawn where the label rule wants such.
    """
    user, time, row = behaviors.user, behaviors.time, samples.row
    item, label = behaviors.item[row], samples.label
    if labels.negatives:
        took = behaviors.taken
        drawn = drawn_negatives(
            user[row], time[row], item, labels, took=(user[took], behaviors.item[took]), catalog=catalog
        )
        at, column = np.nonzero(drawn >= 0)
        row, item = np.concatenate([row, row[at]]), np.concatenate([item, drawn[at, column]])
        label = np.concatenate([label, np.zeros(len(at), dtype=np.float32)])
        order = np.lexsort((item, time[row], user[row]))
        row, item, label = row[order], item[order], label[order]
    end = run_starts(user, time)[row]  # behaviors of the sample's moment are not its past
    first = run_starts(user)[row]
    if not config.passed_over:
        seen = np.r_[0, np.cumsum(behaviors.taken)]
        first, end = seen[first], seen[end]
    start = np.maximum(first, end - config.history_length)
    split = np.searchsorted(thresholds, split_values(behaviors, row, config), side="right")
    columns = {
        "user_id": user[row],
        "item_id": item,
        "label": label.astype(np.float32),
        "timestamp": time[row],
        "split": pa.array(SPLITS).take(pa.array(split)),
        "history_start": start.astype(np.int32),
        "history_end": end.astype(np.int32),
    }
    return pa.table(columns, schema=SAMPLE_ROWS)


def histories(behaviors: Behaviors, samples: Samples) -> pa.Table:
    """What the LLM reads of each user (schema.HISTORIES), by user; those who took nothing have none."""
    some = np.flatnonzero(samples.n_read)
    end = np.cumsum(samples.n_read)[some]
    start = end - samples.n_read[some]
    passed, bounds = _passed_over(behaviors, samples)
    columns = {
        "user_id": behaviors.user[samples.start[some]],
        "as_of": samples.as_of[some],
        "items": _lists(behaviors.item[samples.read], start, end),
        "ratings": _lists(behaviors.rating[samples.read], start, end, nulls=True),
        "passed": _lists(passed, np.maximum(bounds[some], bounds[some + 1] - PASSED_QUOTED), bounds[some + 1]),
    }
    return pa.table(columns, schema=HISTORIES)


def _passed_over(behaviors: Behaviors, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """The items that users passed over up to their as_of, user by user, and where each user's begin: [users + 1].

    What they took up to then as well is left out.
    """
    place = np.repeat(np.arange(len(samples.start)), np.diff(samples.start, append=len(behaviors.user)))
    row = np.flatnonzero(~behaviors.taken & (behaviors.time <= samples.as_of[place]))
    if len(row):
        items, code = np.unique(behaviors.item, return_inverse=True)
        key = place * len(items) + code
        row = row[~np.isin(key[row], key[samples.read])]
    return behaviors.item[row], np.searchsorted(place[row], np.arange(len(samples.start) + 1))


def read_samples(workspace: Workspace, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard's samples as schema.SAMPLES, or only these of its columns: histories are gathered where asked for.

    Raises WorkspaceError where `prepare` has not run.
    """
    wanted = list(SAMPLES.names if columns is None else columns)
    stored = [name for name in wanted if name in SAMPLE_ROWS.names]
    lists = _HISTORY_COLUMNS
    if not lists.keys() & set(wanted):
        return workspace.read_shard("samples", number, stored).select(wanted)
    rows = workspace.read_shard("samples", number, [*stored, "history_start", "history_end"])
    needed = [column for name, column in lists.items() if name in wanted]
    return with_histories(rows, in_histories(workspace, number, needed)).select(wanted)


def in_histories(workspace: Workspace, number: int, columns: Sequence[str]) -> pa.Table:
    """The interactions of a shard that the histories of its samples are ranges of."""
    table = workspace.read_shard("interactions", number, list(columns))
    if not _holds_taken_alone(table):
        return table
    table = workspace.read_shard("interactions", number, list({*columns, "rating", "label"}))
    return table.filter(_taken(table)).select(list(columns))


def for_histories(interactions: pa.Table, config: SplitConfig) -> pa.Table:
    """A shard of interactions as it is written: it says which of its rows histories are ranges of."""
    return interactions.replace_schema_metadata(None if config.passed_over else _TAKEN_ALONE)


def _holds_taken_alone(interactions: pa.Table) -> bool:
    return (interactions.schema.metadata or {}).get(b"histories_of") == b"taken"


def _taken(interactions: pa.Table) -> pa.Array:
    return pa.array(taken(interactions["rating"].to_numpy(), interactions["label"].to_numpy()))


def with_histories(rows: pa.Table, interactions: pa.Table) -> pa.Table:
    """Sample rows with their histories as lists.

    rows: as schema.SAMPLE_ROWS, or some of its columns; interactions: of the same shard (see in_histories), item_id,
    rating or label.
    """
    start, end = (rows[name].to_numpy() for name in ("history_start", "history_end"))
    for name, column in _HISTORY_COLUMNS.items():
        if column in interactions.column_names:
            values = interactions[column].to_numpy()
            rows = rows.append_column(name, _lists(values, start, end, nulls=column == "rating"))
    return rows.drop_columns(["history_start", "history_end"])


@dataclass(frozen=True)
class SplitTables:
    """samples and histories as in `schema`; counts of rows, positives, and what was dropped."""

    samples: pa.Table
    histories: pa.Table
    counts: dict[str, int]


def build_samples(interactions: pa.Table, config: SplitConfig, labels: Labels) -> SplitTables:
    """Samples and LLM histories of interactions that fit in memory, as `prepare` makes them by shard.

    interactions: with the columns that tell an outcome, before the label rule. Both tables are ordered by user, samples
    then by timestamp and item. Raises SchemaError as with_outcomes, or where a split ends up empty.
    """
    interactions = with_outcomes(interactions, labels, "interactions")
    behaviors = Behaviors.ordered(interactions)
    samples = Samples.of(behaviors, config)
    values = [SplitValues.of(behaviors, samples, config)]
    thresholds = split_thresholds(values, config)
    counts = {**sample_counts(behaviors, samples), **split_counts(values, thresholds)}
    refuse_empty(counts, config)
    rows = sample_rows(behaviors, samples, config, thresholds, labels, np.unique(behaviors.item))
    kept = slice(None) if config.passed_over else behaviors.taken
    names = {"item_id": behaviors.item, "rating": behaviors.rating, "label": behaviors.label}
    lists = pa.table({name: values[kept] for name, values in names.items()})
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


def last_behaviors(interactions: pa.Table, history_length: int) -> pa.Table:
    """What a model reads of each user from now on (schema.BEHAVIORS): one row per user, ascending, with at most
    `history_length` behaviors, in the order of samples' histories.

    interactions: a shard of them, as `prepare` has written it.
    """
    if _holds_taken_alone(interactions):
        interactions = interactions.filter(_taken(interactions))
    behaviors = Behaviors.ordered(interactions)
    ids, start = np.unique(behaviors.user, return_index=True)
    end = np.r_[start[1:], len(behaviors.user)]
    start = np.maximum(start, end - history_length)
    columns = {
        "id": ids,
        "times": _lists(behaviors.time, start, end),
        "items": _lists(behaviors.item, start, end),
        "ratings": _lists(behaviors.rating, start, end, nulls=True),
        "labels": _lists(behaviors.label, start, end),
    }
    return pa.table(columns, schema=BEHAVIORS)


def refuse_leaks(samples: pa.Table, histories: pa.Table) -> None:
    """Raises LeakageError, naming the first user, where a sample is not later than its user's `as_of`. A user without a
    history has no text.
    """
    if samples.num_rows == 0:
        return
    user, time = samples["user_id"].to_numpy(), samples["timestamp"].to_numpy()
    known, as_of = histories["user_id"].to_numpy(), histories["as_of"].to_numpy()
    order = np.argsort(known, kind="stable")
    known, as_of = known[order], as_of[order]
    place = rows_of(known, user)
    leaks = (place >= 0) & (time <= as_of[place]) if len(known) else np.zeros(len(user), dtype=bool)
    if leaks.any():
        row = int(leaks.argmax())
        raise LeakageError(
            f"samples, row {row}: user {user[row]} has a sample at timestamp {time[row]}, but the LLM read their "
            f"history up to {as_of[place[row]]} ({int(leaks.sum())} such samples). Run `prepare` again: samples must "
            "be later than what was read."
        )


def _lists(values: np.ndarray, start: np.ndarray, end: np.ndarray, *, nulls: bool = False) -> pa.ChunkedArray:
    """A list column whose i-th list is values[start[i]:end[i]]. nulls: whether NaN stands for null."""

    def chunks() -> Iterator[pa.Array]:
        for first in range(0, len(start), _LISTS_PER_CHUNK):
            begin, length = start[first : first + _LISTS_PER_CHUNK], (end - start)[first : first + _LISTS_PER_CHUNK]
            offsets = np.r_[0, np.cumsum(length, dtype=np.int64)]
            index = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length)
            yield pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[index], from_pandas=nulls))

    return pa.chunked_array(list(chunks()), type=pa.list_(pa.from_numpy_dtype(values.dtype)))
