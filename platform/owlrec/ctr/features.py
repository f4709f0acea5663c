"""The recipe's features, and tables as the dense arrays that CTR models read.

A feature is a column of items, users or interactions: a category, several categories, or a number in buckets or on a
log scale. What a recipe does not name follows from the tables (`fit_fields`). Everything fitted (vocabularies, edges,
scales) comes from training alone; code 0 is padding, 1 any value that training shows too rarely or never.

An item is its id and its features, stored once in `ItemFeatures` and gathered by row number. A user is the last items
with their outcomes, and the features of users and of the interaction. A history is a range of its user's behaviors,
which are also stored once; no sample has a copy of either.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, PositiveInt, model_validator
from typing_extensions import TypedDict

from owlrec.config import Config
from owlrec.errors import SchemaError, did_you_mean
from owlrec.evaluation import auc
from owlrec.ids import EVENTS, EventName, hash_of, rows_of
from owlrec.schema import stable_ids
from owlrec.sources.outcomes import OUTCOME_COLUMNS, POSITIVE, taken

PADDING, UNKNOWN = 0, 1
RESERVED = 2  # the first code of a real value, and the first row of a real item
GRADES = 10  # number of rating levels
PASSED = GRADES + 1  # token of a passed-over item
OUTCOMES = PASSED + 1  # tokens, including 0 for taken without a grade
_FEW = 100  # higher ratings are counts, with levels of their logarithm
SPLITS = ("train", "valid", "test")

Segment = tuple[int, int, int]  # rows of one shard: its number, the first and the end


# ------------------------------------------------------------------------------------------------------------- features
# The recipe's `features:` section, and the fields that it becomes.


MOST_VALUES = 16  # a multi-valued column keeps the first ones
BUCKETS = 50  # of a number by quantiles: on 10^5 rows, 100 train no better, and each bucket has rows enough
# More distinct numbers are a quantity (a price); fewer are categories (a year, an age), which learn more one by one.
_FEW_NUMBERS = 100
# By default a column with as many values as rows (a description, a zip code) is left out: it identifies its row.
_FEW_VALUES = 100
_LEAK_AUC, _LEAK_CLASS, LEAK_ROWS = 0.9999, 30, 1 << 20  # rows: of each label at least, and in all
_NUMBER = r"^[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?$"  # not 007, which is a name
_DIGIT = r"[0-9]"
TIMES = ("hour", "weekday")  # of an interaction's timestamp, UTC
USER_ID = "user_id"

FeatureType = Literal["auto", "categorical", "quantiles", "log"]
Group = Literal["items", "users", "interactions"]
GROUPS: tuple[Group, ...] = ("items", "users", "interactions")
_NOT_FEATURES = {"items": ("item_id", "raw_id", "title"), "users": ("user_id", "raw_id"), "interactions": ()}


class FeatureOptions(Config):
    """How a column is read. auto: a number with many values by quantiles, all else as categories."""

    type: FeatureType = "auto"
    table: str | None = None  # embeddings shared by all features with this name
    hash: PositiveInt | None = None  # categories become so many codes by their hash, without a vocabulary

    @model_validator(mode="after")
    def _of_categories(self) -> "FeatureOptions":
        if self.type in ("quantiles", "log") and (self.table or self.hash):
            raise ValueError(f"table and hash are for categories, but the type is {self.type}")
        return self


Columns = dict[str, FeatureType | FeatureOptions] | tuple[str, ...]


class FeatureSections(TypedDict, total=False):
    """Columns by table; of a table that is not named, all that suit, and no column of the interactions.

    users: may name user_id. interactions: may name hour and weekday, of the timestamp in UTC. sequences: name ->
    events, whose behaviors are read once more, apart from the others.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    items: Columns
    users: Columns
    interactions: Columns
    sequences: dict[str, tuple[EventName, ...]]


def chosen(sections: FeatureSections, group: Group, columns: Iterable[str]) -> tuple[dict[str, FeatureOptions], bool]:
    """Columns of a table to read, and whether the recipe names them. columns: that the table has.

    Raises SchemaError for a column that is not there, and for the outcome of an interaction.
    """
    has = list(columns)
    named = sections.get(group)
    if named is None:
        usual = [name for name in has if name not in _NOT_FEATURES[group]] if group != "interactions" else []
        return {name: FeatureOptions() for name in usual}, False
    options = {name: named[name] if isinstance(named, dict) else FeatureOptions() for name in named}
    for name in options:
        if group == "interactions" and name in (*OUTCOME_COLUMNS, "split"):
            raise SchemaError(
                f"features.interactions: '{name}' is an outcome of the interaction, which is not known when a model "
                "scores it. Remove it; histories have the outcomes of earlier interactions."
            )
        if name not in has and not (group == "interactions" and name in TIMES):
            raise SchemaError(
                f"features.{group}: the {group} table has no column '{name}'; it has {', '.join(has) or 'none'}."
                f"{did_you_mean(name, has)} Correct the name, or add the column to the source."
            )
    return {n: o if isinstance(o, FeatureOptions) else FeatureOptions(type=o) for n, o in options.items()}, True


def carried_columns(sections: FeatureSections) -> tuple[str, ...]:
    """Columns of the source's interactions that `prepare` keeps for features."""
    named: Iterable[str] = sections.get("interactions", ())
    return tuple(name for name in named if name not in TIMES)


class Field(Config):
    """A column as a model reads it. A category or a bucket is a code of a table of embeddings; on a log scale the
    number multiplies a vector.
    """

    column: str
    type: Literal["categorical", "quantiles", "log"]
    table: str = ""
    width: int = 1  # values that are kept of a multi-valued column
    hash: int = 0  # number of codes; 0: by the table's vocabulary
    edges: tuple[float, ...] = ()  # of quantiles: the lower bounds of all buckets but the first
    mean: float = 0.0  # of the logarithms
    std: float = 1.0


class FeatureSchema(Config):
    """All fields besides the item's id."""

    items: tuple[Field, ...] = ()
    users: tuple[Field, ...] = ()
    interactions: tuple[Field, ...] = ()
    sequences: dict[str, tuple[int, ...]] = {}  # name -> codes of events
    events: bool = False  # whether a behavior has its event as a field
    tasks: tuple[str, ...] = ()  # further labels, in the order of SampleFeatures.others

    @property
    def row_fields(self) -> tuple[Field, ...]:
        """Fields of a sample: those of its user, then its own."""
        return self.users + self.interactions


class FeatureSpec(Config):
    """Sizes of all embedding tables, including padding and unknown, and the fields that read them."""

    n_items: int
    tables: dict[str, int]  # name -> rows
    fields: FeatureSchema
    history_length: int


@dataclass(frozen=True)
class ColumnCounts:
    """How often training shows each value of a column."""

    values: pa.Array  # string, distinct, ascending, without "" and NaN
    counts: np.ndarray  # int64 [values]
    rows: int  # rows of the table with a value
    longest: int | None = None  # of a list column: most values in a row


def count_values(columns: Iterable[tuple[pa.ChunkedArray | pa.Array, np.ndarray]]) -> ColumnCounts:
    """Counts over shards of a column. columns: each shard, with how often training shows its rows (int64 [n])."""
    tables, rows, longest = [], 0, None
    for column, shown in columns:
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if _is_list(array.type):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
            longest = max(longest or 0, int(lengths[shown > 0].max(initial=0)))
            array, shown = pc.list_flatten(array), np.repeat(shown, lengths)
        values, codes = _distinct(array)
        there = (codes >= 0) & (shown > 0)
        counts = np.bincount(codes[there], weights=shown[there], minlength=len(values)).astype(np.int64)
        rows += int(there.sum())
        tables.append(pa.table({"value": values, "count": counts}).filter(pa.array(counts > 0)))
    merged = pa.concat_tables(tables).group_by("value").aggregate([("count", "sum")]).sort_by("value")
    values = merged["value"].combine_chunks()
    return ColumnCounts(values, merged["count_sum"].to_numpy().astype(np.int64), rows, longest)


def fit_field(
    group: Group, column: str, options: FeatureOptions, named: bool, counts: ColumnCounts, min_count: int
) -> tuple[Field, pa.Array | None] | None:
    """A field and its vocabulary (None without one); None if the column is left out, since no recipe names it.

    min_count: rarer values are unknown. Raises SchemaError for a number column that holds text.
    """
    numeric = numeric_mask(counts.values)
    kind = options.type
    if kind == "auto":
        quantity = counts.longest is None and len(numeric) > _FEW_NUMBERS and bool(numeric.all())
        kind = "quantiles" if quantity and not (options.table or options.hash) and column != USER_ID else "categorical"
    if kind == "categorical":
        unique = len(counts.values) > max(_FEW_VALUES, counts.rows // 2)
        if not named and (unique or not len(counts.values)):
            return None
        table, width = options.table or f"{group}/{column}", max(1, min(counts.longest or 1, MOST_VALUES))
        field = Field(column=column, type=kind, table=table, width=width, hash=options.hash or 0)
        return field, None if options.hash else counts.values.filter(pa.array(counts.counts >= max(1, min_count)))
    if counts.longest is not None:
        raise SchemaError(f"features.{group}.{column}: it is read by {kind}, but holds lists. Use categorical.")
    if not numeric.all():
        text = ~numeric
        raise SchemaError(
            f"features.{group}.{column}: the type is {kind}, but the column holds text such as "
            f"'{counts.values[int(text.argmax())]}' ({int(counts.counts[text].sum()):,} times in training). Correct "
            "the values, or use categorical."
        )
    numbers = counts.values.cast(pa.float64()).to_numpy()
    if kind == "quantiles":
        order = np.argsort(numbers)
        share = np.cumsum(counts.counts[order]) / max(1, counts.counts.sum())
        at = np.searchsorted(share, np.arange(1, BUCKETS) / BUCKETS, side="right")
        edges = np.unique(numbers[order][np.minimum(at, len(order) - 1)]) if len(order) else np.zeros(0)
        edges = edges[edges > numbers.min(initial=np.inf)]  # the first bucket begins there
        return Field(column=column, type=kind, table=f"{group}/{column}", edges=tuple(edges.tolist())), None
    logs = _log(numbers)
    mean = float(np.average(logs, weights=counts.counts)) if len(logs) else 0.0
    std = float(np.sqrt(np.average((logs - mean) ** 2, weights=counts.counts))) if len(logs) else 1.0
    return Field(column=column, type="log", mean=mean, std=std or 1.0), None


def numeric_mask(values: pa.Array) -> np.ndarray:
    """Texts that are numbers, bool [n]."""
    number = pc.and_(pc.match_substring_regex(values, _NUMBER), pc.match_substring_regex(values, _DIGIT))
    return pc.fill_null(number, False).to_numpy(zero_copy_only=False)


def encode_fields(
    fields: Sequence[Field], column: Callable[[Field], Any], values: Mapping[str, pa.Array], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, int32 [n, coded fields, width], padded with 0, and numbers, float32 [n, log fields], NaN if missing.

    column: the Arrow array of a field, with n rows. values: vocabularies by table.
    """
    coded, scaled = [f for f in fields if f.type != "log"], [f for f in fields if f.type == "log"]
    codes = np.zeros((n, len(coded), max((f.width for f in coded), default=1)), dtype=np.int32)
    numbers = np.full((n, len(scaled)), np.nan, dtype=np.float32)
    for i, field in enumerate(coded):
        array = column(field)
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        if _is_list(array.type):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            flat = field_codes(field, pc.list_flatten(array), values.get(field.table))
            codes[:, i, : field.width] = _first_values(flat, lengths, field.width)
            codes[lengths == 0, i, 0] = UNKNOWN
        else:
            codes[:, i, 0] = field_codes(field, array, values.get(field.table))
    for i, field in enumerate(scaled):
        numbers[:, i] = field_numbers(field, column(field))
    return codes, numbers


def field_codes(field: Field, column: pa.Array, values: pa.Array | None) -> np.ndarray:
    """int32 [n]: code of each value; UNKNOWN if it is missing or new. values: the table's vocabulary, if it has one."""
    distinct, at = _distinct(column)
    if field.type == "quantiles":
        numbers = _as_numbers(distinct)
        bucket = np.searchsorted(np.array(field.edges), numbers, side="right") + RESERVED
        codes = np.where(np.isnan(numbers), UNKNOWN, bucket)
    elif field.hash:
        codes = hash_of(1, stable_ids(distinct)) % field.hash + RESERVED if len(distinct) else np.zeros(0, np.int64)
    else:
        return value_codes(column, pa.array([], pa.string()) if values is None else values)
    return np.append(codes, UNKNOWN).astype(np.int32)[at]


def field_numbers(field: Field, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """float32 [n]: logarithms, standardized as in training; NaN if missing."""
    distinct, at = _distinct(column)
    return np.append((_log(_as_numbers(distinct)) - field.mean) / field.std, np.nan).astype(np.float32)[at]


def times_of(name: str, times: np.ndarray) -> pa.Array:
    """hour or weekday (0 is Monday) of moments (int64 [n], ms), UTC, as text."""
    moments = pa.array(times, pa.timestamp("ms"))
    return (pc.hour(moments) if name == "hour" else pc.day_of_week(moments)).cast(pa.string())


def refuse_leak(column: str, values: Any, labels: np.ndarray) -> None:
    """Raises SchemaError if a column of some training rows tells their labels (float [n]).

    Each row is scored with the mean label of the other rows with its value, so an id that never repeats tells nothing;
    and numbers also by themselves, in both directions. A few rows tell nothing.
    """
    distinct, at = _distinct(values)
    positive = (labels >= POSITIVE).astype(np.float64)
    if not _LEAK_CLASS <= positive.sum() <= len(positive) - _LEAK_CLASS:
        return
    sums, counts = (np.bincount(at + 1, weights=w, minlength=len(distinct) + 1)[at + 1] for w in (positive, None))
    others = np.where(counts > 1, (sums - positive) / np.maximum(counts - 1, 1), positive.mean())
    figures = [auc(positive, others)]
    if numeric_mask(distinct).all() and len(distinct):
        rising = auc(positive, np.append(_as_numbers(distinct), 0.0)[at])
        figures.append(max(rising, 1 - rising))
    if (worst := max(figures)) >= _LEAK_AUC:
        raise SchemaError(
            f"features.interactions: '{column}' alone predicts the label (AUC {worst:.4f} on {len(labels):,} training "
            "rows), so it is a consequence of it. Remove it: it is not known when a model scores."
        )


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _distinct(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Distinct values as text, and each row's place among them, int64 [n]; -1 for a missing one ("", null, NaN)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    array = array.unify_dictionaries().combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    texts = array.dictionary.cast(pa.string())
    missing = pc.fill_null(pc.is_in(texts, value_set=pa.array(["", "nan"])), True).to_numpy(zero_copy_only=False)
    place = np.append(np.where(missing, -1, np.cumsum(~missing) - 1), -1)
    at = pc.fill_null(array.indices, len(texts)).to_numpy(zero_copy_only=False)
    return texts.filter(pa.array(~missing)), place[at]


def _as_numbers(texts: pa.Array) -> np.ndarray:
    """float64 [n], NaN for what is not a number."""
    numeric = numeric_mask(texts)
    numbers = np.full(len(texts), np.nan)
    numbers[numeric] = texts.filter(pa.array(numeric)).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers


def _log(numbers: np.ndarray) -> np.ndarray:
    return np.sign(numbers) * np.log1p(np.abs(numbers))


# --------------------------------------------------------------------------------------------------------------- arrays
# Tables as arrays.


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
    """Fields and known values, sorted: the value at position i has code i + 2."""

    items: pa.Array  # int64: ids that occur in training
    values: dict[str, pa.Array]  # string, by table; without tables of hashes and of buckets
    fields: FeatureSchema
    grades: Grades  # of the ratings in all interactions

    def spec(self, history_length: int) -> FeatureSpec:
        """Sizes for these vocabularies."""
        tables: dict[str, int] = {}
        for field in (*self.fields.items, *self.fields.row_fields):
            if field.type != "log":
                known = len(self.values[field.table]) if field.table in self.values else 0
                size = len(field.edges) + 1 if field.type == "quantiles" else field.hash or known
                tables[field.table] = max(tables.get(field.table, 0), size + RESERVED)
        return FeatureSpec(
            n_items=len(self.items) + RESERVED, tables=tables, fields=self.fields, history_length=history_length
        )


@dataclass(frozen=True)
class ItemFeatures:
    """Codes of all items. Row 0 is padding, row 1 an item missing from the table, row i + 2 the item `ids[i]`."""

    ids: np.ndarray  # int64 [n], ascending
    codes: np.ndarray  # int32 [n + 2]
    attributes: np.ndarray  # int32 [n + 2, coded fields, width], padded with 0
    numbers: np.ndarray  # float32 [n + 2, log fields], NaN if missing

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
    events: np.ndarray | None = None  # uint8 [m]: outcomes.event_codes; None if none are recorded

    def matrices(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Items, ratings and events of some rows: int32 [b, width] each, oldest first, then padding."""
        starts, lengths = self.starts[rows], self.lengths[rows].astype(np.int64)
        kept = np.minimum(lengths, self.width)
        column = np.arange(self.width)
        used = column < kept[:, None]
        at = ((starts + lengths - kept)[:, None] + column)[used]
        items, ratings, events = (np.zeros(used.shape, dtype=np.int32) for _ in range(3))
        items[used], ratings[used] = self.items[at], self.ratings[at]
        if self.events is None:
            return items, ratings, None
        events[used] = self.events[at]
        return items, ratings, events

    def take(self, rows: np.ndarray | slice) -> "Histories":
        """Some rows over the same behaviors."""
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows])


_COLUMNS = ("user_ids", "item_ids", "items", "fields", "numbers", "labels", "others", "times", "weights")


@dataclass(frozen=True)
class SampleFeatures:
    """One row per sample. `items` has row numbers of ItemFeatures."""

    user_ids: np.ndarray  # int64 [n], for lookups of knowledge and grouping
    item_ids: np.ndarray  # int64 [n], for lookups of knowledge
    items: np.ndarray  # int32 [n]
    histories: Histories
    fields: np.ndarray  # int32 [n, coded fields, width], of FeatureSchema.row_fields, padded with 0
    numbers: np.ndarray  # float32 [n, log fields], NaN if missing
    labels: np.ndarray  # float32 [n], in [0, 1] for training, else 0 or 1
    times: np.ndarray | None = None  # int64 [n], ms: limits knowledge to earlier rows; None: now
    weights: np.ndarray | None = None  # float32 [n]: training weights; None: all equal
    others: np.ndarray | None = None  # float32 [n, FeatureSchema.tasks]: further labels, NaN if unknown

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
            copied |= {} if histories.events is None else {"events": histories.events[low:high]}
            for name, array in copied.items():
                columns.setdefault(name, []).append(np.array(array))
            before += high - low
        whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        starts, lengths, items, ratings = (whole.pop(name) for name in ("starts", "lengths", "history", "ratings"))
        histories = Histories(starts, lengths, items, ratings, width, whole.pop("events", None))
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
    features: FeatureSections | None = None,
    min_item_count: int,
    tasks: Sequence[str] = (),
) -> Features:
    """Arrays of all three splits; vocabularies come only from the training split.

    For tables in memory; `dataset` does the same by shard. The history length is that of the longest history in
    training, which the sample builder has already truncated.
    samples: schema.SAMPLES, and columns interactions/<name>, label/<name>, history_events and weight, if there are any.
    min_item_count: an item or another value with fewer occurrences in training (an item as target or in a history)
    shares the code of unknown ones, which is trained this way. tasks: names of further labels.
    Raises SchemaError if a split is empty or has only one class, since a loss or an AUC would be
    meaningless, for a label outside [0, 1], and for features that the tables do not have.
    """
    sections = features or {}
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
    own, labels = context_of(by_split["train"]), by_split["train"]["label"].to_numpy()
    shown: dict[Group, ColumnReader] = {
        "items": ColumnReader.of(items, counts[item_rows(index, items["item_id"].to_numpy())]),
        "users": ColumnReader.of(users, shown_users(users, by_split["train"]["user_id"].to_numpy())),
        "interactions": ColumnReader.of(own, np.ones(len(own), dtype=np.int64)),
    }
    events = "history_events" in samples.column_names
    fields, values = fit_fields(sections, shown, min_item_count, events=events, tasks=tasks)
    for field in fields.interactions:
        refuse_leak(field.column, own[field.column].slice(0, LEAK_ROWS), labels[:LEAK_ROWS])
    vocabularies = Vocabularies(
        items=known_items(index, counts, min_item_count),
        values=values,
        fields=fields,
        grades=Grades.of(_floats(pc.list_flatten(samples["history_ratings"].combine_chunks()))),
    )
    encoded, length = encode_items([items], vocabularies), max(1, int(lengths[train].max(initial=0)))
    splits = {
        split: Split.of(encode_samples(split_samples, users, encoded, vocabularies, length))
        for split, split_samples in by_split.items()
    }
    return Features(vocabularies.spec(length), vocabularies, encoded, counts, splits)


@dataclass(frozen=True)
class ColumnReader:
    """The columns of a table in shards."""

    names: Sequence[str]
    # A column's shards, each with how often training shows its rows (int64 [n]).
    read: Callable[[str], Iterable[tuple[pa.ChunkedArray | pa.Array, np.ndarray]]]

    @classmethod
    def of(cls, table: pa.Table, shown: np.ndarray) -> "ColumnReader":
        """A table in memory."""
        return cls(table.column_names, lambda column: [(table[column], shown)])


def fit_fields(
    sections: FeatureSections,
    tables: Mapping[Group, ColumnReader],
    min_count: int,
    *,
    events: bool,
    tasks: Sequence[str] = (),
) -> tuple[FeatureSchema, dict[str, pa.Array]]:
    """The fields of all tables and the vocabularies of their embeddings.

    events: whether behaviors have them. Raises SchemaError for features that the tables do not have, for a number
    column that holds text, and for a further label as a feature.
    """
    found: dict[str, list[Field]] = {}
    values: dict[str, pa.Array] = {}
    for group in GROUPS:
        options, named = chosen(sections, group, tables[group].names)
        fields = found.setdefault(group, [])
        for column, column_options in options.items():
            if group == "interactions" and column in tasks:
                raise SchemaError(f"features.interactions: '{column}' is a label of ctr.tasks. Remove it from one.")
            counts = count_values(tables[group].read(column))
            fitted = fit_field(group, column, column_options, named, counts, min_count)
            if fitted is None:
                continue
            fields.append(fitted[0])
            if fitted[1] is not None:
                known = values.get(fitted[0].table)
                both = fitted[1] if known is None else pc.unique(pa.concat_arrays([known, fitted[1]]))
                values[fitted[0].table] = both.take(pc.sort_indices(both))
    sequences = {name: tuple(EVENTS.index(e) + 1 for e in some) for name, some in sections.get("sequences", {}).items()}
    if sequences and not events:
        raise SchemaError(
            f"features.sequences: {', '.join(sequences)} are behaviors with some events, but the interactions have no "
            "column event. Map one under source.columns.interactions, or remove the sequences."
        )
    _refuse_mixed_tables([field for fields in found.values() for field in fields])
    schema = FeatureSchema(
        **{group: tuple(fields) for group, fields in found.items()},
        sequences=sequences,
        events=events,
        tasks=tuple(tasks),
    )
    return schema, values


def _refuse_mixed_tables(fields: Sequence[Field]) -> None:
    by_table: dict[str, Field] = {}
    for field in fields:
        first = by_table.setdefault(field.table, field)
        if field.type != "log" and (first.hash, first.type) != (field.hash, field.type):
            raise SchemaError(
                f"features: '{first.column}' and '{field.column}' share the table '{field.table}', but one has "
                f"hash {first.hash or 'none'} and the other {field.hash or 'none'}. Give both the same options."
            )


def shown_users(users: pa.Table, user_ids: np.ndarray) -> np.ndarray:
    """How often training samples (of user_ids, int64) show each row of a users table: int64 [n]."""
    ids = users["user_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    rows = rows_of(ids[order], user_ids)
    return np.bincount(order[rows[rows >= 0]], minlength=len(ids)).astype(np.int64)


def context_of(samples: pa.Table) -> pa.Table:
    """Features of the samples' own interactions: the columns interactions/<name>, hour and weekday."""
    prefix = "interactions/"
    columns = {n.removeprefix(prefix): samples[n] for n in samples.column_names if n.startswith(prefix)}
    times = samples["timestamp"].to_numpy()
    return pa.table({**columns, **{name: times_of(name, times) for name in TIMES}})


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
    ids, codes, attributes, numbers = (np.concatenate(arrays) for arrays in zip(*coded, strict=True))
    order = np.argsort(ids, kind="stable")
    reserved = np.zeros((RESERVED, *attributes.shape[1:]), dtype=np.int32)
    reserved[UNKNOWN, :, 0] = UNKNOWN
    return ItemFeatures(
        ids[order],
        np.concatenate([np.array([PADDING, UNKNOWN], dtype=np.int32), codes[order]]),
        np.concatenate([reserved, attributes[order]]),
        np.concatenate([np.full((RESERVED, numbers.shape[1]), np.nan, dtype=np.float32), numbers[order]]),
    )


def _encode_items(items: pa.Table, vocabularies: Vocabularies) -> tuple[np.ndarray, ...]:
    fields, values = vocabularies.fields.items, vocabularies.values
    attributes, numbers = encode_fields(fields, lambda field: items[field.column], values, len(items))
    ids = items["item_id"].to_numpy().astype(np.int64)
    return ids, value_codes(items["item_id"], vocabularies.items), attributes, numbers


def encode_samples(
    samples: pa.Table, users: pa.Table, items: ItemFeatures, vocabularies: Vocabularies, history_length: int
) -> SampleFeatures:
    """Arrays of a samples table (see build_features); a model reads the last `history_length` behaviors of each."""
    columns = ("history", "history_ratings", "history_labels")
    history, ratings, outcomes = (samples[column].combine_chunks() for column in columns)
    lengths = pc.list_value_length(history).to_numpy()
    for column in (ratings, outcomes):
        if not np.array_equal(lengths, pc.list_value_length(column).to_numpy()):
            raise SchemaError("samples: a history differs in length from its ratings or labels. Run `prepare` again.")
    events = None
    if vocabularies.fields.events:
        events = pc.list_flatten(samples["history_events"].combine_chunks()).to_numpy().astype(np.uint8)
    histories = Histories(
        starts=(np.cumsum(lengths) - lengths).astype(np.int64),
        lengths=lengths.astype(np.int32),
        items=items.rows(pc.list_flatten(history).to_numpy()),
        ratings=vocabularies.grades.tokens(_floats(pc.list_flatten(ratings)), _floats(pc.list_flatten(outcomes))),
        width=history_length,
        events=events,
    )
    where = pc.index_in(samples["user_id"], users["user_id"].combine_chunks())
    own = context_of(samples) if vocabularies.fields.interactions else None
    of_users = {id(field) for field in vocabularies.fields.users}

    def column_of(field: Field) -> Any:
        if id(field) not in of_users:
            assert own is not None
            return own[field.column]
        # An unknown user has no row, but an id.
        return samples["user_id"] if field.column == USER_ID else users[field.column].take(where)

    row_fields = vocabularies.fields.row_fields
    fields, numbers = encode_fields(row_fields, column_of, vocabularies.values, len(samples))
    item_ids, labels = samples["item_id"].to_numpy(), samples["label"].to_numpy().astype(np.float32)
    others = other_labels(samples, vocabularies.fields.tasks)
    if "split" in samples.column_names:
        train = pc.equal(samples["split"], "train").to_numpy(zero_copy_only=False)
        labels = binarize_outside_train(labels, train)
        others = None if others is None else binarize_outside_train(others, train[:, None])
    times = samples["timestamp"].to_numpy() if "timestamp" in samples.column_names else None
    weights = samples["weight"].to_numpy() if "weight" in samples.column_names else None
    user_ids, rows = samples["user_id"].to_numpy(), items.rows(item_ids)
    return SampleFeatures(user_ids, item_ids, rows, histories, fields, numbers, labels, times, weights, others)


def other_labels(samples: pa.Table, tasks: Sequence[str]) -> np.ndarray | None:
    """Further labels of a samples table, float32 [n, tasks], NaN if unknown; None without tasks."""
    if not tasks:
        return None
    return np.stack([_floats(samples[f"label/{name}"].combine_chunks()) for name in tasks], axis=1).astype(np.float32)


def binarize_outside_train(labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Labels: soft ones for training, 0 or 1 for evaluation, NaN stays: float32 of their shape. train: bool."""
    hard = np.where(np.isnan(labels), np.nan, labels >= POSITIVE)
    return np.where(train, labels, hard).astype(np.float32)


def _floats(column: pa.Array) -> np.ndarray:
    """float64 [n], NaN for null."""
    return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)


def value_codes(column: pa.ChunkedArray | pa.Array, values: pa.Array) -> np.ndarray:
    """int32 [n]: code of each value; UNKNOWN if it is not in `values`, null or empty."""
    if pa.types.is_string(values.type) and not pa.types.is_string(column.type):
        distinct, at = _distinct(column)
        return np.append(value_codes(distinct, values), UNKNOWN).astype(np.int32)[at]
    where = pc.index_in(column, values)
    return (pc.fill_null(where, UNKNOWN - RESERVED).to_numpy(zero_copy_only=False) + RESERVED).astype(np.int32)


def _first_values(flat: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """int32 [n, width]: first values of the lists concatenated in `flat`, then padding."""
    used = np.arange(width) < lengths[:, None]
    matrix = np.zeros(used.shape, dtype=np.int32)
    matrix[used] = flat[((np.cumsum(lengths) - lengths)[:, None] + np.arange(width))[used]]
    return matrix
