"""Converts tables to the dense integer arrays that CTR models read.

A user is represented by the last items with their ratings and, optionally, profile fields. There is no user id
(the split is by user, so a test user's id is always unseen; KAR leaves it out, too). An item is its id and up to two
attributes; its codes are stored once in `ItemFeatures` and gathered by row number. A history is a range of its user's
behaviors, which are also stored once; no sample has a copy of either. Code 0 is padding, 1 stands for any value
unseen in training.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ids import rows_of
from owlrec.sources.outcomes import POSITIVE, taken

PADDING, UNKNOWN = 0, 1
RESERVED = 2  # the first code of a real value, and the first row of a real item
MAX_ATTRIBUTES = 2
VALUES_PER_ATTRIBUTE = 4  # an item keeps the first four values of a multi-valued attribute
GRADES = 10  # number of rating levels
PASSED = GRADES + 1  # token of a passed-over item
OUTCOMES = PASSED + 1  # tokens, including 0 for taken without a grade
_FEW = 100  # higher ratings are counts, with levels of their logarithm
SPLITS = ("train", "valid", "test")

Segment = tuple[int, int, int]  # rows of one shard: its number, the first and the end


class FeatureSpec(Config):
    """Sizes of all embedding tables, including padding and unknown, and the names of what they embed."""

    n_items: int
    attributes: dict[str, int]  # name -> size, in the order of ItemFeatures.attributes
    profile: dict[str, int]  # name -> size, in the order of SampleFeatures.profile
    history_length: int


class Grades(NamedTuple):
    """Lowest and highest rating of a data set, which define the rating levels."""

    low: float
    high: float

    @classmethod
    def of(cls, ratings: np.ndarray) -> "Grades":
        """Grades of ratings; NaN is missing."""
        graded = ratings[~np.isnan(ratings)]
        return cls(float(graded.min()), float(graded.max())) if len(graded) else cls(0.0, 0.0)

    def tokens(self, ratings: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Token of each behavior's outcome: uint8 [n].

        0: taken without a grade; 1 to GRADES: the grade, evenly from the lowest to the highest; PASSED: passed over.
        ratings: float [n], NaN for none; labels: float [n].
        """
        low, high = self.low, max(self.high, self.low + 1e-6)
        clipped = np.clip(np.nan_to_num(ratings, nan=low), low, high)
        if high > _FEW and low >= 0:
            clipped, low, high = np.log1p(clipped), math.log1p(low), math.log1p(high)
        level = 1 + np.rint((clipped - low) / (high - low) * (GRADES - 1))
        graded = np.where(np.isnan(ratings), 0, level)
        return np.where(taken(ratings, labels), graded, PASSED).astype(np.uint8)


def liked(tokens: np.ndarray) -> np.ndarray:
    """Whether outcome tokens (Grades.tokens) are of liked items: taken, with a grade in the upper half or none."""
    return (tokens == 0) | ((tokens > GRADES // 2) & (tokens != PASSED))


@dataclass(frozen=True)
class Vocabularies:
    """Known values, sorted: the value at position i has code i + 2."""

    items: pa.Array  # int64: ids that occur in training
    attributes: dict[str, pa.Array]  # string
    profile: dict[str, pa.Array]  # string
    grades: Grades  # of the ratings in all interactions

    def spec(self, history_length: int) -> FeatureSpec:
        """Sizes for these vocabularies."""
        return FeatureSpec(
            n_items=len(self.items) + RESERVED,
            attributes={name: len(values) + RESERVED for name, values in self.attributes.items()},
            profile={name: len(values) + RESERVED for name, values in self.profile.items()},
            history_length=history_length,
        )


@dataclass(frozen=True)
class ItemFeatures:
    """Codes of all items. Row 0 is padding, row 1 an item missing from the table, row i + 2 the item `ids[i]`."""

    ids: np.ndarray  # int64 [n], ascending
    codes: np.ndarray  # int32 [n + 2]
    attributes: np.ndarray  # int32 [n + 2, n_attributes, VALUES_PER_ATTRIBUTE], padded with 0

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int32: row of each id, of any shape; 1 if the item table does not have it."""
        return item_rows(self.ids, ids)


@dataclass(frozen=True)
class Histories:
    """Ranges of behaviors: row i has `lengths[i]` of them from `starts[i]` on, oldest first."""

    starts: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int32 [n]
    items: np.ndarray  # int32 [m], row numbers of ItemFeatures
    ratings: np.ndarray  # uint8 [m]: see Grades.tokens
    width: int  # a model reads at most this many, the latest

    def matrices(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Items and ratings of some rows: int32 [b, width] each, oldest first, then padding."""
        starts, lengths = self.starts[rows], self.lengths[rows].astype(np.int64)
        kept = np.minimum(lengths, self.width)
        column = np.arange(self.width)
        used = column < kept[:, None]
        at = ((starts + lengths - kept)[:, None] + column)[used]
        items, ratings = (np.zeros(used.shape, dtype=np.int32) for _ in range(2))
        items[used], ratings[used] = self.items[at], self.ratings[at]
        return items, ratings

    def take(self, rows: np.ndarray | slice) -> "Histories":
        """Some rows over the same behaviors."""
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows])


_COLUMNS = ("user_ids", "item_ids", "items", "profile", "labels", "times", "weights")


@dataclass(frozen=True)
class SampleFeatures:
    """One row per sample. `items` has row numbers of ItemFeatures."""

    user_ids: np.ndarray  # int64 [n], for lookups of knowledge and grouping
    item_ids: np.ndarray  # int64 [n], for lookups of knowledge
    items: np.ndarray  # int32 [n]
    histories: Histories
    profile: np.ndarray  # int32 [n, n_profile]
    labels: np.ndarray  # float32 [n], in [0, 1] for training, else 0 or 1
    times: np.ndarray | None = None  # int64 [n], ms: limits knowledge to earlier rows; None: now
    weights: np.ndarray | None = None  # float32 [n]: training weights; None: all equal

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def history(self) -> np.ndarray:
        """int32 [n, history_length]: row numbers of ItemFeatures, oldest first, then padding."""
        return self.histories.matrices(slice(None))[0]

    @property
    def ratings(self) -> np.ndarray:
        """int32 [n, history_length]: see Grades.tokens; 0 for padding."""
        return self.histories.matrices(slice(None))[1]

    @property
    def history_lengths(self) -> np.ndarray:
        """int [n]: number of behaviors that a model reads."""
        return np.minimum(self.histories.lengths, self.histories.width)

    def take(self, rows: np.ndarray | slice) -> "SampleFeatures":
        """Some rows over the same behaviors."""
        columns = {name: array[rows] for name in _COLUMNS if (array := getattr(self, name)) is not None}
        return SampleFeatures(histories=self.histories.take(rows), **columns)

    @staticmethod
    def concatenated(parts: Iterable["SampleFeatures"]) -> "SampleFeatures":
        """The rows of all parts (at least one), in order, copied: a part's file is closed before the next one is
        opened. Unused behaviors at a part's ends are left out.
        """
        columns: dict[str, list[np.ndarray]] = {}
        before = width = 0
        for part in parts:
            histories, width = part.histories, part.histories.width
            low = int(histories.starts.min(initial=len(histories.items)))
            high = max(low, int((histories.starts + histories.lengths).max(initial=0)))
            copied = {name: array for name in _COLUMNS if (array := getattr(part, name)) is not None}
            copied |= {"starts": histories.starts - low + before, "lengths": histories.lengths}
            copied |= {"history": histories.items[low:high], "ratings": histories.ratings[low:high]}
            for name, array in copied.items():
                columns.setdefault(name, []).append(np.array(array))
            before += high - low
        whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        starts, lengths, items, ratings = (whole.pop(name) for name in ("starts", "lengths", "history", "ratings"))
        histories = Histories(starts, lengths, items, ratings, width)
        return SampleFeatures(histories=histories, **whole)


@dataclass(frozen=True)
class Split:
    """Samples of a split, in shards: row numbers count through all of them."""

    shards: Sequence[SampleFeatures]  # mapped from disk on demand, or all in memory
    sizes: tuple[int, ...]  # rows per shard

    @classmethod
    def of(cls, samples: SampleFeatures) -> "Split":
        """One shard, in memory."""
        return cls((samples,), (len(samples),))

    def __len__(self) -> int:
        return sum(self.sizes)

    def window(self, segments: Iterable[Segment]) -> SampleFeatures:
        """Rows of some segments, in order: a single one without a copy, several copied into memory."""
        segments = list(segments)
        if len(segments) == 1:
            ((shard, a, b),) = segments
            return self.shards[shard].take(slice(a, b))
        return SampleFeatures.concatenated(self.shards[shard].take(slice(a, b)) for shard, a, b in segments)

    def whole(self) -> SampleFeatures:
        """All rows in memory: for small splits and for tests."""
        return self.window((shard, 0, size) for shard, size in enumerate(self.sizes))


@dataclass(frozen=True)
class Features:
    """Everything that training needs from the tables."""

    spec: FeatureSpec
    vocabularies: Vocabularies
    items: ItemFeatures
    item_counts: np.ndarray  # int64 [n + 2]: occurrences of each item in training, as target or in a history
    splits: dict[str, Split]  # train, valid, test


def build_features(
    users: pa.Table,
    items: pa.Table,
    samples: pa.Table,
    *,
    attributes: Sequence[str],
    profile: Sequence[str],
    min_item_count: int,
) -> Features:
    """Arrays of all three splits; vocabularies come only from the training split and the item table.

    For tables in memory; `encoded` does the same by shard. The history length is that of the longest history in
    training, which the sample builder has already truncated.
    attributes, profile: column names, most important first; missing columns are skipped, and two attributes are
    kept.
    min_item_count: an item with fewer occurrences in training (as target or in a history) shares the code of unknown
    items, which is trained this way.
    Raises SchemaError if a split is empty or has only one class, since a loss or an AUC would be
    meaningless, and for a label outside [0, 1].
    """
    index = np.sort(items["item_id"].to_numpy())
    history = samples["history"].combine_chunks()
    rows = item_rows(index, samples["item_id"].to_numpy())
    history_items = item_rows(index, pc.list_flatten(history).to_numpy())
    train = pc.equal(samples["split"], "train").to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(history).to_numpy()
    counts = np.bincount(rows[train], minlength=len(index) + RESERVED)
    counts += np.bincount(history_items[np.repeat(train, lengths)], minlength=len(index) + RESERVED)
    by_split = {split: samples.filter(pc.equal(samples["split"], split)) for split in SPLITS}
    for split, split_samples in by_split.items():
        refuse_labels(split, split_samples.num_rows, set(pc.unique(split_samples["label"]).to_pylist()))
    train_users = users.filter(pc.is_in(users["user_id"], pc.unique(by_split["train"]["user_id"])))
    vocabularies = Vocabularies(
        items=known_items(index, counts, min_item_count),
        attributes={name: distinct_values([items[name]]) for name in kept_attributes(items.column_names, attributes)},
        profile={name: distinct_values([train_users[name]]) for name in profile if name in users.column_names},
        grades=Grades.of(_floats(pc.list_flatten(samples["history_ratings"].combine_chunks()))),
    )
    features, length = encode_items([items], vocabularies), max(1, int(lengths[train].max(initial=0)))
    splits = {
        split: Split.of(encode_samples(split_samples, users, features, vocabularies, length))
        for split, split_samples in by_split.items()
    }
    return Features(vocabularies.spec(length), vocabularies, features, counts, splits)


def refuse_labels(split: str, rows: int, labels: set[Any]) -> None:
    """Raises SchemaError if a label of a split is outside [0, 1], or if all are on one side of 0.5."""
    if odd := [label for label in labels if label is None or not 0 <= label <= 1]:
        raise SchemaError(
            f"samples: split '{split}' has the label {odd[0]}; a CTR model's labels must be in [0, 1]. Run "
            "`prepare` again, or correct those samples."
        )
    if len({label >= POSITIVE for label in labels}) < 2:
        raise SchemaError(
            f"samples: split '{split}' has {rows} rows and the labels {sorted(labels)}; a CTR model needs both "
            "classes in each split. Use more users, or change source.split or the label rule in the recipe."
        )


def kept_attributes(columns: Iterable[str], attributes: Sequence[str]) -> list[str]:
    """The attributes that an items table has and a model reads, most important first."""
    has = set(columns)
    return [name for name in attributes if name in has][:MAX_ATTRIBUTES]


def known_items(ids: np.ndarray, counts: np.ndarray, min_item_count: int) -> pa.Array:
    """Vocabulary of items: int64, ascending. ids: of the items table, ascending; counts: by row of ItemFeatures."""
    return pa.array(ids[counts[RESERVED:] >= max(1, min_item_count)], pa.int64())


def item_rows(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int32: row in ItemFeatures of each wanted id, of any shape. ids: of the items table, ascending."""
    rows = rows_of(ids, wanted)
    return np.where(rows < 0, UNKNOWN, rows + RESERVED).astype(np.int32)


def encode_items(shards: Iterable[pa.Table], vocabularies: Vocabularies) -> ItemFeatures:
    """Codes of every row of an items table, which may come in shards, in ascending order of id."""
    coded = [_encode_items(shard, vocabularies) for shard in shards]
    ids, codes, attributes = (np.concatenate(arrays) for arrays in zip(*coded, strict=True))
    order = np.argsort(ids, kind="stable")
    reserved = np.zeros((RESERVED, *attributes.shape[1:]), dtype=np.int32)
    reserved[UNKNOWN, :, 0] = UNKNOWN
    return ItemFeatures(
        ids[order],
        np.concatenate([np.array([PADDING, UNKNOWN], dtype=np.int32), codes[order]]),
        np.concatenate([reserved, attributes[order]]),
    )


def _encode_items(items: pa.Table, vocabularies: Vocabularies) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    attributes = np.zeros((len(items), len(vocabularies.attributes), VALUES_PER_ATTRIBUTE), dtype=np.int32)
    for i, (name, values) in enumerate(vocabularies.attributes.items()):
        column = items[name].combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            flat, lengths = pc.list_flatten(column), pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            attributes[:, i] = _first_values(value_codes(flat, values), lengths)
        else:
            attributes[:, i, 0] = value_codes(column, values)
    return items["item_id"].to_numpy().astype(np.int64), value_codes(items["item_id"], vocabularies.items), attributes


def encode_samples(
    samples: pa.Table, users: pa.Table, items: ItemFeatures, vocabularies: Vocabularies, history_length: int
) -> SampleFeatures:
    """Arrays of a samples table (schema.SAMPLES, plus `weight` if samples differ in it); a model reads the last
    `history_length` behaviors of each.
    """
    columns = ("history", "history_ratings", "history_labels")
    history, ratings, outcomes = (samples[column].combine_chunks() for column in columns)
    lengths = pc.list_value_length(history).to_numpy()
    for column in (ratings, outcomes):
        if not np.array_equal(lengths, pc.list_value_length(column).to_numpy()):
            raise SchemaError("samples: a history differs in length from its ratings or labels. Run `prepare` again.")
    histories = Histories(
        starts=(np.cumsum(lengths) - lengths).astype(np.int64),
        lengths=lengths.astype(np.int32),
        items=items.rows(pc.list_flatten(history).to_numpy()),
        ratings=vocabularies.grades.tokens(_floats(pc.list_flatten(ratings)), _floats(pc.list_flatten(outcomes))),
        width=history_length,
    )
    profile = np.zeros((samples.num_rows, len(vocabularies.profile)), dtype=np.int32)
    if vocabularies.profile:
        where = pc.index_in(samples["user_id"], users["user_id"].combine_chunks())
        for i, (name, values) in enumerate(vocabularies.profile.items()):
            profile[:, i] = value_codes(users[name].take(where), values)
    item_ids, labels = samples["item_id"].to_numpy(), samples["label"].to_numpy().astype(np.float32)
    if "split" in samples.column_names:
        labels = binarize_outside_train(labels, pc.equal(samples["split"], "train").to_numpy(zero_copy_only=False))
    times = samples["timestamp"].to_numpy() if "timestamp" in samples.column_names else None
    weights = samples["weight"].to_numpy() if "weight" in samples.column_names else None
    user_ids, rows = samples["user_id"].to_numpy(), items.rows(item_ids)
    return SampleFeatures(user_ids, item_ids, rows, histories, profile, labels, times, weights)


def binarize_outside_train(labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Labels: soft ones for training, 0 or 1 for evaluation: float32 [n]. train: bool [n]."""
    return np.where(train, labels, labels >= POSITIVE).astype(np.float32)


def _floats(column: pa.Array) -> np.ndarray:
    """float64 [n], NaN for null."""
    return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)


def distinct_values(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    """Distinct values of a string or list column in shards, sorted; "" means missing and
    is not a value.
    """
    values = pa.array([], pa.string())
    for column in columns:
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_flatten(column)
        shard_values = pc.unique(column)
        shard_values = shard_values.filter(pc.and_(pc.is_valid(shard_values), pc.not_equal(shard_values, "")))
        values = pc.unique(pa.concat_arrays([values, shard_values.cast(pa.string())]))
    return values.take(pc.sort_indices(values))


def value_codes(column: pa.ChunkedArray | pa.Array, values: pa.Array) -> np.ndarray:
    """int32 [n]: code of each value; UNKNOWN if it is not in `values`, null or empty."""
    where = pc.index_in(column, values)
    return (pc.fill_null(where, UNKNOWN - RESERVED).to_numpy() + RESERVED).astype(np.int32)


def _first_values(flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32 [n, VALUES_PER_ATTRIBUTE]: first values of the lists concatenated in `flat`, then padding."""
    used = np.arange(VALUES_PER_ATTRIBUTE) < lengths[:, None]
    matrix = np.zeros(used.shape, dtype=np.int32)
    matrix[used] = flat[((np.cumsum(lengths) - lengths)[:, None] + np.arange(VALUES_PER_ATTRIBUTE))[used]]
    return matrix
