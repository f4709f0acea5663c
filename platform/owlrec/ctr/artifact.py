"""The artifact of a trained model: the folder that a serving process opens, and scores by it."""

import copy
import io
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from owlrec.cohorts.clustering import unit
from owlrec.ctr.batches import Tables
from owlrec.ctr.experiment import Metrics, Trial, grid_folder, read_grid_scores
from owlrec.ctr.features import RESERVED, UNKNOWN, ItemFeatures, Vocabularies, value_codes
from owlrec.ctr.knowledge_tables import DISLIKED, OLDER_PARTITIONS, Form, arm_parts, arm_sources
from owlrec.ctr.model import Batch, CTRModel, TrainedTower
from owlrec.ctr.trainer import VOCABULARIES, load_trial, read_items, read_vocabularies, write_items
from owlrec.encoding.compression import Projection
from owlrec.encoding.vectors import VectorShards
from owlrec.errors import ReleaseError, SchemaError, WorkspaceError
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import BEHAVIOR, rows_of, shard_of
from owlrec.shards import Shard
from owlrec.sources.outcomes import was_taken
from owlrec.sources.splits import read_samples
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# ------------------------------------------------------------------------------------------------------------- artifact
# The folder that a serving process opens to score; `CtrScorer` reads it.
#
#     spec.json, model.safetensors   the trained trial, its adaptor included
#     vocabularies.parquet           how values become codes
#     items.safetensors              the item table's ids and codes
#     profiles/                      by shard, each user's profile as codes, where the model reads any
#     projection.*                   how an encoder's vectors become those that the model reads, where they are reduced
#     program.pt2                    the backbone as a torch.export program
#     cards/                         that shards are done, so that an interrupted export goes on
#     model.json                     what it is, and whose vectors it must be given; written last
#
# Nothing in it follows from texts or behaviors: those are read from the current release, so that a refresh
# reaches the scores. JSON, Arrow and safetensors only, no pickle.


# ----------------------------------------------------------------------------------------------------------- model card
# model.json of an artifact, which is written last: read without torch, so that who only asks for it starts fast.


AGAIN = "Run `owlrec ctr export` again."


class Reads(BaseModel):
    """The knowledge that a model was trained on. Other encoders and codebooks would give it numbers that mean something
    else.
    """

    user: tuple[str, ...]  # sources, in the order of the adaptor's slots
    item: tuple[str, ...]
    encoder: str  # EncoderConfig.identity
    codebooks: dict[str, str]  # by kind, fingerprints of those whose codes it reads

    def sources(self, kind: str) -> tuple[str, ...]:
        """Of users or items."""
        return self.user if kind == "user" else self.item

    def refuse_other(self, release: str, encoder: str, codebooks: Mapping[str, str]) -> None:
        """Raises ReleaseError where a release has the vectors of another encoder, or codes of other codebooks.

        encoder, codebooks: of the release.
        """
        again = "Train and export again on its vectors, or roll back to a release that the model was trained on."
        if encoder != self.encoder:
            raise ReleaseError(
                f"release {release} has vectors of encoder '{encoder}', but the model was trained on those of "
                f"'{self.encoder}'. {again}"
            )
        for kind, codebook in self.codebooks.items():
            if codebooks.get(kind, "") != codebook:
                raise ReleaseError(
                    f"release {release} has {kind} codes of codebooks {codebooks.get(kind, '')[:8] or 'none'}, but the "
                    f"model was trained on those of {codebook[:8]}. {again}"
                )


class ModelCard(BaseModel):
    """model.json: what an artifact is, and how it scored before it was exported."""

    trial: Trial
    grid: str  # fingerprint
    items: int
    reads: Reads | None  # None for arm "none"
    valid: Metrics
    test: Metrics


def finish_artifact(workspace: Workspace, folder: str, card: ModelCard) -> None:
    """Completes an artifact: only now does a scorer open it."""
    workspace.write_json(f"{folder}/model.json", card.model_dump(mode="json"))


def read_card(workspace: Workspace, folder: str) -> ModelCard:
    """Raises WorkspaceError where the folder holds no finished artifact."""
    if not workspace.exists(folder, "model.json"):
        raise WorkspaceError(
            f"{workspace.path(folder)}: no finished artifact is there. `owlrec ctr export` writes one and names it."
        )
    try:
        return ModelCard.model_validate(workspace.read_json(f"{folder}/model.json"))
    except ValidationError as error:
        raise WorkspaceError(f"{workspace.path(folder)}: model.json is of no known form ({error}). {AGAIN}") from None


# ------------------------------------------------------------------------------------------------------------- profiles
# The profile of each user as codes, in mapped shards: what an artifact holds of users, as far as its model reads it.
#
# One of 10^8 users then costs a binary search in one file, and replicas of one machine share the page cache.


PROFILES = "profiles"
_SHARDS_OPEN = 256  # each holds a file descriptor, of which a process often has no more than 1,024


class EncodeProfiles(Stage):
    """Encodes a shard of the users table by an artifact's vocabularies."""

    name = "export_ctr"

    def __init__(self, folder: str) -> None:
        """folder: of the artifact, with its vocabularies."""
        self.folder = folder

    def run(self, work: Work) -> Result:
        """Writes the shard's one file."""
        profile = read_vocabularies(work.workspace, self.folder).profile
        users = work.workspace.read_shard("users", work.shard.number, ["user_id", *profile]).sort_by("user_id")
        columns = {name: value_codes(users[name], values) for name, values in profile.items()}
        table = pa.table({"user_id": users["user_id"], **{f"profile/{name}": codes for name, codes in columns.items()}})
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


class Profiles:
    """All users' profiles on disk."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        """folder: of the shards, as many as the users had when they were written.

        Raises WorkspaceError where shards are missing, or the first one is damaged.
        """
        self._workspace, self._folder = workspace, folder
        self._n_shards = len(workspace.names(folder))
        if self._n_shards == 0 or self._n_shards & (self._n_shards - 1):
            raise WorkspaceError(
                f"{workspace.path(folder)} holds {self._n_shards} shards of users, and not a power of two: some are "
                "missing. Run `export_ctr` again."
            )
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._shard(0)

    def find(self, user_id: int) -> np.ndarray | None:
        """A user's codes, int32 [fields]; None for a user who is not there."""
        ids, codes = self._shard(int(shard_of(np.array([user_id]), self._n_shards)[0]))
        row = int(rows_of(ids, np.array([user_id]))[0])
        return None if row < 0 else np.array([column[row] for column in codes], dtype=np.int32)

    def _open(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        table = self._workspace.map_arrow(f"{self._folder}/{shard_file(number, '.arrow')}")
        ids, *codes = (column.to_numpy() for column in table.columns)
        return ids, codes


# ------------------------------------------------------------------------------------------------------------- artifact


MODELS = "models"
PROGRAM = "program.pt2"
# The sources whose vectors a release holds. Metadata is a control, and shuffled knowledge is another.
RELEASED = ("none", "knowledge", "collective", "both", "streaming")


def artifact_folder(grid: str, trial: Trial) -> str:
    """Where the artifact of a trial lives, relative to the workspace."""
    return f"{MODELS}/{grid[:16]}-{trial.path.replace('/', '-')}"


def read_by(workspace: Workspace, trial: Trial, folders: Mapping[str, Mapping[str, str]]) -> Reads | None:
    """What a trial's model was given, and must be given where it serves; None where that is nothing.

    folders: source -> side -> the folder of the vectors that the trial read.
    """
    sources, (_, form) = arm_sources(trial.arm, folders), arm_parts(trial.arm)
    if not sources.user:
        return None
    codebooks = {}
    shards = {
        kind: VectorShards(workspace, folders[sources.user[0]][kind], f"{sources.user[0]}-{kind}")
        for kind in ("user", "item")
    }
    for kind, of_kind in shards.items() if form != "vectors" else ():
        quantiser = of_kind.quantiser()
        codebooks[kind] = quantiser.fingerprint if quantiser else ""
    first = next((s for n in shards["item"].numbers if (s := shards["item"].shard(n)) is not None), None)
    return Reads(user=sources.user, item=sources.item, encoder=first.encoder if first else "", codebooks=codebooks)


def write_artifact(
    workspace: Workspace,
    grid: str,
    trial: Trial,
    items: ItemFeatures,
    *,
    projection: str | None = None,
    pool: Pool | None = None,
) -> str:
    """Writes all but the program, and model.json (`finish_artifact`), into `artifact_folder`, which it returns; an
    interrupted one goes on.

    grid: the fingerprint of the grid whose trial this is. items: of the whole items table. projection: the folder of
    the projection that made the vectors that the trial read, None where they are the encoder's.
    """
    folder, source = artifact_folder(grid, trial), f"{grid_folder(grid)}/{trial.path}"
    if workspace.exists(folder, "model.json"):
        workspace.delete_dir(folder)
    for name in ("spec.json", "model.safetensors"):
        workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{source}/{name}"))
    workspace.write_bytes(f"{folder}/{VOCABULARIES}", workspace.read_bytes(f"{grid_folder(grid)}/{VOCABULARIES}"))
    write_items(workspace, folder, items)
    for name in workspace.names(projection) if projection else ():
        if name.startswith("projection."):
            workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{projection}/{name}"))
    if read_vocabularies(workspace, folder).profile:
        shards = [Shard(PROFILES, number) for number in workspace.table_shards("users")]
        run_stage(workspace, EncodeProfiles(folder), dict.fromkeys(shards, fingerprint(grid, trial)), pool)
    return folder


# -------------------------------------------------------------------------------------------------------------- scoring
# Scores one user's candidates by an exported artifact, as the trainer would have scored them.
#
# Nobody is refused: a user or an item that nothing is known of gets what training left for the unknown (an empty
# history, the code of unknown values, the adaptor's default). An item that came after the export has no code of its
# own, but ranks by its text. A user may come by id, with the behaviors that the release holds, or bring newer ones. The
# user's side is computed once a request, whatever the number of candidates.


# -------------------------------------------------------------------------------------------------------------- program
# A trained model as a `torch.export` program that scores one user's candidates: its runtime needs none of our classes.
#
# It reads the tensors of a `Batch` by their names, the user's part in one row, and what the adaptor made of the
# knowledge in place of the knowledge itself; the number of candidates is free. Weights are inside.


Program = Callable[[dict[str, Tensor]], Tensor]  # request_tensors -> float64 [n], probabilities


def request_tensors(batch: Batch) -> dict[str, Tensor]:
    """What a program reads of a batch: its tensors by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def export_program(model: CTRModel, example: Batch) -> bytes:
    """The program of a model, as `load_program` reads it.

    example: candidates of one user, at least two, adapted where the model has an adaptor; history, ratings and profile
    in one row.
    """
    request = _Request(model).eval()
    tensors = request_tensors(example)
    n = len(example.items)
    candidates = torch.export.Dim("candidates", min=1)
    shapes = {name: {0: candidates} if len(tensor) == n else {} for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its tracing
        program = torch.export.export(request, (tensors,), dynamic_shapes=(shapes,), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
    return file.getvalue()


def load_program(data: bytes) -> Program:
    """What `export_program` wrote."""
    module: Program = torch.export.load(io.BytesIO(data)).module()
    return module


class _Request(nn.Module):
    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = copy.copy(model)
        self.model._modules = {**model._modules, "adaptor": None, "code_fields": None}  # what they make is given

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {**tensors}
        logits: Tensor = self.model(Batch(**given))
        return logits.double().sigmoid()


# ----------------------------------------------------------------------------------------------------------------- live
# What changes under a trained model: the fields that it makes of the knowledge of users and items, and what users did.
#
# An artifact holds weights; vectors, semantic ids and behaviors are read when a request comes, from the current
# release. Items recur in requests, and users in sessions, so what the model makes of them is kept as long as it stays
# the same.


_HELD_BYTES = 1 << 26  # of a kind's fields in a process: half a million ids of 32 numbers
_NO_ID = -1  # ids are not negative


class BehaviorStore(Protocol):
    """Where the behaviors of users come from."""

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """The last behaviors of users, oldest first: schema.BEHAVIOR [k] each."""


class Store(BehaviorStore, Protocol):
    """What is read of a release (owlrec.releases.KnowledgeStore)."""

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of the newest n partitions of each id: float32 [m, n, d], and bool [m, n]."""

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """The semantic ids, their duplicate digit last."""

    def facets(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The cohorts of each id, and those of users by what they disliked."""


@dataclass(frozen=True)
class SideKnowledge:
    """The knowledge of n users or items, in the form that a model was trained on."""

    vectors: np.ndarray  # float [n, s, d], one a source; d = 0 where only codes are read
    mask: np.ndarray  # bool [n, s]
    codes: np.ndarray  # int64 [n, levels]: see VectorTable.gather_codes


class KnowledgeSource(Protocol):
    """Where a model's knowledge comes from."""

    def gather(self, kind: str, ids: np.ndarray) -> SideKnowledge:
        """That of users or items, aligned with ids: int64 [n]."""


@dataclass(frozen=True)
class StoreKnowledge:
    """The knowledge of a release, brought into the form that training read."""

    store: Store
    reads: Reads
    form: Form
    projection: Projection | None  # that the vectors were reduced by
    levels: int  # of the semantic ids

    def gather(self, kind: str, ids: np.ndarray) -> SideKnowledge:
        """See KnowledgeSource. Only what stands under an id itself, as in training: no cohort stands in for it, except
        as a source of its own.
        """
        n, sources = len(ids), self.reads.sources(kind)
        vectors, mask = np.zeros((n, len(sources), 0), np.float32), np.zeros((n, len(sources)), bool)
        codes = np.zeros((n, self.levels), dtype=np.int64)
        if self.form != "codes":
            vectors, mask = self._vectors(kind, ids, sources)
        if self.form != "vectors":
            for row, own in enumerate(self.store.own_codes(kind, ids)):
                if own:
                    codes[row] = np.array(own[:-1]) + 1
        return SideKnowledge(vectors, mask, codes)

    def _vectors(self, kind: str, ids: np.ndarray, sources: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        slots = {source: number for number, source in enumerate(("knowledge", *OLDER_PARTITIONS))}
        wanted = [slots[source] for source in sources if source in slots]
        gathered: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        own, there = self.store.own_vectors(kind, ids, 1 + max(wanted)) if wanted else (None, None)
        for source in sources:
            if own is not None and there is not None and source in slots:
                gathered.append(own[:, slots[source]])
                masks.append(there[:, slots[source]])
            else:
                vectors, known = self._of_members(kind, ids, facet=int(source == DISLIKED))
                gathered.append(vectors)
                masks.append(known)
        vectors, mask = np.stack(gathered, axis=1), np.stack(masks, axis=1)
        if self.projection is None:
            return vectors, mask
        # Training read them in half precision.
        reduced = self.projection.apply(vectors.reshape(-1, vectors.shape[2])).astype(np.float16).astype(np.float32)
        return reduced.reshape(*mask.shape, -1), mask

    def _of_members(self, kind: str, ids: np.ndarray, facet: int) -> tuple[np.ndarray, np.ndarray]:
        """The means of cohorts' vectors, as `encode` makes them, and who has one. facet: 1 of what users disliked."""
        groups = [facets[facet] for facets in self.store.facets(kind, ids)]
        cohorts, at = np.unique(np.array([c for group in groups for c in group], np.int64), return_inverse=True)
        vectors, known = self.store.own_vectors("cohort", cohorts, 1)
        member = np.repeat(np.arange(len(ids)), [len(group) for group in groups])[known[at, 0]]
        total = np.zeros((len(ids), vectors.shape[2]), dtype=np.float32)
        np.add.at(total, member, vectors[at[known[at, 0]], 0])
        return unit(total).astype(np.float16).astype(np.float32), np.bincount(member, minlength=len(ids)) > 0


@dataclass(frozen=True)
class TableKnowledge:
    """The vectors that a trial was trained on, as a sample of some moment read them."""

    tables: Tables
    before: int | None = None  # ms: only what is strictly earlier; None: the newest

    def gather(self, kind: str, ids: np.ndarray) -> SideKnowledge:
        """See KnowledgeSource."""
        tables = self.tables.users if kind == "user" else self.tables.items
        vectors, mask = np.zeros((len(ids), len(tables), 0), np.float32), np.zeros((len(ids), len(tables)), bool)
        codes = np.zeros((len(ids), 0), dtype=np.int64)
        before = None if self.before is None else np.full(len(ids), self.before)
        if self.tables.form != "codes":
            pairs = [table.gather(ids, before) for table in tables]
            vectors, mask = (np.stack(arrays, axis=1) for arrays in zip(*pairs, strict=True))
        if self.tables.form != "vectors":
            codes = tables[0].gather_codes(ids, before)
        return SideKnowledge(vectors, mask, codes)


class FieldCache:
    """Fields of ids, float32 [width] each, as many as there is room for; the first that came go first. Threads may
    share it.
    """

    def __init__(self, width: int, held_bytes: int = _HELD_BYTES) -> None:
        self._fields = np.empty((max(1, held_bytes // (4 * width)), width), dtype=np.float32)
        self._ids = np.full(len(self._fields), _NO_ID, dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, ids: np.ndarray, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float32 [n, width]. make: gives the fields of ids that are not held: int64 [k] -> float32 [k, width]."""
        with self._lock:
            rows = np.fromiter((self._rows.get(id_, -1) for id_ in ids.tolist()), np.int64, len(ids))
            fields: np.ndarray = self._fields[rows]
        if len(ids) == 1 and rows[0] < 0:  # a user
            fields = make(ids)
            self._keep(ids, fields)
        if len(ids) == 1 or (rows >= 0).all():
            return fields
        missing, at = np.unique(ids[rows < 0], return_inverse=True)
        made = make(missing)
        fields[rows < 0] = made[at]
        self._keep(missing, made)
        return fields

    def without(self, ids: np.ndarray) -> "FieldCache":
        """A copy that has forgotten some ids."""
        copy = FieldCache(self._fields.shape[1], self._fields.nbytes)
        with self._lock:  # for some milliseconds: requests wait for it
            held = np.array(list(self._rows.values()), dtype=np.int64)
            kept, fields = self._ids[held], self._fields[held]
        same = np.flatnonzero(~np.isin(kept, ids))
        n = len(same)
        copy._ids[:n], copy._fields[:n] = kept[same], fields[same]
        copy._rows = dict(zip(kept[same].tolist(), range(n), strict=True))
        copy._next = n % len(copy._ids)
        return copy

    def _keep(self, ids: np.ndarray, fields: np.ndarray) -> None:
        with self._lock:
            for id_, of_id in zip(ids.tolist()[: len(self._ids)], fields, strict=False):
                if id_ in self._rows:
                    continue
                self._rows.pop(int(self._ids[self._next]), None)
                self._ids[self._next], self._fields[self._next], self._rows[id_] = id_, of_id, self._next
                self._next = (self._next + 1) % len(self._ids)


class LiveState:
    """What a model is given of users and items at this moment. Threads may share it."""

    def __init__(
        self,
        model: CTRModel,
        knowledge: KnowledgeSource | None,
        store: BehaviorStore | None = None,
        held: Mapping[str, FieldCache] | None = None,
    ) -> None:
        """knowledge: None where the model reads none. store: where behaviors come from; None: nobody has any.
        held: by kind, fields that are known to be the same here.
        """
        self.model, self._knowledge, self._store = model, knowledge, store
        width = max(1, model.spec.knowledge_fields // 2 * model.spec.embed_dim)
        self.held = {kind: (held or {}).get(kind) or FieldCache(width) for kind in ("user", "item")}
        adaptor = model.adaptor
        towers = {"user": adaptor.user, "item": adaptor.item} if adaptor else {}
        self._towers = {kind: TrainedTower(tower, adaptor.shared) for kind, tower in towers.items() if adaptor}
        self._nobody = None if knowledge is None else self._made("user", np.array([_NO_ID]))

    def behaviors(self, user_id: int) -> np.ndarray | None:
        """What the user did last, oldest first: schema.BEHAVIOR [k]; None where nothing is known."""
        return self._store.behaviors([user_id])[0] if self._store else None

    def fields(self, kind: str, ids: np.ndarray) -> np.ndarray:
        """What the model makes of the knowledge of users or items: float32 [n, w], an id's fields in a row.

        ids: int64 [n]. Only for a model that reads knowledge.
        """
        return self.held[kind].gather(ids, lambda missing: self._made(kind, missing))

    def adapted(self, user_id: int | None, items: np.ndarray) -> torch.Tensor | None:
        """Batch.adapted of one user's candidates; None where the model reads no knowledge. items: int64 [n]."""
        if self._nobody is None:
            return None
        user = self._nobody if user_id is None else self.fields("user", np.array([user_id]))
        fields = self.fields("item", items)
        both = np.concatenate([np.broadcast_to(user, fields.shape), fields], axis=1)
        return torch.from_numpy(both).unflatten(1, (self.model.spec.knowledge_fields, -1))

    def _made(self, kind: str, ids: np.ndarray) -> np.ndarray:
        assert self._knowledge is not None
        known = self._knowledge.gather(kind, ids)
        with torch.inference_mode():
            forms: list[torch.Tensor] = []
            if self._towers:
                vectors = torch.from_numpy(np.asarray(known.vectors, dtype=np.float32))
                forms.append(self._towers[kind](vectors, torch.from_numpy(known.mask)))
            if self.model.code_fields is not None:
                codes = self.model.code_fields.user if kind == "user" else self.model.code_fields.item
                forms.append(codes(torch.from_numpy(known.codes)))
            made: np.ndarray = torch.cat(forms, dim=1).numpy()
        return made


# -------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class User:
    """Who asks. What is None is taken from the live state, which knows nothing of those without an id."""

    user_id: int | None = None
    history: Sequence[int] | None = None  # item ids, most recent last
    ratings: Sequence[float | None] | None = None  # aligned with history; None: without ratings
    taken: Sequence[bool] | None = None  # aligned with history: False of what was passed over; None: all was taken
    profile: Mapping[str, str] = field(default_factory=dict)  # what it names takes the place of what is known

    @classmethod
    def of_sample(cls, row: Mapping[str, Any]) -> "User":
        """Who a row of schema.SAMPLES is about, at its moment."""
        ratings, labels = row["history_ratings"], row["history_labels"]
        return cls(row["user_id"], row["history"], ratings, list(map(was_taken, ratings, labels)))

    def behaviors(self) -> np.ndarray:
        """The history that they bring: schema.BEHAVIOR [n], without moments.

        Raises SchemaError where the history and its ratings differ in length.
        """
        history = list(self.history or ())
        ratings = [None] * len(history) if self.ratings is None else list(self.ratings)
        took = [True] * len(history) if self.taken is None else list(self.taken)
        if not len(ratings) == len(took) == len(history):
            raise SchemaError(
                f"a user comes with {len(history)} behaviors, {len(ratings)} ratings and {len(took)} outcomes. Give a "
                f"rating or null each, or no ratings at all."
            )
        behaviors = np.zeros(len(history), dtype=BEHAVIOR)
        behaviors["item"], behaviors["label"] = history, took
        behaviors["rating"] = np.array(ratings, dtype=np.float32)  # None becomes NaN
        return behaviors


class CtrScorer:
    """An artifact in memory. Threads may share it: it changes nothing after it was opened."""

    def __init__(
        self,
        model: CTRModel,
        items: ItemFeatures,
        vocabularies: Vocabularies,
        profiles: Profiles | None = None,
        program: Program | None = None,
    ) -> None:
        """profiles: None where the model reads none. program: scores in the model's place."""
        self.model, self.items, self.vocabularies = model.eval(), items, vocabularies
        self.profiles, self.program = profiles, program
        self._length = model.spec.features.history_length
        self._codes = [
            {value: code for code, value in enumerate(values.to_pylist(), RESERVED)}
            for values in vocabularies.profile.values()
        ]

    @classmethod
    def open(cls, workspace: Workspace, folder: str, *, program: bool = False) -> "CtrScorer":
        """An artifact, which may still lack its card. program: by its torch.export program, not by the model that our
        classes build.

        Raises WorkspaceError where the folder holds none, or where it is damaged.
        """
        items, _ = read_items(workspace, folder)
        vocabularies = read_vocabularies(workspace, folder)
        return cls(
            load_trial(workspace, folder, items),
            items,
            vocabularies,
            Profiles(workspace, f"{folder}/{PROFILES}") if vocabularies.profile else None,
            load_program(workspace.read_bytes(f"{folder}/{PROGRAM}")) if program else None,
        )

    def score(self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState) -> np.ndarray:
        """float64 [n]: the probability of a click (or of the label that the recipe defines), in the candidates' order.

        user: an id, or a User. candidates: item ids, repeats allowed. live: of this scorer's model. Raises SchemaError
        where a history and its ratings differ in length.
        """
        if len(candidates) == 0:
            return np.zeros(0)
        batch = self.batch(user, candidates, live)
        with torch.inference_mode():
            if self.program is not None:
                scores: Tensor = self.program(request_tensors(batch))
            else:
                scores = self.model(batch).double().sigmoid()
        return scores.numpy()

    def batch(self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState) -> Batch:
        """What the model reads for a request: n candidates, the user's part in one row."""
        asking = user if isinstance(user, User) else User(int(user))
        ids = np.asarray(candidates, dtype=np.int64)
        arrays = (self.items.rows(ids), *self._history(asking, live), self._profile(asking))
        items, history, ratings, profile = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
        return Batch(items, history, ratings, profile, adapted=live.adapted(asking.user_id, ids))

    def _history(self, user: User, live: LiveState) -> tuple[np.ndarray, np.ndarray]:
        """Items and outcomes as training encodes them, int [1, history_length] each."""
        behaviors: np.ndarray | None
        if user.history is not None:
            behaviors = user.behaviors()
        else:
            behaviors = None if user.user_id is None else live.behaviors(user.user_id)
        items, outcomes = (np.zeros((1, self._length), dtype=np.int64) for _ in range(2))
        if behaviors is not None and len(behaviors):
            last = behaviors[-self._length :]
            items[0, : len(last)] = self.items.rows(last["item"])
            outcomes[0, : len(last)] = self.vocabularies.grades.tokens(last["rating"].astype(float), last["label"])
        return items, outcomes

    def _profile(self, user: User) -> np.ndarray:
        """int [1, profile fields]."""
        known = self.profiles.find(user.user_id) if self.profiles and user.user_id is not None else None
        codes = np.full(len(self._codes), UNKNOWN) if known is None else known
        told = [
            field_codes.get(user.profile[name], UNKNOWN) if name in user.profile else code
            for name, field_codes, code in zip(self.vocabularies.profile, self._codes, codes.tolist(), strict=True)
        ]
        return np.array([told], dtype=np.int64).reshape(1, -1)


@dataclass(frozen=True)
class CtrArtifact:
    """A finished artifact: what scores, and what says which releases it may read."""

    scorer: CtrScorer
    card: ModelCard
    projection: Projection | None

    @classmethod
    def open(cls, workspace: Workspace, folder: str) -> "CtrArtifact":
        """Raises WorkspaceError where the folder holds no finished artifact, or where it is damaged."""
        card = read_card(workspace, folder)
        reduced = workspace.exists(folder, "projection.json")
        projection = Projection.load(workspace, folder, card.grid) if reduced else None
        return cls(CtrScorer.open(workspace, folder), card, projection)

    def over(self, store: Store, *, dim: int, held: Mapping[str, FieldCache] | None = None) -> LiveState:
        """What its model reads of a release, which must have passed `Reads.refuse_other`.

        dim: components of the release's vectors. held: by kind, fields that are known to be the same there.
        Raises SchemaError for vectors of another length than the model was trained on.
        """
        model, reads = self.scorer.model, self.card.reads
        if reads is None:
            return LiveState(model, None, store, held)
        form = arm_parts(self.card.trial.arm)[1]
        trained_on = len(self.projection.centre) if self.projection else model.spec.knowledge_dim
        if form != "codes" and dim != trained_on:
            raise SchemaError(
                f"the release's vectors have {dim} components, but the model was trained on {trained_on}. Train and "
                "export again on its vectors."
            )
        levels = len(model.spec.user_codes)
        return LiveState(model, StoreKnowledge(store, reads, form, self.projection, levels), store, held)


# --------------------------------------------------------------------------------------------------------------- parity
# Whether an artifact scores as the trainer did: the trainer's own test scores, asked for again one request at a time.
#
# Each row becomes a request of its user, who brings the history that the sample had. Everything between the two is
# thereby compared: the encoding of features, the fields of knowledge, the model's one-user path, the program.


TOLERANCE = 1e-5  # in probability; float32 sums in another order differ by some 1e-7


def largest_difference(
    scorer: CtrScorer, tables: Tables | None, workspace: Workspace, grid: str, trial: Trial, *, rows: int = 200
) -> float:
    """Over `rows` test samples, evenly spaced over the first shards: the largest difference in probability from what
    the trial scored.

    tables: that the trial read. Raises WorkspaceError where the trial left no test scores, or of other
    samples than the workspace has.
    """
    scored = read_grid_scores(workspace, grid, [trial])
    shards, n = [], 0
    for number in workspace.table_shards("samples"):
        samples = read_samples(workspace, number)
        shards.append(samples.filter(pc.equal(samples["split"], "test")))
        n += len(shards[-1])
        if n >= rows:
            break
    samples = pa.concat_tables(shards)
    read_all = len(shards) == len(workspace.table_shards("samples"))
    if (
        scored is None
        or not np.array_equal(scored.user_ids[:n], samples["user_id"].to_numpy())
        or (read_all and n != len(scored.user_ids))
    ):
        raise WorkspaceError(
            f"{workspace.root}: the test scores of {trial.path} are missing, or of other samples than `prepare` wrote "
            f"last. Run `train_ctr` again."
        )
    chosen = np.unique(np.linspace(0, n - 1, rows).astype(np.int64))
    ours = []
    for row in samples.take(chosen).to_pylist():
        # A sample reads what was known before it, each in a state of its own.
        known = TableKnowledge(tables, row["timestamp"]) if tables else None
        ours.append(scorer.score(User.of_sample(row), [row["item_id"]], LiveState(scorer.model, known))[0])
    return float(np.abs(np.array(ours) - scored.scores[trial.path][chosen]).max())
