"""Tables to the dense integer arrays that the CTR models read.

A user is what they did: the last items with their ratings, and, where asked for, profile fields. There is no user id
(the split is by user, so a test user's id is always unseen; KAR leaves it out too). An item is its id and up to two
attributes; its codes stand once in `ItemFeatures` and are gathered by row number, never copied into each sample. Code
0 is padding, 1 stands for any value unseen in training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ordered import rows_of

PADDING, UNKNOWN = 0, 1
RESERVED = 2  # the first code of a real value, and the first row of a real item
MAX_ATTRIBUTES = 2
VALUES_PER_ATTRIBUTE = 4  # an item keeps the first four values of a multi-valued attribute
RATING_BUCKETS = 10
SPLITS = ("train", "valid", "test")


class FeatureSpec(Config):
    """The sizes of all embedding tables, padding and unknown included, and the names of what they embed."""

    n_items: int
    attributes: dict[str, int]  # name -> size, in the order of ItemFeatures.attributes
    profile: dict[str, int]  # name -> size, in the order of SampleFeatures.profile
    history_length: int


@dataclass(frozen=True)
class Vocabularies:
    """The known values, sorted: the value at position i has code i + 2."""

    items: pa.Array  # int64: ids that occur in training
    attributes: dict[str, pa.Array]  # string
    profile: dict[str, pa.Array]  # string

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
        rows = rows_of(self.ids, ids)
        return np.where(rows < 0, UNKNOWN, rows + RESERVED).astype(np.int32)


@dataclass(frozen=True)
class SampleFeatures:
    """One row a sample. `items` and `history` hold row numbers of ItemFeatures."""

    user_ids: np.ndarray  # int64 [n], to look knowledge up and to group by
    item_ids: np.ndarray  # int64 [n], to look knowledge up
    items: np.ndarray  # int32 [n]
    history: np.ndarray  # int32 [n, history_length], oldest first, then padding
    ratings: np.ndarray  # int32 [n, history_length]: 1 to 10, 0 for padding and for behaviours without a rating
    profile: np.ndarray  # int32 [n, n_profile]
    labels: np.ndarray  # float32 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Features:
    """All that training needs of the tables."""

    spec: FeatureSpec
    vocabularies: Vocabularies
    items: ItemFeatures
    splits: dict[str, SampleFeatures]  # train, valid, test


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

    The history length is that of the longest history in training, which the sample builder has cut already.
    attributes, profile: column names, most important first; those that a table lacks are skipped, two attributes are
    kept.
    min_item_count: an item that training shows less often (as target or in a history) shares the code of unknown
    items, which is thereby trained.
    Raises SchemaError where a split is empty or holds one class only, since neither a loss nor an AUC would mean
    anything, and for a label that is neither 0 nor 1.
    """
    found = survey([samples])
    vocabularies = found.vocabularies(users, items, attributes, profile, min_item_count)
    item_features, length = encode_items(items, vocabularies), found.history_length
    splits = {
        split: encode_samples(of_split(samples, split), users, item_features, vocabularies, length) for split in SPLITS
    }
    return Features(vocabularies.spec(length), vocabularies, item_features, splits)


@dataclass(frozen=True)
class Survey:
    """What a first pass over the samples finds: all that the vocabularies and the arrays' sizes follow from."""

    rows: dict[str, int]  # of each split
    item_ids: np.ndarray  # int64: of the training split, as target or in a history, ascending
    item_counts: np.ndarray  # int64
    train_users: pa.Array  # int64
    history_length: int

    def vocabularies(
        self, users: pa.Table, items: pa.Table, attributes: Sequence[str], profile: Sequence[str], min_item_count: int
    ) -> Vocabularies:
        """Arguments: see `build_features`."""
        train_users = users.filter(pc.is_in(users["user_id"], self.train_users))
        kept = [name for name in attributes if name in items.column_names][:MAX_ATTRIBUTES]
        return Vocabularies(
            items=pa.array(self.item_ids[self.item_counts >= min_item_count], pa.int64()),
            attributes={name: _values(items[name]) for name in kept},
            profile={name: _values(train_users[name]) for name in profile if name in users.column_names},
        )


def survey(parts: Iterable[pa.Table]) -> Survey:
    """One pass over a samples table that comes in parts. Raises SchemaError as `build_features` does."""
    rows, labels = dict.fromkeys(SPLITS, 0), {split: set[float]() for split in SPLITS}
    counted: list[tuple[np.ndarray, np.ndarray]] = []
    train_users: list[pa.Array] = []
    length = 1
    for part in parts:
        for split in SPLITS:
            of_part = of_split(part, split)
            rows[split] += of_part.num_rows
            labels[split].update(pc.unique(of_part["label"]).to_pylist())
        train = of_split(part, "train")
        train_users.append(pc.unique(train["user_id"]))
        length = max(length, pc.max(pc.list_value_length(train["history"])).as_py() or 0)
        seen = [train["item_id"].to_numpy(), pc.list_flatten(train["history"]).to_numpy()]
        counted.append(np.unique(np.concatenate(seen), return_counts=True))
    for split in SPLITS:
        _refuse_labels(split, rows[split], labels[split])
    ids, where = np.unique(np.concatenate([ids for ids, _ in counted]), return_inverse=True)
    counts = np.bincount(where, weights=np.concatenate([n for _, n in counted]))
    return Survey(rows, ids, counts.astype(np.int64), pc.unique(pa.concat_arrays(train_users)), length)


def _refuse_labels(split: str, rows: int, labels: set[float]) -> None:
    if odd := [label for label in labels if label not in (0, 1)]:
        raise SchemaError(
            f"samples: split '{split}' has the label {odd[0]}; a CTR model's labels are 0 and 1. Run `prepare` again, "
            f"or mend the rows of samples whose label is neither."
        )
    if len(labels) < 2:
        raise SchemaError(
            f"samples: split '{split}' has {rows} rows and the labels {sorted(labels)}; a CTR model needs both classes "
            f"in each split. Give it more users, or change source.split or the label rule in the recipe."
        )


def of_split(samples: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return samples.filter(pc.equal(samples["split"], split))


def encode_items(items: pa.Table, vocabularies: Vocabularies) -> ItemFeatures:
    """The codes of every row of an items table, in ascending order of id."""
    items = items.sort_by("item_id")
    n = items.num_rows
    codes = np.full(n + RESERVED, UNKNOWN, dtype=np.int32)
    codes[RESERVED:] = _codes(items["item_id"], vocabularies.items)
    attributes = np.zeros((n + RESERVED, len(vocabularies.attributes), VALUES_PER_ATTRIBUTE), dtype=np.int32)
    attributes[UNKNOWN, :, 0] = UNKNOWN
    for i, (name, values) in enumerate(vocabularies.attributes.items()):
        column = items[name].combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            flat, lengths = pc.list_flatten(column), pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            attributes[RESERVED:, i] = _padded(_codes(flat, values), lengths, VALUES_PER_ATTRIBUTE, keep="first")
        else:
            attributes[RESERVED:, i, 0] = _codes(column, values)
    codes[PADDING] = PADDING
    return ItemFeatures(items["item_id"].to_numpy().astype(np.int64), codes, attributes)


def encode_samples(
    samples: pa.Table, users: pa.Table, items: ItemFeatures, vocabularies: Vocabularies, history_length: int
) -> SampleFeatures:
    """The arrays of a samples table (schema.SAMPLES): histories are cut to their last `history_length` behaviours."""
    history, ratings = samples["history"].combine_chunks(), samples["history_ratings"].combine_chunks()
    lengths = pc.list_value_length(history).to_numpy()
    if not np.array_equal(lengths, pc.list_value_length(ratings).to_numpy()):
        raise SchemaError("samples: history and history_ratings differ in length. Run `prepare` again.")
    buckets = pc.fill_null(pc.list_flatten(ratings), np.nan).to_numpy()
    buckets = np.where(np.isnan(buckets), PADDING, np.clip(np.rint(buckets), 1, RATING_BUCKETS)).astype(np.int32)
    where = pc.index_in(samples["user_id"], users["user_id"].combine_chunks())
    profile = [_codes(users[name].take(where), values) for name, values in vocabularies.profile.items()]
    item_ids = samples["item_id"].to_numpy()
    n = samples.num_rows
    return SampleFeatures(
        user_ids=samples["user_id"].to_numpy(),
        item_ids=item_ids,
        items=items.rows(item_ids),
        history=_padded(items.rows(pc.list_flatten(history).to_numpy()), lengths, history_length, keep="last"),
        ratings=_padded(buckets, lengths, history_length, keep="last"),
        profile=np.stack(profile, axis=1) if profile else np.zeros((n, 0), dtype=np.int32),
        labels=samples["label"].to_numpy().astype(np.float32),
    )


def _values(column: pa.ChunkedArray) -> pa.Array:
    """The distinct values of a string or list column, sorted; "" means that nothing is known and is no value."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    values = pc.unique(column)
    values = values.filter(pc.and_(pc.is_valid(values), pc.not_equal(values, "")))
    return values.take(pc.sort_indices(values))


def _codes(column: pa.ChunkedArray | pa.Array, values: pa.Array) -> np.ndarray:
    """int32 [n]: the code of each value, UNKNOWN where it is none of `values`, null or empty."""
    where = pc.index_in(column, values)
    return (pc.fill_null(where, UNKNOWN - RESERVED).to_numpy() + RESERVED).astype(np.int32)


def _padded(flat: np.ndarray, lengths: np.ndarray, width: int, *, keep: str) -> np.ndarray:
    """Lists of any length, concatenated in `flat`, as a matrix [n, width]: cut to the first or last `width`, 0 after
    the end.
    """
    starts = np.cumsum(lengths) - lengths
    kept = np.minimum(lengths, width)
    if keep == "last":
        starts = starts + lengths - kept
    column = np.arange(width)
    used = column < kept[:, None]
    matrix = np.zeros((len(lengths), width), dtype=np.int32)
    matrix[used] = flat[(starts[:, None] + column)[used]]
    return matrix
