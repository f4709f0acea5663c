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
    LEAK_ROWS,
    RESERVED,
    SPLITS,
    UNKNOWN,
    USER_ID,
    ColumnReader,
    Features,
    FeatureSchema,
    FeatureSections,
    Field,
    Grades,
    Group,
    Histories,
    SampleFeatures,
    Split,
    Vocabularies,
    binarize_outside_train,
    carried_columns,
    chosen,
    context_of,
    encode_fields,
    encode_items,
    fit_fields,
    item_rows,
    known_items,
    other_labels,
    refuse_labels,
    refuse_leak,
    shown_users,
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
from owlrec.sources.outcomes import EVENT_CODE, POSITIVE
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
        if before.fields != now.fields:
            raise RecipeError(
                f"ctr: the features are {_names(now)}, but the warm-start model {self.folder} reads {_names(before)}. "
                "Use the same features and labels, or train without --warm-start."
            )
        tables = {"item.weight": (before.items, now.items)}
        for at, table in enumerate(model.spec.features.tables):
            if table in now.values:
                tables[f"tables.{at}.weight"] = (before.values[table], now.values[table])
        weights = dict(self.weights)
        for name, (old, new) in tables.items():
            weights[name] = carried_over(weights[name], old, new)
        for name, sharded in model.sharded_tables.items():
            sharded.load(weights.pop(f"{name}.weight"), torch.distributed.get_rank())
        model.load_state_dict(weights)


def _names(vocabularies: Vocabularies) -> str:
    fields = vocabularies.fields
    named = {"items": fields.items, "users": fields.users, "interactions": fields.interactions}
    each = [f"{group}.{field.column}" for group, some in named.items() for field in some]
    return ", ".join([*each, *fields.sequences, *fields.tasks]) or "none"


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
    # Edges and scales stay, too: a bucket of another range would be another feature.
    same = _without_fit(new.fields) == _without_fit(before.fields)
    return replace(
        before,
        items=union(new.items, kept),
        values={name: union(v, before.values.get(name, v[:0])) for name, v in new.values.items()},
        fields=before.fields if same else new.fields,
    )


def _without_fit(fields: FeatureSchema) -> FeatureSchema:
    """The fields without what is fitted to the samples."""

    def plain(some: tuple[Field, ...]) -> tuple[Field, ...]:
        return tuple(f.model_copy(update={"edges": (), "mean": 0.0, "std": 1.0, "width": 1}) for f in some)

    groups = {group: plain(getattr(fields, group)) for group in ("items", "users", "interactions")}
    return fields.model_copy(update=groups)


# -------------------------------------------------------------------------------------------------------------- encoded


# Maximum of scored rows of valid and of test: those of the first shards, whose users are a random sample, since a
# shard is a hash of the id. The standard error of an AUC is then below .0002, and arrays of all rows fit one process.
EVALUATED_ROWS = 1 << 23
_SHARDS_OPEN = 64


class _Encoded(BaseModel):
    """done.json."""

    history_length: int
    sizes: dict[str, list[int]]  # split -> rows per shard


class EncodeSamples(Stage):
    """Encodes a shard of users: samples/, by split, behaviors/ and counts/."""

    name = "train_ctr"

    def __init__(
        self,
        folder: str,
        features: FeatureSections,
        soft_labels: SoftLabels | None = None,
        tasks: Sequence[str] = (),
    ) -> None:
        """tasks: further labels."""
        self.folder, self.features, self.soft_labels, self.tasks = folder, features, soft_labels, tuple(tasks)

    def open(self, workspace: Workspace, worker: str) -> None:
        """Reads the ids of all items."""
        self._item_ids = item_ids(workspace)

    def run(self, work: Work) -> Result:
        """Raises SchemaError for a label outside [0, 1]."""
        workspace, number = work.workspace, work.shard.number
        extra = [f"interactions/{name}" for name in carried_columns(self.features)]
        extra += [f"label/{name}" for name in self.tasks]
        rows = sample_places(workspace, number, [*SAMPLE_ROWS.names, *self._present(workspace, number, extra)])
        behaviors = in_histories(workspace, number, ["item_id", "rating", "label", *events_of(workspace, number)])
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
        train = split == SPLITS.index("train")
        positive = np.append(positive, np.zeros(len(rows) - n_logged, dtype=bool))[order]
        label = binarize_outside_train(rows["label"].to_numpy(), train)
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
            "timestamp": rows["timestamp"],
            **{name: rows[name].combine_chunks().dictionary_encode() for name in extra if name[0] == "i"},
            **self._user_columns(workspace, number, rows["user_id"]),
        }
        if (others := other_labels(rows, self.tasks)) is not None:
            hard = binarize_outside_train(others, train[:, None])
            samples |= {f"label/{name}": hard[:, at] for at, name in enumerate(self.tasks)}
        train &= ~drawn
        ratings = behaviors["rating"].to_numpy()
        tables = {
            "samples": pa.table(samples),
            "behaviors": pa.table(
                {
                    "item": history_items,
                    "rating": ratings,
                    **{name: behaviors[name] for name in ("label", EVENT_CODE) if name in behaviors.column_names},
                }
            ),
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

    def _present(self, workspace: Workspace, number: int, extra: Sequence[str]) -> Sequence[str]:
        """`extra`. Raises SchemaError for a column that the samples do not have."""
        has = workspace.parquet_file(table_file("samples", number)).schema_arrow.names
        for name in extra:
            if name not in has:
                kind, _, column = name.partition("/")
                key = f"ctr.tasks: {column}" if kind == "label" else f"features.interactions.{column}"
                raise SchemaError(
                    f"{key}: the samples of this workspace do not have the column. Add it to the source and run "
                    "`prepare` again, or remove it."
                )
        return extra

    def _user_columns(
        self, workspace: Workspace, number: int, user_ids: pa.ChunkedArray
    ) -> dict[str, pa.DictionaryArray | pa.ChunkedArray]:
        """The users' columns per sample: text as a dictionary, since it repeats."""
        users = workspace.read_shard("users", number)
        where = pc.index_in(user_ids, users["user_id"].combine_chunks()).combine_chunks()
        names, _ = chosen(self.features, "users", users.column_names)
        columns = {}
        for name in names:
            if name != USER_ID:
                column = users[name].combine_chunks()
                nested = pa.types.is_nested(column.type)
                columns[f"users/{name}"] = (column if nested else column.dictionary_encode()).take(where)
        return columns


def events_of(workspace: Workspace, number: int) -> list[str]:
    """The column of events in a shard of interactions, if it is there."""
    names = workspace.parquet_file(table_file("interactions", number)).schema_arrow.names
    return [EVENT_CODE] if EVENT_CODE in names else []


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
    min_item_count: int,
    features: FeatureSections | None = None,
    tasks: Sequence[str] = (),
    soft_labels: SoftLabels | None = None,
    before: Vocabularies | None = None,
    pool: Pool | None = None,
) -> None:
    """Encodes the tables users, items, interactions and samples into a grid's folder for `open_features`. Existing
    shards are kept; if all exist, nothing happens.

    features, tasks, min_item_count, and errors: see `build_features`. soft_labels: probabilities to blend with
    the labels of train; their pairs without a label become training rows, too. Items that occur only in such pairs are
    known, too; item counts include only logged interactions.
    before: vocabularies to grow from.
    """
    encoded = f"{folder}/{ENCODED}"
    if workspace.exists(encoded, _DONE):
        return
    shards = [Shard("user", number) for number in workspace.table_shards("samples")]
    sections = features or {}
    stage = EncodeSamples(encoded, sections, soft_labels, tasks)
    made = run_stage(workspace, stage, dict.fromkeys(shards, encoded), pool)
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
    train_rows = {shard.number: int(made[shard.name].counts["train"]) for shard in shards}
    readers: dict[Group, ColumnReader] = {
        "items": _item_columns(workspace, ids, counts),
        "users": _user_columns(workspace, encoded, train_rows),
        "interactions": _own_columns(workspace, encoded, train_rows),
    }
    events = bool(events_of(workspace, shards[0].number))
    fields, values = fit_fields(sections, readers, min_item_count, events=events, tasks=tasks)
    _refuse_leaks(workspace, encoded, fields, train_rows)
    vocabularies = Vocabularies(
        grades=Grades(
            min((float(counts["rating_low"]) for counts in graded), default=0.0),
            max((float(counts["rating_high"]) for counts in graded), default=0.0),
        ),
        items=known_items(ids, counts + pairs, min_item_count),
        values=values,
        fields=fields,
    )
    if before is not None:
        vocabularies = grown(vocabularies, before, ids)
    write_vocabularies(workspace, folder, vocabularies)
    write_items(workspace, folder, encode_items(item_shards(workspace, vocabularies), vocabularies), counts)
    length = max(1, *(int(card.counts["history_length"]) for card in cards))
    sizes = {split: [int(card.counts[split]) for card in cards] for split in SPLITS}
    done = _Encoded(history_length=length, sizes=sizes)
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
        columns = [field.column for field in vocabularies.fields.items]
        yield workspace.read_parquet(table_file("items", number), ["item_id", *columns])


class _EncodedShards:
    """All encoded shards; recently used ones stay mapped."""

    def __init__(self, workspace: Workspace, folder: str, done: _Encoded, vocabularies: Vocabularies) -> None:
        self.workspace, self.folder, self.done, self.vocabularies = workspace, folder, done, vocabularies
        self.shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)

    def _open(self, number: int) -> SampleFeatures:
        samples, behaviors = (_map(self.workspace, self.folder, name, number) for name in ("samples", "behaviors"))
        fields, values = self.vocabularies.fields, self.vocabularies.values
        own, n_users = context_of(samples) if fields.interactions else None, len(fields.users)
        of_users = {id(field) for field in fields.row_fields[:n_users]}

        def column_of(field: Field) -> pa.ChunkedArray:
            if id(field) in of_users:
                return samples["user_id" if field.column == USER_ID else f"users/{field.column}"]
            assert own is not None
            return own[field.column]

        codes, numbers = encode_fields(fields.row_fields, column_of, values, len(samples))
        starts, lengths = (samples[name].to_numpy() for name in ("start", "length"))
        history_items, rating, label = (behaviors[name].to_numpy() for name in ("item", "rating", "label"))
        outcomes = self.vocabularies.grades.tokens(rating, label)
        events = behaviors[EVENT_CODE].to_numpy() if fields.events else None
        histories = Histories(starts, lengths, history_items, outcomes, self.done.history_length, events)
        names = ("user_id", "item_id", "item", "label", "timestamp", "weight")
        user_ids, item_ids, items, labels, times, weights = (samples[name].to_numpy() for name in names)
        others = other_labels(samples, fields.tasks)
        return SampleFeatures(user_ids, item_ids, items, histories, codes, numbers, labels, times, weights, others)


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


def _item_columns(workspace: Workspace, ids: np.ndarray, counts: np.ndarray) -> ColumnReader:
    """Items as often as training shows them. ids: of all items, ascending; counts: by row of ItemFeatures."""

    def read(column: str) -> Iterator[tuple[pa.ChunkedArray, np.ndarray]]:
        for number in workspace.table_shards("items"):
            items = workspace.read_parquet(table_file("items", number), ["item_id", column])
            yield items[column], counts[item_rows(ids, items["item_id"].to_numpy())]

    return ColumnReader(workspace.parquet_file(table_file("items", 0)).schema_arrow.names, read)


def _user_columns(workspace: Workspace, folder: str, train_rows: Mapping[int, int]) -> ColumnReader:
    """Users as often as training shows them. train_rows: per shard of samples, the first ones."""

    def read(column: str) -> Iterator[tuple[pa.ChunkedArray, np.ndarray]]:
        for number, rows in train_rows.items():
            users = workspace.read_shard("users", number, list({USER_ID: None, column: None}))
            shown = _map(workspace, folder, "samples", number)["user_id"].slice(0, rows).to_numpy()
            yield users[column], shown_users(users, shown)

    return ColumnReader(workspace.parquet_file(table_file("users", 0)).schema_arrow.names, read)


def _own_columns(workspace: Workspace, folder: str, train_rows: Mapping[int, int]) -> ColumnReader:
    """Columns of the training samples' own interactions. train_rows: see _user_columns."""

    def read(column: str) -> Iterator[tuple[pa.ChunkedArray, np.ndarray]]:
        for number, rows in train_rows.items():
            samples = _map(workspace, folder, "samples", number).slice(0, rows)
            yield context_of(samples)[column], np.ones(rows, dtype=np.int64)

    return ColumnReader(context_of(_map(workspace, folder, "samples", min(train_rows))).column_names, read)


def _refuse_leaks(workspace: Workspace, folder: str, fields: FeatureSchema, train_rows: Mapping[int, int]) -> None:
    """Raises SchemaError for a column of the interactions that tells the label of the first training samples."""
    tables, left = [], LEAK_ROWS
    for number, rows in train_rows.items() if fields.interactions else ():
        samples = _map(workspace, folder, "samples", number).slice(0, min(rows, left))
        tables.append(context_of(samples).append_column("label/", samples["label"]))
        if not (left := left - len(samples)):
            break
    if tables:
        some = pa.concat_tables([table.unify_dictionaries() for table in tables])
        for field in fields.interactions:
            refuse_leak(field.column, some[field.column], some["label/"].to_numpy())


def _total(cards: Sequence[Card], count: str) -> int:
    return sum(int(card.counts[count]) for card in cards)
