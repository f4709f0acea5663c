"""What training reads, made once on disk for all workers: encoded samples and reduced knowledge vectors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar, overload

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
    distinct_values,
    encode_items,
    item_rows,
    judged_labels,
    kept_attributes,
    known_items,
    refuse_labels,
    value_codes,
)
from owlrec.ctr.knowledge_tables import KnowledgeTable, VectorTable, open_vectors, refuse_non_finite, refuse_two_sizes
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.trainer import read_items, read_vocabularies, write_items, write_vocabularies
from owlrec.encoding.compression import Projection, ProjectionSettings, fit_projection
from owlrec.encoding.vectors import VectorShards, quantiser_folder
from owlrec.errors import RecipeError, SchemaError
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import SAMPLE_ROWS
from owlrec.shards import Card, Shard
from owlrec.sources.outcomes import POSITIVE
from owlrec.sources.splits import in_histories, sample_places
from owlrec.workspace import Workspace, shard_file, table_file

# ------------------------------------------------------------------------------------------------------------------ pca
# Knowledge vectors of fewer components, for training: all of them seen from their first principal directions.
#
# The vectors of 10^8 users take 77 GB with the 384 components of MiniLM and 13 GB with 64, and the adaptor's first
# layer shrinks as they do. One projection serves all sources and both sides, since the shared experts read users and
# items, and the fusion adds sources up. It has no center: what all vectors share stays in them, as the lengths and
# angles that the adaptor reads. It is fitted on a bounded sample, kept with the grid, and applied by shard.


Name = TypeVar("Name")
Folders = Mapping[str, Mapping[str, str]]  # source -> side -> folder that holds the vectors <source>-<side>

_FIT_ROWS = 16_384  # of each table: with 384 components the SVD then takes seconds
_DONE = "done.json"  # written last


class ReduceVectors(Stage):
    """Projects a shard of vectors; ids, codes and digests stay."""

    name = "train_ctr"

    def __init__(self, folder: str, fingerprint: str, sources: Mapping[str, str]) -> None:
        """fingerprint: that the projection in `folder` was saved under. sources: <source>-<side> -> its folder."""
        self.folder, self.fingerprint, self.sources = folder, fingerprint, dict(sources)

    def open(self, workspace: Workspace, worker: str) -> None:
        """Loads the projection."""
        self._projection = Projection.load(workspace, self.folder, self.fingerprint)
        self._shards = {name: VectorShards(workspace, folder, name) for name, folder in self.sources.items()}

    def run(self, work: Work) -> Result:
        """Raises SchemaError for a vector that is not finite."""
        shard = self._shards[work.shard.kind].shard(work.shard.number)
        assert shard is not None, f"{work.shard.name} was listed, but is gone"
        refuse_non_finite(shard.vectors, shard.ids)
        table = replace(shard, vectors=self._projection.apply(shard.vectors).astype(np.float16)).table()
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


def reduce_once(
    workspace: Workspace,
    folders: Folders,
    components: int | None,
    fingerprint: str,
    pool: Pool | None = None,
    projection: Projection | None = None,
) -> Folders:
    """The folders that the trials of a grid read in place of `folders` (`reduced_folders`), written where they are not
    there yet: vectors of at most `components`, of length 1, and the projection. None, or vectors that have no more,
    leave all where it is. projection: is applied in place of one that is fitted on these vectors.

    Raises SchemaError where two tables differ in size, or for a vector that is not finite.
    """
    kept = _kept(fingerprint)
    shards = {
        f"{source}-{side}": VectorShards(workspace, folder, f"{source}-{side}")
        for source, sides in folders.items()
        for side, folder in sides.items()
    }
    if components is None or workspace.exists(kept, _DONE) or all(s.dim <= components for s in shards.values()):
        return reduced_folders(workspace, folders, fingerprint)
    refuse_two_sizes({f"vectors {name}": open_vectors(of_name, held=False) for name, of_name in shards.items()})
    fitted = projection or _fit([s.sample(_FIT_ROWS, seed=0)[1] for s in shards.values()], components)
    fitted.save(workspace, kept, fingerprint)
    stage = ReduceVectors(kept, fingerprint, {name: of_name.folder for name, of_name in shards.items()})
    inputs = {Shard(name, number): fingerprint for name, of_name in shards.items() for number in of_name.numbers}
    run_stage(workspace, stage, inputs, pool)
    for name, of_name in shards.items():
        if quantiser := of_name.quantiser():
            quantiser.save(workspace, quantiser_folder(kept, name))
    workspace.write_json(f"{kept}/{_DONE}", {"components": components})
    return reduced_folders(workspace, folders, fingerprint)


def reduced_folders(workspace: Workspace, folders: Folders, fingerprint: str) -> Folders:
    """Where the vectors lie that a grid's trials read: in its own folder where they were reduced."""
    kept = _kept(fingerprint)
    if not workspace.exists(kept, _DONE):
        return folders
    return {source: dict.fromkeys(sides, kept) for source, sides in folders.items()}


def open_tables(workspace: Workspace, folders: Folders, *, held: bool = True) -> dict[str, dict[str, VectorTable]]:
    """Source -> side -> vectors and semantic ids. held: whether small tables are read into memory.

    Raises as `open_vectors` does.
    """

    def opened(folder: str, name: str) -> VectorTable:
        shards = VectorShards(workspace, folder, name)
        quantiser = shards.quantiser()
        return open_vectors(shards, tuple(quantiser.sizes) if quantiser else (), held=held)

    return {
        source: {side: opened(folder, f"{source}-{side}") for side, folder in sides.items()}
        for source, sides in folders.items()
    }


def reduced(tables: Mapping[Name, KnowledgeTable], components: int | None) -> dict[Name, KnowledgeTable]:
    """Tables in memory as `reduce_once` reduces those on disk."""
    if components is None or all(table.dim <= components for table in tables.values()):
        return dict(tables)
    refuse_two_sizes({f"vectors {name}": table for name, table in tables.items()})
    projection = _fit([t.vectors[:: -(-max(1, len(t)) // _FIT_ROWS)] for t in tables.values()], components)
    smaller = {}
    for name, table in tables.items():
        refuse_non_finite(table.vectors, table.ids)
        smaller[name] = replace(table, vectors=projection.apply(table.vectors).astype(np.float16))
    return smaller


def _fit(samples: Sequence[np.ndarray], components: int) -> Projection:
    sample = np.concatenate(samples)
    return fit_projection(sample, ProjectionSettings(components=components, fit_items=len(sample)), centred=False)


def _kept(fingerprint: str) -> str:
    return f"{grid_folder(fingerprint)}/vectors"


# -------------------------------------------------------------------------------------------------------------- dataset
# Samples encoded by shard on disk, memory-mapped: data sets larger than memory, and one encoding for all workers.
#
# A shard is encoded once, from its users' samples and interactions alone: rows of samples, which refer to the behaviors
# beside them, and what the shard adds to the counts of items. Vocabularies are sums over shards, so no pass looks at
# two of them at once. Ray Data could stream the tables instead, but neither its iterator nor its local shuffle can be
# entered again at a position, so a restarted worker would see other batches than the one that died. Here a position is
# a number.


# ----------------------------------------------------------------------------------------------------------- warm start
# Training that goes on from an artifact on newer samples: weights carry over, by the values that they embed.
#
# A vocabulary keeps what it knew and grows by what is new, which starts as the embedding of unknown values: training
# went on with it for everything that was rare. The optimizer starts fresh. Projection, grades and codebooks stay those
# of the artifact, or its weights would read numbers of another meaning.


_MAY_DIFFER = {"features", "dropout"}  # of a spec


@dataclass(frozen=True)
class WarmStart:
    """An artifact to go on from."""

    folder: str
    trial: Trial
    spec: ModelSpec
    weights: dict[str, Tensor]
    vocabularies: Vocabularies

    @classmethod
    def open(cls, workspace: Workspace, folder: str) -> "WarmStart":
        """Raises WorkspaceError where the folder holds no finished artifact."""
        card = read_card(workspace, folder)
        return cls(
            folder,
            card.trial,
            ModelSpec.model_validate(workspace.read_json(f"{folder}/spec.json")),
            safetensors.torch.load(workspace.read_bytes(f"{folder}/model.safetensors")),
            read_vocabularies(workspace, folder),
        )

    def load_into(self, model: CTRModel, vocabularies: Vocabularies) -> None:
        """Gives a new model the weights. vocabularies: of the new samples, grown from the artifact's (`grown`).

        Raises RecipeError, naming the key of ctr, where the model has another backbone or other dimensions.
        """
        ours, theirs = (spec.model_dump(exclude=_MAY_DIFFER) for spec in (model.spec, self.spec))
        for key, value in ours.items():
            if value != theirs[key]:
                raise RecipeError(
                    f"ctr: {key} is {value}, but the model to go on from, {self.folder}, has {theirs[key]}. Give the "
                    "recipe the same, or train without --warm-start."
                )
        before, now = self.vocabularies, vocabularies
        tables = {"item.weight": (before.items, now.items)}
        for name, old, new in (
            ("attributes", before.attributes, now.attributes),
            ("profile", before.profile, now.profile),
        ):
            if list(old) != list(new):
                raise RecipeError(
                    f"ctr: {name} are {', '.join(new) or 'none'}, but the model to go on from, {self.folder}, reads "
                    f"{', '.join(old) or 'none'}. Give the tables the same columns, or train without --warm-start."
                )
            tables |= {f"{name}.{at}.weight": (old[field], new[field]) for at, field in enumerate(old)}
        weights = dict(self.weights)
        for name, (old, new) in tables.items():
            weights[name] = carried_over(weights[name], old, new)
        model.load_state_dict(weights)


def carried_over(table: Tensor, old: pa.Array, new: pa.Array) -> Tensor:
    """The rows of an embedding table for a new vocabulary: those of values that the old one has, and for others that
    of unknown values. table: float32 [len(old) + 2, e]. Returns float32 [len(new) + 2, e].
    """
    rows = pc.fill_null(pc.index_in(new, old), UNKNOWN - RESERVED).to_numpy().astype(np.int64) + RESERVED
    return torch.cat([table[:RESERVED], table[torch.from_numpy(rows)]])


def grown(new: Vocabularies, before: Vocabularies, items: np.ndarray) -> Vocabularies:
    """Vocabularies of new samples and all that an earlier one knew, items as far as the table still has them; with its
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


# Rows of valid and of test that are scored at most: those of the first shards, whose users are a random draw, since a
# shard is a hash of the id. The standard error of an AUC is then below .0002, and arrays of all rows fit one process.
EVALUATED_ROWS = 1 << 23
_SHARDS_OPEN = 64


class _Encoded(BaseModel):
    """done.json."""

    history_length: int
    profile: tuple[str, ...]
    sizes: dict[str, list[int]]  # split -> rows in each shard


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
                f"{label[odd.argmax()]}; a CTR model's labels lie in [0, 1]. Run `prepare` again."
            )
        positive, n_logged = label >= POSITIVE, len(rows)
        if self.soft_labels is not None:
            soft = self.soft_labels.read(workspace, number)
            rows = blended(rows, soft, self.soft_labels.alpha)
        split = pc.index_in(rows["split"], pa.array(SPLITS)).to_numpy()
        order = np.argsort(split, kind="stable")
        rows, split, drawn = rows.take(order), split[order], order >= n_logged
        positive = np.append(positive, np.zeros(len(rows) - n_logged, dtype=bool))[order]
        label = judged_labels(rows["label"].to_numpy(), split == SPLITS.index("train"))
        items = item_rows(self._item_ids, rows["item_id"].to_numpy())
        of_history = item_rows(self._item_ids, behaviors["item_id"].to_numpy())
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
            "behaviors": pa.table({"item": of_history, "rating": ratings, "label": behaviors["label"]}),
            "counts": _item_counts(items[train], starts[train], ends[train], of_history, items[drawn]),
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
    items: np.ndarray, starts: np.ndarray, ends: np.ndarray, of_history: np.ndarray, unlabeled: np.ndarray
) -> pa.Table:
    """How often training shows each item: `count`, as target or in a history; `unlabeled`, in pairs without a label.

    items, starts, ends: of train samples, the last two in `of_history`; unlabeled: the items of those pairs.
    """
    # How often a history shows each behavior: up by one where it starts, down where it ends.
    shown = np.bincount(starts, minlength=len(of_history) + 1).astype(np.int64)
    shown -= np.bincount(ends, minlength=len(of_history) + 1)
    item, of_item = np.unique(np.concatenate([items, of_history, unlabeled]), return_inverse=True)
    as_target, in_history, in_pair = np.split(of_item, np.cumsum([len(items), len(of_history)]))
    count = np.bincount(in_history, weights=np.cumsum(shown)[:-1], minlength=len(item)).astype(np.int64)
    count += np.bincount(as_target, minlength=len(item))
    pairs = np.bincount(in_pair, minlength=len(item))
    some = count + pairs > 0
    return pa.table({"item": item[some], "count": count[some], "unlabeled": pairs[some]})


def item_ids(workspace: Workspace) -> np.ndarray:
    """int64: of all items that `prepare` read, ascending; those of a grid stay whatever refreshes bring."""
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
    """Encodes the tables users, items, interactions and samples into a grid's folder for `open_features`; shards that
    are there already are kept, and nothing happens where all is.

    attributes, profile, min_item_count, and errors: as of `build_features`. soft_labels: probabilities to blend with
    the labels of train; their pairs without a label are trained on as well. An item that only such pairs show is known,
    too; the counts of items remain those of logged interactions.
    before: what the vocabularies grow from.
    """
    encoded = f"{folder}/{ENCODED}"
    if workspace.exists(encoded, _DONE):
        return
    shards = [Shard("user", number) for number in workspace.table_shards("samples")]
    made = run_stage(workspace, EncodeSamples(encoded, profile, soft_labels), dict.fromkeys(shards, encoded), pool)
    cards = [made[shard.name] for shard in shards]
    for split in SPLITS:
        rows, positives, unlabeled = (_total(cards, split + of) for of in ("", "_positives", "_unlabeled"))
        of_zero = rows - unlabeled - positives
        refuse_labels(split, rows, {float(label) for label, n in enumerate((of_zero, positives)) if n})
    ids = item_ids(workspace)
    counts, pairs = (np.zeros(len(ids) + RESERVED, dtype=np.int64) for _ in range(2))
    for shard in shards:
        of_shard = _map(workspace, encoded, "counts", shard.number)
        counts[of_shard["item"].to_numpy()] += of_shard["count"].to_numpy()
        pairs[of_shard["item"].to_numpy()] += of_shard["unlabeled"].to_numpy()
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
    """What `encode_tables` wrote; samples are mapped shard by shard, as they are read."""
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
    """The sizes of those first shards of a split that are scored."""
    within = np.cumsum(sizes) <= EVALUATED_ROWS
    return list(sizes[: max(1, int(within.sum()))])


def item_shards(workspace: Workspace, vocabularies: Vocabularies) -> Iterator[pa.Table]:
    """The shards of the prepared items table, with those columns that are encoded."""
    for number in workspace.table_shards("items"):
        yield workspace.read_parquet(table_file("items", number), ["item_id", *vocabularies.attributes])


class _EncodedShards:
    """All encoded shards; the last used stay mapped."""

    def __init__(self, workspace: Workspace, folder: str, done: _Encoded, vocabularies: Vocabularies) -> None:
        self.workspace, self.folder, self.done, self.vocabularies = workspace, folder, done, vocabularies
        self.shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)

    def _open(self, number: int) -> SampleFeatures:
        samples, behaviors = (_map(self.workspace, self.folder, name, number) for name in ("samples", "behaviors"))
        profile = [value_codes(samples[name], values) for name, values in self.vocabularies.profile.items()]
        starts, lengths = (samples[name].to_numpy() for name in ("start", "length"))
        of_history, rating, label = (behaviors[name].to_numpy() for name in ("item", "rating", "label"))
        outcomes = self.vocabularies.grades.tokens(rating, label)
        histories = Histories(starts, lengths, of_history, outcomes, self.done.history_length)
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
    """Of the users that training shows. train_rows: in each shard, the first ones."""
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
