"""Tables to the dense integer arrays that the CTR models read.

A user is what they did: the last items with their ratings, and, where asked for, profile fields. There is no user id
(the split is by user, so a test user's id is always unseen; KAR leaves it out too). An item is its id and up to two
attributes; its codes are stored once in `ItemFeatures` and gathered by row number. A history is a range of its user's
behaviors, which are stored once as well; no sample holds a copy of either. Code 0 is padding, 1 stands for any value
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
from owlrec.schema import rows_of
from owlrec.sources.outcomes import POSITIVE, taken

PADDING, UNKNOWN = 0, 1
RESERVED = 2  # the first code of a real value, and the first row of a real item
MAX_ATTRIBUTES = 2
VALUES_PER_ATTRIBUTE = 4  # an item keeps the first four values of a multi-valued attribute
GRADES = 10  # levels that ratings are told apart by
PASSED = GRADES + 1  # the token of what was passed over
OUTCOMES = PASSED + 1  # tokens, with 0 for what was taken without a grade
_FEW = 100  # up to so high a rating is a grade; what goes beyond is a count, whose levels are those of its logarithm
SPLITS = ("train", "valid", "test")

Segment = tuple[int, int, int]  # rows of one shard: its number, the first and the end


class FeatureSpec(Config):
    """The sizes of all embedding tables, padding and unknown included, and the names of what they embed."""

    n_items: int
    attributes: dict[str, int]  # name -> size, in the order of ItemFeatures.attributes
    profile: dict[str, int]  # name -> size, in the order of SampleFeatures.profile
    history_length: int


class Grades(NamedTuple):
    """The lowest and the highest rating of a data set: what its ratings are told apart by."""

    low: float
    high: float

    @classmethod
    def of(cls, ratings: np.ndarray) -> "Grades":
        """Those of ratings, NaN where there is none."""
        graded = ratings[~np.isnan(ratings)]
        return cls(float(graded.min()), float(graded.max())) if len(graded) else cls(0.0, 0.0)

    def tokens(self, ratings: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What a model reads of each behavior's outcome: uint8 [n].

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


@dataclass(frozen=True)
class Vocabularies:
    """The known values, sorted: the value at position i has code i + 2."""

    items: pa.Array  # int64: ids that occur in training
    attributes: dict[str, pa.Array]  # string
    profile: dict[str, pa.Array]  # string
    grades: Grades  # of the ratings in all interactions

    def spec(self, history_length: int) -> FeatureSpec:
        """The sizes that follow from these vocabularies."""
        return FeatureSpec(
            n_items=len(self.items) + RESERVED,
            attributes={name: len(values) + RESERVED for name, values in self.attributes.items()},
            profile={name: len(values) + RESERVED for name, values in self.profile.items()},
            history_length=history_length,
        )


@dataclass(frozen=True)
class ItemFeatures:
    """Codes of all items. Row 0 is padding, row 1 an item that the table lacks, row i + 2 the item `ids[i]`."""

    ids: np.ndarray  # int64 [n], ascending
    codes: np.ndarray  # int32 [n + 2]
    attributes: np.ndarray  # int32 [n + 2, n_attributes, VALUES_PER_ATTRIBUTE], padded with 0

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int32: the row of each id, of any shape; 1 where the item table lacks it."""
        return item_rows(self.ids, ids)


@dataclass(frozen=True)
class Histories:
    """Ranges of behaviors: row i has those from `starts[i]` on, `lengths[i]` of them, oldest first."""

    starts: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int32 [n]
    items: np.ndarray  # int32 [m], row numbers of ItemFeatures
    ratings: np.ndarray  # uint8 [m]: see Grades.tokens
    width: int  # a model reads at most so many, the latest

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
        """Some rows, over the same behaviors."""
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows])


_COLUMNS = ("user_ids", "item_ids", "items", "profile", "labels", "times", "weights")


@dataclass(frozen=True)
class SampleFeatures:
    """One row for each sample. `items` holds row numbers of ItemFeatures."""

    user_ids: np.ndarray  # int64 [n], to look knowledge up and to group by
    item_ids: np.ndarray  # int64 [n], to look knowledge up
    items: np.ndarray  # int32 [n]
    histories: Histories
    profile: np.ndarray  # int32 [n, n_profile]
    labels: np.ndarray  # float32 [n], in [0, 1] where samples are trained on, else 0 or 1
    times: np.ndarray | None = None  # int64 [n], ms: they read only knowledge that is earlier; None: of this moment
    weights: np.ndarray | None = None  # float32 [n]: how much each counts in training; None: all the same

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
        """int [n]: how many behaviors a model reads."""
        return np.minimum(self.histories.lengths, self.histories.width)

    def take(self, rows: np.ndarray | slice) -> "SampleFeatures":
        """Some rows, over the same behaviors."""
        columns = {name: array[rows] for name in _COLUMNS if (array := getattr(self, name)) is not None}
        return SampleFeatures(histories=self.histories.take(rows), **columns)

    @staticmethod
    def concatenated(parts: Iterable["SampleFeatures"]) -> "SampleFeatures":
        """The rows of all parts (at least one), in their order, copied: a part's file is closed before the next one is
        opened. Behaviors at a part's ends that no row refers to are left out.
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
    """The samples of a split, in shards: a row's number counts through all of them."""

    shards: Sequence[SampleFeatures]  # mapped from disk as they are read, or all in memory
    sizes: tuple[int, ...]  # rows of each

    @classmethod
    def of(cls, samples: SampleFeatures) -> "Split":
        """One shard, in memory."""
        return cls((samples,), (len(samples),))

    def __len__(self) -> int:
        return sum(self.sizes)

    def window(self, segments: Iterable[Segment]) -> SampleFeatures:
        """The rows of some segments, in their order: of one as they lie, of several copied into memory."""
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
    """All that training needs of the tables."""

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
    """The arrays of all three splits, with vocabularies from the training split and the item table only.

    For tables in memory; `encoded` does the same by shard. The history length is that of the longest history in
    training, which the sample builder has cut already.
    attributes, profile: column names, most important first; those that a table lacks are skipped, two attributes are
    kept.
    min_item_count: an item that training shows less often (as target or in a history) shares the code of unknown
    items, which is thereby trained.
    Raises SchemaError where a split is empty or holds one class only, since neither a loss nor an AUC would mean
    anything, and for a label outside [0, 1].
    """
    index = np.sort(items["item_id"].to_numpy())
    history = samples["history"].combine_chunks()
    rows = item_rows(index, samples["item_id"].to_numpy())
    of_history = item_rows(index, pc.list_flatten(history).to_numpy())
    train = pc.equal(samples["split"], "train").to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(history).to_numpy()
    counts = np.bincount(rows[train], minlength=len(index) + RESERVED)
    counts += np.bincount(of_history[np.repeat(train, lengths)], minlength=len(index) + RESERVED)
    by_split = {split: samples.filter(pc.equal(samples["split"], split)) for split in SPLITS}
    for split, of_split in by_split.items():
        refuse_labels(split, of_split.num_rows, set(pc.unique(of_split["label"]).to_pylist()))
    train_users = users.filter(pc.is_in(users["user_id"], pc.unique(by_split["train"]["user_id"])))
    vocabularies = Vocabularies(
        items=known_items(index, counts, min_item_count),
        attributes={name: distinct_values([items[name]]) for name in kept_attributes(items.column_names, attributes)},
        profile={name: distinct_values([train_users[name]]) for name in profile if name in users.column_names},
        grades=Grades.of(_floats(pc.list_flatten(samples["history_ratings"].combine_chunks()))),
    )
    features, length = encode_items([items], vocabularies), max(1, int(lengths[train].max(initial=0)))
    splits = {
        split: Split.of(encode_samples(of_split, users, features, vocabularies, length))
        for split, of_split in by_split.items()
    }
    return Features(vocabularies.spec(length), vocabularies, features, counts, splits)


def refuse_labels(split: str, rows: int, labels: set[Any]) -> None:
    """Raises SchemaError where a label that occurs in a split lies outside [0, 1], or all lie on one side of a half."""
    if odd := [label for label in labels if label is None or not 0 <= label <= 1]:
        raise SchemaError(
            f"samples: split '{split}' has the label {odd[0]}; a CTR model's labels lie in [0, 1]. Run `prepare` "
            "again, or correct the rows of samples."
        )
    if len({label >= POSITIVE for label in labels}) < 2:
        raise SchemaError(
            f"samples: split '{split}' has {rows} rows and the labels {sorted(labels)}; a CTR model needs both classes "
            f"in each split. Give it more users, or change source.split or the label rule in the recipe."
        )


def kept_attributes(columns: Iterable[str], attributes: Sequence[str]) -> list[str]:
    """Those of the attributes that an items table with these columns has and a model reads, most important first."""
    has = set(columns)
    return [name for name in attributes if name in has][:MAX_ATTRIBUTES]


def known_items(ids: np.ndarray, counts: np.ndarray, min_item_count: int) -> pa.Array:
    """The items vocabulary: int64, ascending. ids: of the items table, ascending; counts: by row of ItemFeatures."""
    return pa.array(ids[counts[RESERVED:] >= max(1, min_item_count)], pa.int64())


def item_rows(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int32: the row in ItemFeatures of each wanted id, of any shape. ids: of the items table, ascending."""
    rows = rows_of(ids, wanted)
    return np.where(rows < 0, UNKNOWN, rows + RESERVED).astype(np.int32)


def encode_items(shards: Iterable[pa.Table], vocabularies: Vocabularies) -> ItemFeatures:
    """The codes of every row of an items table, which may come in shards, in ascending order of id."""
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
    """The arrays of a samples table (schema.SAMPLES, and `weight` where samples differ in it); a model reads the last
    `history_length` behaviors of each.
    """
    columns = ("history", "history_ratings", "history_labels")
    history, ratings, told = (samples[column].combine_chunks() for column in columns)
    lengths = pc.list_value_length(history).to_numpy()
    for column in (ratings, told):
        if not np.array_equal(lengths, pc.list_value_length(column).to_numpy()):
            raise SchemaError("samples: a history, its ratings and its labels differ in length. Run `prepare` again.")
    histories = Histories(
        starts=(np.cumsum(lengths) - lengths).astype(np.int64),
        lengths=lengths.astype(np.int32),
        items=items.rows(pc.list_flatten(history).to_numpy()),
        ratings=vocabularies.grades.tokens(_floats(pc.list_flatten(ratings)), _floats(pc.list_flatten(told))),
        width=history_length,
    )
    profile = np.zeros((samples.num_rows, len(vocabularies.profile)), dtype=np.int32)
    if vocabularies.profile:
        where = pc.index_in(samples["user_id"], users["user_id"].combine_chunks())
        for i, (name, values) in enumerate(vocabularies.profile.items()):
            profile[:, i] = value_codes(users[name].take(where), values)
    item_ids, labels = samples["item_id"].to_numpy(), samples["label"].to_numpy().astype(np.float32)
    if "split" in samples.column_names:
        labels = judged_labels(labels, pc.equal(samples["split"], "train").to_numpy(zero_copy_only=False))
    times = samples["timestamp"].to_numpy() if "timestamp" in samples.column_names else None
    weights = samples["weight"].to_numpy() if "weight" in samples.column_names else None
    user_ids, rows = samples["user_id"].to_numpy(), items.rows(item_ids)
    return SampleFeatures(user_ids, item_ids, rows, histories, profile, labels, times, weights)


def judged_labels(labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Soft labels to learn from, 0 or 1 to judge by: float32 [n]. train: bool [n]."""
    return np.where(train, labels, labels >= POSITIVE).astype(np.float32)


def _floats(column: pa.Array) -> np.ndarray:
    """float64 [n], NaN for null."""
    return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)


def distinct_values(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    """The distinct values of a string or list column that comes in shards, sorted; "" means that nothing is known and
    is not a value.
    """
    values = pa.array([], pa.string())
    for column in columns:
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_flatten(column)
        of_shard = pc.unique(column)
        of_shard = of_shard.filter(pc.and_(pc.is_valid(of_shard), pc.not_equal(of_shard, "")))
        values = pc.unique(pa.concat_arrays([values, of_shard.cast(pa.string())]))
    return values.take(pc.sort_indices(values))


def value_codes(column: pa.ChunkedArray | pa.Array, values: pa.Array) -> np.ndarray:
    """int32 [n]: the code of each value, UNKNOWN where it is none of `values`, null or empty."""
    where = pc.index_in(column, values)
    return (pc.fill_null(where, UNKNOWN - RESERVED).to_numpy() + RESERVED).astype(np.int32)


def _first_values(flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32 [n, VALUES_PER_ATTRIBUTE]: the first values of lists that are concatenated in `flat`, then padding."""
    used = np.arange(VALUES_PER_ATTRIBUTE) < lengths[:, None]
    matrix = np.zeros(used.shape, dtype=np.int32)
    matrix[used] = flat[((np.cumsum(lengths) - lengths)[:, None] + np.arange(VALUES_PER_ATTRIBUTE))[used]]
    return matrix
