"""What training reads, made once on disk for all workers: encoded samples and reduced knowledge vectors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from pydantic import BaseModel
from torch import Tensor

from owlrec.ctr.artifact import read_card
from owlrec.ctr.experiment import ENCODED, SoftLabels, Trial, blended, grid_folder
from owlrec.ctr.features import (
    RESERVED,
    SPLITS,
    UNKNOWN,
    Features,
    Grades,
    Histories,
    SampleFeatures,
    Split,
    Vocabularies,
    binarize_outside_train,
    distinct_values,
    encode_items,
    item_rows,
    kept_attributes,
    known_items,
    refuse_labels,
    value_codes,
)
from owlrec.ctr.knowledge_tables import (
    STREAMING,
    KnowledgeTable,
    VectorTable,
    open_vectors,
    refuse_non_finite,
    refuse_two_sizes,
)
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.trainer import read_items, read_vocabularies, write_items, write_vocabularies
from owlrec.encoding.compression import Projection, fit_variance
from owlrec.encoding.vectors import VectorShards, quantizer_folder
from owlrec.errors import RecipeError, SchemaError
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import SAMPLE_ROWS
from owlrec.shards import Card, Shard
from owlrec.sources.outcomes import POSITIVE
from owlrec.sources.splits import in_histories, sample_places
from owlrec.workspace import Workspace, shard_file, table_file

# ------------------------------------------------------------------------------------------------------------------ pca
# Reduces knowledge vectors to the first principal components that keep a stated share of their variance.
#
# The vectors of 10^8 users take 77 GB with MiniLM's 384 components. One projection serves all sources and both sides,
# since the shared experts read users and items. It is centered: vectors of texts share a large common direction, which
# makes all cosines alike until it is removed. It is fitted on a bounded sample, stored with the grid, and applied by
# shard. Vectors of other sizes (imported ones) have a projection of their own.


Folders = Mapping[str, Mapping[str, str]]  # source -> kind -> folder with the vectors <source>-<kind>

_FIT_ROWS = 16_384  # per table: with 384 components the SVD then takes seconds
_DONE = "done.json"  # written last


class ReduceVectors(Stage):
    """Projects a shard of vectors; ids, codes and digests stay unchanged."""

    name = "train_ctr"

    def __init__(self, folder: str, fingerprint: str, sources: Mapping[str, str]) -> None:
        """fingerprint: of the projection in `folder`. sources: <source>-<kind> -> its folder."""
        self.folder, self.fingerprint, self.sources = folder, fingerprint, dict(sources)

    def open(self, workspace: Workspace, worker: str) -> None:
        """Loads the projection."""
        self._projection = Projection.load(workspace, self.folder, self.fingerprint)
        self._shards = {name: VectorShards(workspace, folder, name) for name, folder in self.sources.items()}

    def run(self, work: Work) -> Result:
        """Raises SchemaError for a vector that is not finite."""
        shard = self._shards[work.shard.kind].shard(work.shard.number)
        assert shard is not None, f"{work.shard.name} was listed but no longer exists"
        refuse_non_finite(shard.vectors, shard.ids)
        projection = self._projection.of(center_name(work.shard.kind))
        table = replace(shard, vectors=projection.apply(shard.vectors).astype(np.float16)).table()
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


def center_name(table: str) -> str:
    """Name of a table's center in a projection: partitions and a user's first text fill the same slots."""
    return table.replace(STREAMING, "knowledge")


def reduce_once(
    workspace: Workspace,
    folders: Folders,
    variance: float | None,
    fingerprint: str,
    pool: Pool | None = None,
    projection: Projection | None = None,
) -> Folders:
    """Folders that a grid's trials read instead of `folders` (`reduced_folders`), written if missing: vectors of
    length 1 with the components that keep `variance`, and the projection. With None, returns `folders`. Vectors of
    another size have another folder and projection. projection: applied to vectors of its size instead of fitting one.

    Raises SchemaError for a vector that is not finite.
    """
    kept = _kept(fingerprint)
    if variance is None or not folders or workspace.exists(kept, _DONE):
        return reduced_folders(workspace, folders, fingerprint)
    by_size: dict[int, dict[str, VectorShards]] = {}
    for source, kinds in folders.items():
        for kind, folder in kinds.items():
            shards = VectorShards(workspace, folder, f"{source}-{kind}")
            by_size.setdefault(shards.dim, {})[shards.name] = shards
    read: dict[str, dict[str, str]] = {}
    for size, tables in by_size.items():
        place = f"{kept}/{size}"
        fitted = projection if projection is not None and len(projection.center) == size else None
        fitted = fitted or _fit({name: s.sample(_FIT_ROWS, seed=0)[1] for name, s in tables.items()}, variance)
        fitted.save(workspace, place, fingerprint)
        stage = ReduceVectors(place, fingerprint, {name: shards.folder for name, shards in tables.items()})
        inputs = {Shard(name, number): fingerprint for name, shards in tables.items() for number in shards.numbers}
        run_stage(workspace, stage, inputs, pool)
        for name, shards in tables.items():
            if quantizer := shards.quantizer():
                quantizer.save(workspace, quantizer_folder(place, name))
            source, _, kind = name.rpartition("-")
            read.setdefault(source, {})[kind] = place
    workspace.write_json(f"{kept}/{_DONE}", {"variance": variance, "folders": read})
    return read


def reduced_folders(workspace: Workspace, folders: Folders, fingerprint: str) -> Folders:
    """Folders of the vectors that a grid's trials read: the grid's own if they were reduced."""
    kept = _kept(fingerprint)
    if not workspace.exists(kept, _DONE):
        return folders
    read: dict[str, dict[str, str]] = workspace.read_json(f"{kept}/{_DONE}")["folders"]
    return read


def open_tables(workspace: Workspace, folders: Folders, *, held: bool = True) -> dict[str, dict[str, VectorTable]]:
    """Source -> kind -> vectors and semantic ids. held: whether to read small tables into memory.

    Raises the errors of `open_vectors`.
    """

    def opened(folder: str, name: str) -> VectorTable:
        shards = VectorShards(workspace, folder, name)
        quantizer = shards.quantizer()
        return open_vectors(shards, tuple(quantizer.sizes) if quantizer else (), held=held)

    return {
        source: {kind: opened(folder, f"{source}-{kind}") for kind, folder in kinds.items()}
        for source, kinds in folders.items()
    }


def reduced(tables: Mapping[str, KnowledgeTable], variance: float | None) -> dict[str, KnowledgeTable]:
    """Tables in memory, reduced like those on disk by `reduce_once`."""
    if variance is None:
        return dict(tables)
    refuse_two_sizes({f"vectors {name}": table for name, table in tables.items()})
    for table in tables.values():
        refuse_non_finite(table.vectors, table.ids)
    samples = {name: table.vectors[:: -(-max(1, len(table)) // _FIT_ROWS)] for name, table in tables.items()}
    projection = _fit(samples, variance)
    smaller = {name: projection.of(center_name(name)).apply(table.vectors) for name, table in tables.items()}
    return {name: replace(table, vectors=smaller[name].astype(np.float16)) for name, table in tables.items()}


def _fit(samples: Mapping[str, np.ndarray], variance: float) -> Projection:
    """The names of samples end in their tables' names."""
    by_center: dict[str, list[np.ndarray]] = {}
    for name, rows in samples.items():
        by_center.setdefault(center_name(name), []).append(rows)
    return fit_variance({name: np.concatenate(rows) for name, rows in by_center.items()}, variance)


def _kept(fingerprint: str) -> str:
    return f"{grid_folder(fingerprint)}/vectors"


# -------------------------------------------------------------------------------------------------------------- dataset
# Samples encoded by shard on disk and memory-mapped: data sets larger than memory, one encoding for all workers.
#
# A shard is encoded once, from its own users' samples and interactions: rows of samples, which refer to the behaviors
# next to them, and the shard's part of the item counts. Vocabularies are sums over shards, so no pass needs two
# shards at once. Ray Data could stream the tables instead, but neither its iterator nor its local shuffle can resume
# at a position, so a restarted worker would see different batches. Here a position is a number.


# ----------------------------------------------------------------------------------------------------------- warm start
# Warm start: training continues from an artifact on newer samples. Weights carry over by embedded value.
#
# A vocabulary keeps its values and adds new ones, which start as the embedding of unknown values: training
# used it for all rare values. The optimizer starts fresh. Projection, grades and codebooks stay those
# of the artifact; otherwise its weights would read numbers with another meaning.


_MAY_DIFFER = {"features"}  # keys of a spec


@dataclass(frozen=True)
class WarmStart:
    """An artifact to continue from."""

    folder: str
    trial: Trial
    spec: ModelSpec
    weights: dict[str, Tensor]
    vocabularies: Vocabularies

    @classmethod
    def open(cls, workspace: Workspace, folder: str) -> "WarmStart":
        """Raises WorkspaceError if the folder has no finished artifact."""
        card = read_card(workspace, folder)
        return cls(
            folder,
            card.trial,
            ModelSpec.model_validate(workspace.read_json(f"{folder}/spec.json")),
            safetensors.torch.load(workspace.read_bytes(f"{folder}/model.safetensors")),
            read_vocabularies(workspace, folder),
        )

    def load_into(self, model: CTRModel, vocabularies: Vocabularies) -> None:
        """Loads the weights into a new model. vocabularies: of the new samples, grown from the artifact's (`grown`).

        Raises RecipeError with the key of ctr if the model has another backbone or other dimensions.
        """
        ours, theirs = (spec.model_dump(exclude=_MAY_DIFFER) for spec in (model.spec, self.spec))
        for key, value in ours.items():
            if value != theirs[key]:
                raise RecipeError(
                    f"ctr: {key} is {value}, but the warm-start model {self.folder} has {theirs[key]}. Use the "
                    "same value, or train without --warm-start."
                )
        before, now = self.vocabularies, vocabularies
        tables = {"item.weight": (before.items, now.items)}
        for name, old, new in (
            ("attributes", before.attributes, now.attributes),
            ("profile", before.profile, now.profile),
        ):
            if list(old) != list(new):
                raise RecipeError(
                    f"ctr: {name} are {', '.join(new) or 'none'}, but the warm-start model {self.folder} reads "
                    f"{', '.join(old) or 'none'}. Use tables with the same columns, or train without "
                    "--warm-start."
                )
            tables |= {f"{name}.{at}.weight": (old[field], new[field]) for at, field in enumerate(old)}
        weights = dict(self.weights)
        for name, (old, new) in tables.items():
            weights[name] = carried_over(weights[name], old, new)
        model.load_state_dict(weights)


def carried_over(table: Tensor, old: pa.Array, new: pa.Array) -> Tensor:
    """Rows of an embedding table for a new vocabulary: known values keep their rows, and new ones start as
    unknown values. table: float32 [len(old) + 2, e]. Returns float32 [len(new) + 2, e].
    """
    rows = pc.fill_null(pc.index_in(new, old), UNKNOWN - RESERVED).to_numpy().astype(np.int64) + RESERVED
    return torch.cat([table[:RESERVED], table[torch.from_numpy(rows)]])


def grown(new: Vocabularies, before: Vocabularies, items: np.ndarray) -> Vocabularies:
    """Vocabularies of new samples plus an earlier one's values (items only if still in the table), with the earlier
    grades. items: int64 [n], of the items table.
    """

    def union(ours: pa.Array, theirs: pa.Array) -> pa.Array:
        both = pc.unique(pa.concat_arrays([ours, theirs]))
        return both.take(pc.sort_indices(both))

    kept = before.items.filter(pc.is_in(before.items, value_set=pa.array(items, pa.int64())))
    return replace(
        before,
        items=union(new.items, kept),
        attributes={name: union(v, before.attributes.get(name, v[:0])) for name, v in new.attributes.items()},
        profile={name: union(v, before.profile.get(name, v[:0])) for name, v in new.profile.items()},
    )


# -------------------------------------------------------------------------------------------------------------- encoded


# Maximum of scored rows of valid and of test: those of the first shards, whose users are a random sample, since a
# shard is a hash of the id. The standard error of an AUC is then below .0002, and arrays of all rows fit one process.
EVALUATED_ROWS = 1 << 23
_SHARDS_OPEN = 64


class _Encoded(BaseModel):
    """done.json."""

    history_length: int
    profile: tuple[str, ...]
    sizes: dict[str, list[int]]  # split -> rows per shard


class EncodeSamples(Stage):
    """Encodes a shard of users: samples/, by split, behaviors/ and counts/."""

    name = "train_ctr"

    def __init__(self, folder: str, profile: Sequence[str], soft_labels: SoftLabels | None = None) -> None:
        """profile: columns of users."""
        self.folder, self.profile, self.soft_labels = folder, tuple(profile), soft_labels

    def open(self, workspace: Workspace, worker: str) -> None:
        """Reads the ids of all items."""
        self._item_ids = item_ids(workspace)

    def run(self, work: Work) -> Result:
        """Raises SchemaError for a label outside [0, 1]."""
        workspace, number = work.workspace, work.shard.number
        rows = sample_places(workspace, number, SAMPLE_ROWS.names)
        behaviors = in_histories(workspace, number, ["item_id", "rating", "label"])
        label = rows["label"].to_numpy()
        if (odd := ~((label >= 0) & (label <= 1))).any():
            raise SchemaError(
                f"{workspace.path(table_file('samples', number))}, row {odd.argmax()}: the label is "
                f"{label[odd.argmax()]}; a CTR model's labels must be in [0, 1]. Run `prepare` again."
            )
        positive, n_logged = label >= POSITIVE, len(rows)
        if self.soft_labels is not None:
            soft = self.soft_labels.read(workspace, number)
            rows = blended(rows, soft, self.soft_labels.alpha)
        split = pc.index_in(rows["split"], pa.array(SPLITS)).to_numpy()
        order = np.argsort(split, kind="stable")
        rows, split, drawn = rows.take(order), split[order], order >= n_logged
        positive = np.append(positive, np.zeros(len(rows) - n_logged, dtype=bool))[order]
        label = binarize_outside_train(rows["label"].to_numpy(), split == SPLITS.index("train"))
        items = item_rows(self._item_ids, rows["item_id"].to_numpy())
        history_items = item_rows(self._item_ids, behaviors["item_id"].to_numpy())
        starts, ends = (rows[name].to_numpy().astype(np.int64) for name in ("history_start", "history_end"))
        samples = {
            "user_id": rows["user_id"],
            "item_id": rows["item_id"],
            "item": items,
            "start": starts,
            "length": (ends - starts).astype(np.int32),
            "label": label.astype(np.float32),
            "weight": rows["weight"],
            "time": rows["timestamp"],
            **self._profiles(workspace, number, rows["user_id"]),
        }
        train = (split == SPLITS.index("train")) & ~drawn
        ratings = behaviors["rating"].to_numpy()
        tables = {
            "samples": pa.table(samples),
            "behaviors": pa.table({"item": history_items, "rating": ratings, "label": behaviors["label"]}),
            "counts": _item_counts(items[train], starts[train], ends[train], history_items, items[drawn]),
        }
        work.check()
        files = {
            path: workspace.write_arrow(work.artifact.path(path), table, table.schema)
            for name, table in tables.items()
            if (path := f"{name}/{shard_file(number, '.arrow')}")
        }
        counts: dict[str, float | int | str] = {"history_length": int((ends - starts)[train].max(initial=0))}
        if not np.isnan(ratings).all():
            counts["rating_low"], counts["rating_high"] = Grades.of(ratings)
        for code, name in enumerate(SPLITS):
            counts |= {
                name: int((split == code).sum()),
                f"{name}_positives": int(positive[split == code].sum()),
                f"{name}_unlabeled": int(drawn[split == code].sum()),
            }
        return Result(files, rows_in=len(rows), rows_out=len(rows), counts=counts)

    def _profiles(self, workspace: Workspace, number: int, user_ids: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
        if not self.profile:
            return {}
        users = workspace.read_shard("users", number)
        where = pc.index_in(user_ids, users["user_id"].combine_chunks())
        return {name: users[name].take(where).cast(pa.string()) for name in self.profile if name in users.column_names}


def _item_counts(
    items: np.ndarray, starts: np.ndarray, ends: np.ndarray, history_items: np.ndarray, unlabeled: np.ndarray
) -> pa.Table:
    """Number of occurrences of each item in training: `count`, as target or in a history; `unlabeled`, in pairs without
    a label.

    items, starts, ends: of train samples, the last two in `history_items`; unlabeled: the items of those pairs.
    """
    # How often a history shows each behavior: +1 where it starts, -1 where it ends.
    shown = np.bincount(starts, minlength=len(history_items) + 1).astype(np.int64)
    shown -= np.bincount(ends, minlength=len(history_items) + 1)
    item, item_places = np.unique(np.concatenate([items, history_items, unlabeled]), return_inverse=True)
    as_target, in_history, in_pair = np.split(item_places, np.cumsum([len(items), len(history_items)]))
    count = np.bincount(in_history, weights=np.cumsum(shown)[:-1], minlength=len(item)).astype(np.int64)
    count += np.bincount(as_target, minlength=len(item))
    pairs = np.bincount(in_pair, minlength=len(item))
    some = count + pairs > 0
    return pa.table({"item": item[some], "count": count[some], "unlabeled": pairs[some]})


def item_ids(workspace: Workspace) -> np.ndarray:
    """int64: all items that `prepare` read, ascending; a grid keeps its items whatever refreshes add."""
    shards = workspace.table_shards("items")
    return np.sort(
        np.concatenate(
            [workspace.read_parquet(table_file("items", n), ["item_id"])["item_id"].to_numpy() for n in shards]
        )
    )


def encode_tables(
    workspace: Workspace,
    folder: str,
    *,
    attributes: Sequence[str],
    profile: Sequence[str],
    min_item_count: int,
    soft_labels: SoftLabels | None = None,
    before: Vocabularies | None = None,
    pool: Pool | None = None,
) -> None:
    """Encodes the tables users, items, interactions and samples into a grid's folder for `open_features`. Existing
    shards are kept; if all exist, nothing happens.

    attributes, profile, min_item_count, and errors: see `build_features`. soft_labels: probabilities to blend with
    the labels of train; their pairs without a label become training rows, too. Items that occur only in such pairs are
    known, too; item counts include only logged interactions.
    before: vocabularies to grow from.
    """
    encoded = f"{folder}/{ENCODED}"
    if workspace.exists(encoded, _DONE):
        return
    shards = [Shard("user", number) for number in workspace.table_shards("samples")]
    made = run_stage(workspace, EncodeSamples(encoded, profile, soft_labels), dict.fromkeys(shards, encoded), pool)
    cards = [made[shard.name] for shard in shards]
    for split in SPLITS:
        rows, positives, unlabeled = (_total(cards, split + suffix) for suffix in ("", "_positives", "_unlabeled"))
        negatives = rows - unlabeled - positives
        refuse_labels(split, rows, {float(label) for label, n in enumerate((negatives, positives)) if n})
    ids = item_ids(workspace)
    counts, pairs = (np.zeros(len(ids) + RESERVED, dtype=np.int64) for _ in range(2))
    for shard in shards:
        shard_counts = _map(workspace, encoded, "counts", shard.number)
        counts[shard_counts["item"].to_numpy()] += shard_counts["count"].to_numpy()
        pairs[shard_counts["item"].to_numpy()] += shard_counts["unlabeled"].to_numpy()
    graded = [card.counts for card in cards if "rating_low" in card.counts]
    vocabularies = Vocabularies(
        grades=Grades(
            min((float(counts["rating_low"]) for counts in graded), default=0.0),
            max((float(counts["rating_high"]) for counts in graded), default=0.0),
        ),
        items=known_items(ids, counts + pairs, min_item_count),
        attributes=_attribute_values(workspace, attributes),
        profile=_profile_values(
            workspace, encoded, profile, {s.number: int(made[s.name].counts["train"]) for s in shards}
        ),
    )
    if before is not None:
        vocabularies = grown(vocabularies, before, ids)
    write_vocabularies(workspace, folder, vocabularies)
    write_items(workspace, folder, encode_items(item_shards(workspace, vocabularies), vocabularies), counts)
    length = max(1, *(int(card.counts["history_length"]) for card in cards))
    sizes = {split: [int(card.counts[split]) for card in cards] for split in SPLITS}
    done = _Encoded(history_length=length, profile=tuple(vocabularies.profile), sizes=sizes)
    workspace.write_json(f"{encoded}/{_DONE}", done.model_dump())


def open_features(workspace: Workspace, folder: str) -> Features:
    """Opens the output of `encode_tables`; sample shards are mapped when they are read."""
    done = _Encoded.model_validate(workspace.read_json(f"{folder}/{ENCODED}/{_DONE}"))
    vocabularies = read_vocabularies(workspace, folder)
    items, counts = read_items(workspace, folder)
    shards = _EncodedShards(workspace, f"{folder}/{ENCODED}", done, vocabularies)
    splits = {}
    for split in SPLITS:
        sizes = done.sizes[split] if split == "train" else evaluated(done.sizes[split])
        splits[split] = Split(_SplitShards(shards, split, len(sizes)), tuple(sizes))
    return Features(vocabularies.spec(done.history_length), vocabularies, items, counts, splits)


def evaluated(sizes: Sequence[int]) -> list[int]:
    """Sizes of the first shards of a split, up to the limit for scoring."""
    within = np.cumsum(sizes) <= EVALUATED_ROWS
    return list(sizes[: max(1, int(within.sum()))])


def item_shards(workspace: Workspace, vocabularies: Vocabularies) -> Iterator[pa.Table]:
    """Shards of the prepared items table, with the encoded columns."""
    for number in workspace.table_shards("items"):
        yield workspace.read_parquet(table_file("items", number), ["item_id", *vocabularies.attributes])


class _EncodedShards:
    """All encoded shards; recently used ones stay mapped."""

    def __init__(self, workspace: Workspace, folder: str, done: _Encoded, vocabularies: Vocabularies) -> None:
        self.workspace, self.folder, self.done, self.vocabularies = workspace, folder, done, vocabularies
        self.shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)

    def _open(self, number: int) -> SampleFeatures:
        samples, behaviors = (_map(self.workspace, self.folder, name, number) for name in ("samples", "behaviors"))
        profile = [value_codes(samples[name], values) for name, values in self.vocabularies.profile.items()]
        starts, lengths = (samples[name].to_numpy() for name in ("start", "length"))
        history_items, rating, label = (behaviors[name].to_numpy() for name in ("item", "rating", "label"))
        outcomes = self.vocabularies.grades.tokens(rating, label)
        histories = Histories(starts, lengths, history_items, outcomes, self.done.history_length)
        names = ("user_id", "item_id", "item", "label", "time", "weight")
        user_ids, item_ids, items, labels, times, weights = (samples[name].to_numpy() for name in names)
        profiles = np.stack(profile, axis=1) if profile else np.zeros((len(samples), 0), dtype=np.int32)
        return SampleFeatures(user_ids, item_ids, items, histories, profiles, labels, times, weights)


class _SplitShards(Sequence[SampleFeatures]):
    def __init__(self, shards: _EncodedShards, split: str, n: int) -> None:
        self._shards, self._split, self._n = shards, split, n

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, number: int) -> SampleFeatures: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[SampleFeatures]: ...

    def __getitem__(self, number: int | slice) -> SampleFeatures | Sequence[SampleFeatures]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(self._n))]
        sizes = [self._shards.done.sizes[split][number] for split in SPLITS]
        at = SPLITS.index(self._split)
        return self._shards.shard(number).take(slice(sum(sizes[:at]), sum(sizes[: at + 1])))


def _map(workspace: Workspace, folder: str, name: str, number: int) -> pa.Table:
    return workspace.map_arrow(f"{folder}/{name}/{shard_file(number, '.arrow')}")


def _attribute_values(workspace: Workspace, attributes: Sequence[str]) -> dict[str, pa.Array]:
    shards = workspace.table_shards("items")
    columns = workspace.parquet_file(table_file("items", 0)).schema_arrow.names
    return {
        name: distinct_values(workspace.read_parquet(table_file("items", number), [name])[name] for number in shards)
        for name in kept_attributes(columns, attributes)
    }


def _profile_values(
    workspace: Workspace, folder: str, profile: Sequence[str], train_rows: Mapping[int, int]
) -> dict[str, pa.Array]:
    """Values of users in training. train_rows: in each shard, the first ones."""
    has = set(_map(workspace, folder, "samples", 0).column_names) if profile else set()
    return {
        name: distinct_values(
            _map(workspace, folder, "samples", n)[name].slice(0, rows) for n, rows in train_rows.items()
        )
        for name in profile
        if name in has
    }


def _total(cards: Sequence[Card], count: str) -> int:
    return sum(int(card.counts[count]) for card in cards)
