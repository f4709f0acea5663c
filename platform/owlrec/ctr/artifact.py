"""The artifact of a trained model: the folder that a serving process opens, and scores by it."""

import copy
import io
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from time import time as now
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from owlrec.cohorts.clustering import unit
from owlrec.ctr.batches import Tables
from owlrec.ctr.experiment import Metrics, Trial, grid_folder, read_grid_scores
from owlrec.ctr.features import (
    PADDING,
    RESERVED,
    TIMES,
    UNKNOWN,
    USER_ID,
    Field,
    ItemFeatures,
    Vocabularies,
    encode_fields,
    field_codes,
    field_numbers,
    liked,
)
from owlrec.ctr.knowledge_tables import (
    DISLIKED,
    OLDER_PARTITIONS,
    Form,
    arm_parts,
    arm_sources,
    similarity_features,
)
from owlrec.ctr.model import Batch, CTRModel, Tower, TrainedTowers
from owlrec.ctr.trainer import VOCABULARIES, load_trial, read_items, read_vocabularies, write_items
from owlrec.encoding.compression import Projection, unit_rows
from owlrec.encoding.vectors import VectorShards
from owlrec.errors import ReleaseError, SchemaError, WorkspaceError
from owlrec.ids import BEHAVIOR, EVENTS, rows_of, shard_of
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import SAMPLES
from owlrec.shards import Shard
from owlrec.sources.outcomes import was_taken
from owlrec.sources.splits import read_samples
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# ------------------------------------------------------------------------------------------------------------- artifact
# The exported model's folder, which a serving process opens; `CtrScorer` reads it.
#
#     spec.json, model.safetensors   the trained trial, including its adaptor
#     vocabularies.parquet           maps values to codes
#     items.safetensors              the item table's ids and codes
#     profiles/                      by shard, each user's profile as codes, if the model reads any
#     projection.*                   projection of the encoder's vectors, if the model reads reduced ones
#     program.pt2                    the backbone as a torch.export program
#     cards/                         cards of finished shards, so an interrupted export resumes
#     model.json                     the model's description and the vectors it needs; written last
#
# The folder contains no texts or behaviors: those come from the current release, so scores follow each
# refresh. JSON, Arrow and safetensors only, no pickle.


# ----------------------------------------------------------------------------------------------------------- model card
# model.json of an artifact, written last. Read without torch, so programs that only need it start fast.


AGAIN = "Run `owlrec ctr export` again."


class Reads(BaseModel):
    """The knowledge that a model was trained on. Numbers from other encoders and codebooks would mean something
    else.
    """

    user: tuple[str, ...]  # sources, in the order of the adaptor's slots
    item: tuple[str, ...]
    encoder: str  # EncoderConfig.identity
    codebooks: dict[str, str]  # by kind, fingerprints of the codebooks it reads

    def sources(self, kind: str) -> tuple[str, ...]:
        """Sources of users or items."""
        return self.user if kind == "user" else self.item

    def refuse_other(self, release: str, encoder: str, codebooks: Mapping[str, str]) -> None:
        """Raises ReleaseError if a release has vectors of another encoder, or codes of other codebooks.

        encoder, codebooks: of the release.
        """
        again = "Train and export again on its vectors, or roll back to a release with the model's encoder."
        if encoder != self.encoder:
            raise ReleaseError(
                f"release {release} has vectors of encoder '{encoder}', but the model was trained with "
                f"'{self.encoder}'. {again}"
            )
        for kind, codebook in self.codebooks.items():
            if codebooks.get(kind, "") != codebook:
                raise ReleaseError(
                    f"release {release} has {kind} codes of codebooks {codebooks.get(kind, '')[:8] or 'none'}, "
                    f"but the model was trained with {codebook[:8]}. {again}"
                )


class ModelCard(BaseModel):
    """model.json: description of an artifact, with its scores before the export."""

    trial: Trial
    grid: str  # fingerprint
    items: int
    reads: Reads | None  # None for arm "none"
    valid: Metrics
    test: Metrics


def finish_artifact(workspace: Workspace, folder: str, card: ModelCard) -> None:
    """Completes an artifact; a scorer opens only complete ones."""
    workspace.write_json(f"{folder}/model.json", card.model_dump(mode="json"))


def read_card(workspace: Workspace, folder: str) -> ModelCard:
    """Raises WorkspaceError if the folder has no finished artifact."""
    if not workspace.exists(folder, "model.json"):
        raise WorkspaceError(
            f"{workspace.path(folder)}: there is no finished artifact. Run `owlrec ctr export`; it prints the folder."
        )
    try:
        return ModelCard.model_validate(workspace.read_json(f"{folder}/model.json"))
    except ValidationError as error:
        raise WorkspaceError(f"{workspace.path(folder)}: model.json has an unknown format ({error}). {AGAIN}") from None


# ------------------------------------------------------------------------------------------------------------- profiles
# Each user's profile as codes, in mapped shards; only artifacts whose model reads profiles have it.
#
# At 10^8 users, a lookup is one binary search in one file, and the replicas of a machine share the page cache.


PROFILES = "profiles"
_SHARDS_OPEN = 256  # each holds a file descriptor; processes are often limited to 1,024


class EncodeProfiles(Stage):
    """Encodes a shard of the users table with an artifact's vocabularies: per user, codes and numbers of all fields."""

    name = "export_ctr"

    def __init__(self, folder: str) -> None:
        """folder: the artifact's, with its vocabularies."""
        self.folder = folder

    def run(self, work: Work) -> Result:
        """Writes the shard's only file."""
        vocabularies = read_vocabularies(work.workspace, self.folder)
        fields = vocabularies.fields.users
        names = list(dict.fromkeys(["user_id", *(field.column for field in fields)]))
        users = work.workspace.read_shard("users", work.shard.number, names)
        users = users.take(pc.sort_indices(users["user_id"]))
        codes, numbers = encode_fields(fields, lambda field: users[field.column], vocabularies.values, len(users))
        columns = {f"code/{at}": column for at, column in enumerate(codes.reshape(len(users), -1).T)}
        columns |= {f"number/{at}": column for at, column in enumerate(numbers.T)}
        table = pa.table({"user_id": users["user_id"], **columns})
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


class Profiles:
    """All users' profiles on disk."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        """folder: of the shards, one per user shard at the time of export.

        Raises WorkspaceError if shards are missing or the first one is damaged.
        """
        self._workspace, self._folder = workspace, folder
        self._n_shards = len(workspace.names(folder))
        if self._n_shards == 0 or self._n_shards & (self._n_shards - 1):
            raise WorkspaceError(
                f"{workspace.path(folder)} has {self._n_shards} user shards, which is not a power of two: some "
                "are missing. Run `export_ctr` again."
            )
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._shard(0)

    def find(self, user_id: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A user's codes, int32 [coded fields * width], and numbers, float32 [log fields]; None for an unknown user."""
        ids, codes, numbers = self._shard(int(shard_of(np.array([user_id]), self._n_shards)[0]))
        row = int(rows_of(ids, np.array([user_id]))[0])
        if row < 0:
            return None
        own = (np.array([column[row] for column in columns]) for columns in (codes, numbers))
        return next(own).astype(np.int32), next(own).astype(np.float32)

    def _open(self, number: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        table = self._workspace.map_arrow(f"{self._folder}/{shard_file(number, '.arrow')}")
        kinds = ([table[n].to_numpy() for n in table.column_names if n.startswith(k)] for k in ("code/", "number/"))
        return table["user_id"].to_numpy(), next(kinds), next(kinds)


# ------------------------------------------------------------------------------------------------------------- artifact


MODELS = "models"
PROGRAM = "program.pt2"
# The sources whose vectors a release has. Metadata and shuffled knowledge are controls.
RELEASED = ("knowledge", *OLDER_PARTITIONS, "collective", DISLIKED)


def artifact_folder(grid: str, trial: Trial) -> str:
    """Folder of a trial's artifact, relative to the workspace."""
    return f"{MODELS}/{grid[:16]}-{trial.path.replace('/', '-')}"


def read_by(workspace: Workspace, trial: Trial, folders: Mapping[str, Mapping[str, str]]) -> Reads | None:
    """The inputs of a trial's model, which it also needs in serving; None if there are none.

    folders: source -> kind -> folder of the vectors that the trial read.
    """
    sources, form = arm_sources(trial.arm, folders, trial.own), arm_parts(trial.arm).form
    if not sources.user and not sources.item:
        return None
    codebooks = {}
    shards = {
        kind: VectorShards(workspace, folders[read[0]][kind], f"{read[0]}-{kind}")
        for kind, read in (("user", sources.user), ("item", sources.item))
        if read
    }
    for kind, kind_shards in shards.items() if form != "vectors" else ():
        quantizer = kind_shards.quantizer()
        codebooks[kind] = quantizer.fingerprint if quantizer else ""
    encoded = list(shards.values())[-1]
    first = next((s for n in encoded.numbers if (s := encoded.shard(n)) is not None), None)
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
    """Writes everything but the program and model.json (`finish_artifact`) into `artifact_folder`, which it returns.
    Resumes if interrupted.

    grid: fingerprint of the trial's grid. items: the whole items table. projection: folder of
    the projection of the trial's vectors, or None if they are the encoder's own.
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
    if read_vocabularies(workspace, folder).fields.users:
        shards = [Shard(PROFILES, number) for number in workspace.table_shards("users")]
        run_stage(workspace, EncodeProfiles(folder), dict.fromkeys(shards, fingerprint(grid, trial)), pool)
    return folder


# -------------------------------------------------------------------------------------------------------------- scoring
# Scores one user's candidates with an exported artifact, exactly as the trainer would.
#
# Nobody is refused: unknown users and items get the trained defaults (an empty history,
# the code of unknown values, the adaptor's default). An item added after the export has no code of its own, but ranks
# by its text. A request may name a user by id, with the release's behaviors, or bring newer ones. The user's side is
# computed once per request for any number of candidates.


# -------------------------------------------------------------------------------------------------------------- program
# A trained model as a `torch.export` program that scores one user's candidates: its runtime needs none of our classes.
#
# It reads the tensors of a `Batch` by name, with one row for the user's part, and the adaptor's output
# instead of the knowledge; the number of candidates is free. It contains the weights.


Program = Callable[[dict[str, Tensor]], Tensor]  # request_tensors -> float64 [n], probabilities


def request_tensors(batch: Batch) -> dict[str, Tensor]:
    """Inputs of a program from a batch: its tensors by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def export_program(model: CTRModel, example: Batch) -> bytes:
    """Program of a model, in the form that `load_program` reads.

    example: candidates of one user, at least two, with the adaptor's output if the model has one; all else has one row.
    """
    request = _Request(model).eval()
    tensors = request_tensors(example)
    n = len(example.items)
    candidates = torch.export.Dim("candidates", min=1)
    shapes = {name: {0: candidates} if len(tensor) == n else {} for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warnings about tracing
        program = torch.export.export(request, (tensors,), dynamic_shapes=(shapes,), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
    return file.getvalue()


def load_program(data: bytes) -> Program:
    """Loads the output of `export_program`."""
    module: Program = torch.export.load(io.BytesIO(data)).module()
    return module


class _Request(nn.Module):
    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = copy.copy(model)
        # Their output is an input.
        self.model._modules = {**model._modules, "adaptor": None, "user_prefixes": None}

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {**tensors}
        logits: Tensor = self.model(Batch(**given))
        return logits.double().sigmoid()


# ----------------------------------------------------------------------------------------------------------------- live
# Inputs that change under a trained model: the fields it computes from knowledge, and users' behaviors.
#
# An artifact has weights; vectors, semantic ids and behaviors are read from the current
# release at request time. Items repeat across requests, and users within sessions, so computed fields are cached as
# long as they stay the same.


_HELD_BYTES = 1 << 26  # cache size per kind and process: half a million ids of 32 numbers
_NO_ID = -1  # ids are not negative


class BehaviorReader(Protocol):
    """Source of users' behaviors."""

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """Latest behaviors of users, oldest first: ids.BEHAVIOR [k] each."""


class ReleaseReader(BehaviorReader, Protocol):
    """The parts of a release that scoring reads (owlrec.releases.KnowledgeStore)."""

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the newest n partitions of each id: float32 [m, n, d], and bool [m, n]."""

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """Semantic ids, with the duplicate digit last."""

    def facets(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Cohorts of each id, and for users those by dislikes."""


@dataclass(frozen=True)
class GatheredKnowledge:
    """Knowledge of n users or items, in the form that the model was trained on."""

    vectors: np.ndarray  # float [n, s, d], one per source; d = 0 if only codes are read
    mask: np.ndarray  # bool [n, s]
    codes: np.ndarray  # int64 [n, levels]: see VectorTable.gather_codes


class KnowledgeSource(Protocol):
    """Source of a model's knowledge."""

    def gather(self, kind: str, ids: np.ndarray) -> GatheredKnowledge:
        """Knowledge of users or items, aligned with ids: int64 [n]."""


@dataclass(frozen=True)
class ReleaseKnowledge:
    """Knowledge of a release, in the form of training."""

    store: ReleaseReader
    reads: Reads
    form: Form
    projection: Projection | None  # that reduced the vectors
    levels: Mapping[str, int]  # of the semantic ids, by kind

    def gather(self, kind: str, ids: np.ndarray) -> GatheredKnowledge:
        """See KnowledgeSource. Uses only an id's own knowledge, as in training: cohorts do not replace it, except
        as a separate source.
        """
        n, sources = len(ids), self.reads.sources(kind)
        if not sources:
            return GatheredKnowledge(
                np.zeros((n, 0, 0), np.float32), np.zeros((n, 0), bool), np.zeros((n, 0), np.int64)
            )
        vectors, mask = np.zeros((n, len(sources), 0), np.float32), np.zeros((n, len(sources)), bool)
        codes = np.zeros((n, self.levels[kind]), dtype=np.int64)
        if self.form != "codes":
            vectors, mask = self._vectors(kind, ids, sources)
        if self.form != "vectors":
            for row, own in enumerate(self.store.own_codes(kind, ids)):
                if own:
                    codes[row] = np.array(own[:-1]) + 1
        return GatheredKnowledge(vectors, mask, codes)

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
                vectors, known = self._member_means(kind, ids, facet=int(source == DISLIKED))
                gathered.append(vectors)
                masks.append(known)
        vectors, mask = np.stack(gathered, axis=1), np.stack(masks, axis=1)
        if self.projection is None:
            return vectors, mask
        names = ("knowledge" if source in OLDER_PARTITIONS else source for source in sources)
        reduced = [self.projection.of(f"{n}-{kind}").apply(vectors[:, i]) for i, n in enumerate(names)]
        # Training read them in half precision.
        return np.stack(reduced, axis=1).astype(np.float16).astype(np.float32), mask

    def _member_means(self, kind: str, ids: np.ndarray, facet: int) -> tuple[np.ndarray, np.ndarray]:
        """Means of cohorts' vectors, as in `encode`, and a mask. facet: 1 for dislikes."""
        groups = [facets[facet] for facets in self.store.facets(kind, ids)]
        cohorts, at = np.unique(np.array([c for group in groups for c in group], np.int64), return_inverse=True)
        vectors, known = self.store.own_vectors("cohort", cohorts, 1)
        member = np.repeat(np.arange(len(ids)), [len(group) for group in groups])[known[at, 0]]
        total = np.zeros((len(ids), vectors.shape[2]), dtype=np.float32)
        np.add.at(total, member, vectors[at[known[at, 0]], 0])
        return unit(total).astype(np.float16).astype(np.float32), np.bincount(member, minlength=len(ids)) > 0


@dataclass(frozen=True)
class TableKnowledge:
    """The vectors that a trial was trained on, as a sample at some moment reads them."""

    tables: Tables
    before: int | None = None  # ms: only strictly earlier rows; None: the newest

    def gather(self, kind: str, ids: np.ndarray) -> GatheredKnowledge:
        """See KnowledgeSource."""
        tables = self.tables.users if kind == "user" else self.tables.items
        vectors, mask = np.zeros((len(ids), len(tables), 0), np.float32), np.zeros((len(ids), len(tables)), bool)
        codes = np.zeros((len(ids), 0), dtype=np.int64)
        if not tables:
            return GatheredKnowledge(vectors, mask, codes)
        before = None if self.before is None else np.full(len(ids), self.before)
        if self.tables.form != "codes":
            pairs = [table.gather(ids, before) for table in tables]
            vectors, mask = (np.stack(arrays, axis=1) for arrays in zip(*pairs, strict=True))
        if self.tables.form != "vectors":
            codes = tables[0].gather_codes(ids, before)
        return GatheredKnowledge(vectors, mask, codes)


class FieldCache:
    """Cache of fields by id, float32 [width] each, first in, first out. Threads may
    share it.
    """

    def __init__(self, width: int, held_bytes: int = _HELD_BYTES) -> None:
        # Left unwritten: memory that no id has come to use is not the process's yet.
        self._fields = np.empty((max(1, held_bytes // (4 * width)), width), dtype=np.float32)
        self._ids = np.empty(len(self._fields), dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, ids: np.ndarray, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float32 [n, width]. make: computes the fields of missing ids: int64 [k] -> float32 [k, width]."""
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
        """A copy without some ids."""
        copy = FieldCache(self._fields.shape[1], self._fields.nbytes)
        with self._lock:  # for a few milliseconds, in which requests wait
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
            for id_, id_fields in zip(ids.tolist()[: len(self._ids)], fields, strict=False):
                if id_ in self._rows:
                    continue
                if len(self._rows) == len(self._ids):
                    del self._rows[int(self._ids[self._next])]
                self._ids[self._next], self._fields[self._next], self._rows[id_] = id_, id_fields, self._next
                self._next = (self._next + 1) % len(self._ids)


class LiveState:
    """Current inputs of a model for users and items. Threads may share it.

    Per id it holds the adaptor's fields and, of items, the unit vectors for similarities and the semantic id.
    """

    def __init__(
        self,
        model: CTRModel,
        knowledge: KnowledgeSource | None,
        store: BehaviorReader | None = None,
        held: Mapping[str, FieldCache] | None = None,
    ) -> None:
        """knowledge: None if the model reads none. store: source of behaviors; None: nobody has any.
        held: by kind, fields that are known to be the same in this state.
        """
        self.model, self._knowledge, self._store = model, knowledge, store
        spec = model.spec
        n_sources = spec.item_vector_fields
        self._widths = {
            "user": [spec.user_fields * spec.embed_dim],
            "item": [
                n_sources * spec.embed_dim,
                n_sources * spec.knowledge_dim,
                n_sources,
                len(spec.item_codes),
            ],
        }
        self.held = {kind: (held or {}).get(kind) or FieldCache(max(1, sum(w))) for kind, w in self._widths.items()}
        adaptor = model.adaptor
        towers = {"user": adaptor.user, "item": adaptor.item} if adaptor else {}
        self._towers = {
            kind: TrainedTowers(cast(Sequence[Tower], side), adaptor.shared)
            for kind, side in towers.items()
            if adaptor and len(side)
        }
        width = self._widths["user"][0]
        self._nobody = None if knowledge is None else self._made("user", np.array([_NO_ID]))[:, :width]

    def behaviors(self, user_id: int) -> np.ndarray | None:
        """A user's latest behaviors, oldest first: ids.BEHAVIOR [k]; None if unknown."""
        return self._store.behaviors([user_id])[0] if self._store else None

    def fields(self, kind: str, ids: np.ndarray) -> np.ndarray:
        """The model's fields for the knowledge of users or items: float32 [n, w], an id's fields in a row.

        ids: int64 [n]. Only for a model that reads knowledge.
        """
        return self._parts(kind, ids)[0]

    def inputs(self, user_id: int | None, items: np.ndarray, past: np.ndarray, tokens: np.ndarray) -> dict[str, Tensor]:
        """The fields of a Batch that hold the knowledge of one user's candidates; none for a model that reads none.

        items: int64 [n]; past: int64 [L], items of the user's history, -1 for padding; tokens: int [L], their outcomes.
        """
        if self._nobody is None:
            return {}
        spec, there = self.model.spec, past >= 0
        user = self._nobody if user_id is None else self.fields("user", np.array([user_id]))
        fields, vectors, mask, codes = self._parts("item", np.concatenate([items, past[there]]))
        n = len(items)
        both = np.concatenate([np.broadcast_to(user, (n, user.shape[1])), fields[:n]], axis=1)
        tensors: dict[str, Tensor] = {}
        if both.shape[1]:
            tensors["adaptor_fields"] = torch.from_numpy(both).unflatten(1, (-1, spec.embed_dim))
        if spec.item_vector_fields:
            cosines, known = np.zeros((2, n, len(past), len(spec.item_slots)), dtype=np.float32)
            unit = vectors.reshape(len(vectors), len(spec.item_slots), -1)
            cosines[:, there] = np.einsum("nsd,lsd->nls", unit[:n], unit[n:], optimize=True)
            has = mask > 0
            known[:, there] = has[:n, None] & has[None, n:]
            group = np.broadcast_to(liked(tokens), (n, len(past)))
            each = [
                similarity_features(cosines[..., slot], known[..., slot] > 0, group)
                for slot in range(len(spec.item_slots))
            ]
            tensors["similarities"] = torch.from_numpy(np.concatenate(each, axis=1))
        if spec.item_codes:
            history = np.zeros((1, len(past), len(spec.item_codes)), dtype=np.int64)
            history[0, there] = codes[n:]
            tensors["item_codes"] = torch.from_numpy(codes[:n].astype(np.int64))
            tensors["history_codes"] = torch.from_numpy(history)
        return tensors

    def _parts(self, kind: str, ids: np.ndarray) -> list[np.ndarray]:
        """float32 [n, w] each. Of users: fields of the adaptor, then prefixes. Of items: fields of the adaptor, unit
        vectors, whether there is one, and semantic ids.
        """
        held = self.held[kind].gather(ids, lambda missing: self._made(kind, missing))
        return [held[:, a:b] for a, b in pairwise(np.cumsum([0, *self._widths[kind]]))]

    def _made(self, kind: str, ids: np.ndarray) -> np.ndarray:
        assert self._knowledge is not None
        known = self._knowledge.gather(kind, ids)
        made: list[np.ndarray] = [np.zeros((len(ids), 0), dtype=np.float32)]
        with torch.inference_mode():
            vectors = torch.from_numpy(np.asarray(known.vectors, dtype=np.float32))
            if kind in self._towers:
                made.append(self._towers[kind](vectors, torch.from_numpy(known.mask)).numpy())
            if kind == "user" and self.model.user_prefixes is not None:
                made.append(self.model.user_prefixes(torch.from_numpy(known.codes)).flatten(1).numpy())
        if kind == "item" and self._widths["item"][1]:
            unit = unit_rows(known.vectors.reshape(-1, known.vectors.shape[2])) * known.mask.reshape(-1, 1)
            made += [unit.reshape(len(ids), -1), known.mask.astype(np.float32)]
        if kind == "item" and self._widths["item"][3]:
            made.append(known.codes.astype(np.float32))
        held = np.concatenate(made, axis=1)
        return held if held.shape[1] else np.zeros((len(ids), 1), dtype=np.float32)


# -------------------------------------------------------------------------------------------------------------- scoring


Value = str | int | float | bool | Sequence[str]  # of a feature
EVENT_CODES: dict[str | None, int] = {event: code for code, event in enumerate(EVENTS, 1)}


@dataclass(frozen=True)
class User:
    """The user of a request. Fields that are None come from the live state, which has nothing without an id."""

    user_id: int | None = None
    history: Sequence[int] | None = None  # item ids, most recent last
    ratings: Sequence[float | None] | None = None  # aligned with history; None: without ratings
    taken: Sequence[bool] | None = None  # aligned with history: False for passed-over items; None: all taken
    events: Sequence[str | None] | None = None  # aligned with history: outcomes.EVENTS; None: unknown
    profile: Mapping[str, Value] = field(default_factory=dict)  # overrides stored features of the user
    context: Mapping[str, Value] = field(default_factory=dict)  # features of the interaction, for all candidates
    time: int | None = None  # ms since 1970, UTC: of features hour and weekday; None: now

    @classmethod
    def from_sample(cls, row: Mapping[str, Any]) -> "User":
        """The user of a row of schema.SAMPLES, at its moment."""
        ratings, labels, events = row["history_ratings"], row["history_labels"], row.get("history_events")
        own = {name.removeprefix("interactions/"): v for name, v in row.items() if name.startswith("interactions/")}
        return cls(
            row["user_id"],
            row["history"],
            ratings,
            list(map(was_taken, ratings, labels)),
            None if events is None else [EVENTS[code - 1] if code else None for code in events],
            context=own,
            time=row["timestamp"],
        )

    def behaviors(self) -> np.ndarray:
        """The history in the request: ids.BEHAVIOR [n], without moments.

        Raises SchemaError if the history and its ratings differ in length.
        """
        history = list(self.history or ())
        ratings = [None] * len(history) if self.ratings is None else list(self.ratings)
        took = [True] * len(history) if self.taken is None else list(self.taken)
        events = [None] * len(history) if self.events is None else list(self.events)
        if not len(ratings) == len(took) == len(events) == len(history):
            raise SchemaError(
                f"a user has {len(history)} behaviors, {len(ratings)} ratings, {len(took)} outcomes and {len(events)} "
                "events. Pass a rating or null for each, or no ratings."
            )
        behaviors = np.zeros(len(history), dtype=BEHAVIOR)
        behaviors["item"], behaviors["label"] = history, took
        behaviors["rating"] = np.array(ratings, dtype=np.float32)  # None becomes NaN
        behaviors["event"] = [EVENT_CODES.get(event, 0) for event in events]
        return behaviors


class RowEncoder:
    """Features of one user and one request, as training encodes them: without Arrow, which takes longer than a model
    for a single row.
    """

    def __init__(self, vocabularies: Vocabularies) -> None:
        self._users, self._own = vocabularies.fields.users, vocabularies.fields.interactions
        fields = vocabularies.fields.row_fields
        self._coded = [field for field in fields if field.type != "log"]
        self._scaled = [field for field in fields if field.type == "log"]
        self._width = max((field.width for field in self._coded), default=1)
        self._user_width = max((field.width for field in self._users if field.type != "log"), default=1)
        tables = {f.table for f in self._coded if f.type == "categorical" and not f.hash}
        self._codes = {
            table: {value: code for code, value in enumerate(vocabularies.values[table].to_pylist(), RESERVED)}
            for table in tables
        }

    def encode(self, user: User, profiles: Profiles | None) -> tuple[np.ndarray, np.ndarray]:
        """int32 [1, coded fields, width] and float32 [1, log fields]."""
        known = profiles.find(user.user_id) if profiles and user.user_id is not None else None
        codes = np.zeros((1, len(self._coded), self._width), dtype=np.int32)
        codes[0, :, 0] = UNKNOWN
        numbers = np.full((1, len(self._scaled)), np.nan, dtype=np.float32)
        if known is not None:
            stored = known[0].reshape(-1, self._user_width)
            codes[0, : len(stored), : self._user_width] = stored
            numbers[0, : len(known[1])] = known[1]
        given: dict[int, Value | None] = {
            id(field): user.profile[field.column] for field in self._users if field.column in user.profile
        }
        if self._own:
            given |= {id(field): value for field, value in zip(self._own, self._context(user), strict=True)}
        if known is None and user.user_id is not None:
            given |= {id(f): str(user.user_id) for f in self._users if f.column == USER_ID}
        if not given:
            return codes, numbers
        for i, coded in enumerate(self._coded):
            if id(coded) in given:
                codes[0, i] = self._coded_values(coded, given[id(coded)])
        for i, scaled in enumerate(self._scaled):
            if id(scaled) in given:
                numbers[0, i] = field_numbers(scaled, _one(given[id(scaled)]))[0]
        return codes, numbers

    def _context(self, user: User) -> list[Value | None]:
        time = int(now() * 1000) if user.time is None else user.time
        hour, weekday = time // 3_600_000 % 24, (time // 86_400_000 + 3) % 7  # 1970 began on a Thursday
        derived: dict[str, Value] = {"hour": str(hour), "weekday": str(weekday)}
        return [derived.get(f.column, user.context.get(f.column)) for f in self._own]

    def _coded_values(self, field: Field, value: Value | None) -> np.ndarray:
        """int32 [width]."""
        texts = value if isinstance(value, list | tuple) else [value]
        texts = texts or [None]
        row = np.zeros(self._width, dtype=np.int32)
        for at, text in enumerate(texts[: field.width]):
            if field.table in self._codes:
                row[at] = self._codes[field.table].get(_text(text), UNKNOWN)
            else:
                row[at] = field_codes(field, _one(text), None)[0]
        return row


def _text(value: Any) -> str:
    """A value as the tables have it."""
    text: str = pa.scalar(value).cast(pa.string()).as_py() if not isinstance(value, str | None) else value or ""
    return text


def _one(value: Any) -> pa.Array:
    return pa.array([_text(value)], pa.string())


class CtrScorer:
    """An artifact in memory. Threads may share it: it does not change after opening."""

    def __init__(
        self,
        model: CTRModel,
        items: ItemFeatures,
        vocabularies: Vocabularies,
        profiles: Profiles | None = None,
        program: Program | None = None,
    ) -> None:
        """profiles: None if the model reads none. program: scores instead of the model."""
        self.model, self.items, self.vocabularies = model.eval(), items, vocabularies
        self.profiles, self.program = profiles, program
        self._length = model.spec.features.history_length
        self._fields = vocabularies.fields
        self._row = RowEncoder(vocabularies)

    @classmethod
    def open(cls, workspace: Workspace, folder: str, *, program: bool = False) -> "CtrScorer":
        """Opens an artifact, which may still lack its card. program: use its torch.export program instead of the model
        built from our classes.

        Raises WorkspaceError if the folder has none, or if it is damaged.
        """
        items, _ = read_items(workspace, folder)
        vocabularies = read_vocabularies(workspace, folder)
        return cls(
            load_trial(workspace, folder, items),
            items,
            vocabularies,
            Profiles(workspace, f"{folder}/{PROFILES}") if vocabularies.fields.users else None,
            load_program(workspace.read_bytes(f"{folder}/{PROGRAM}")) if program else None,
        )

    def score(self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState) -> np.ndarray:
        """float64 [n]: probability of a click (or of the label that the recipe defines), in the candidates' order.

        If the model has further labels, this is the primary one; `score_labels` has all.
        user: an id, or a User. candidates: item ids, repeats allowed. live: for this scorer's model. Raises SchemaError
        if a history and its ratings differ in length.
        """
        return next(iter(self.score_labels(user, candidates, live).values()))

    def score_labels(
        self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState
    ) -> dict[str, np.ndarray]:
        """Label -> float64 [n], for the primary one ("label") and the names of ctr.tasks. Arguments: see `score`."""
        names = ("label", *self._fields.tasks)
        if len(candidates) == 0:
            return {name: np.zeros(0) for name in names}
        batch = self.batch(user, candidates, live)
        with torch.inference_mode():
            if self.program is not None:
                scores: Tensor = self.program(request_tensors(batch))
            else:
                scores = self.model(batch).double().sigmoid()
        columns = scores.numpy().reshape(len(candidates), -1).T
        return dict(zip(names, columns, strict=True))

    def batch(self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState) -> Batch:
        """Model inputs for a request: n candidates, the user's part in one row."""
        asking = user if isinstance(user, User) else User(int(user))
        ids = np.asarray(candidates, dtype=np.int64)
        codes, numbers = self._row.encode(asking, self.profiles)
        past, tokens, events = self._history(asking, live)
        history = np.where(past < 0, PADDING, self.items.rows(past))
        arrays = (self.items.rows(ids), history[None], tokens[None], events[None], codes)
        items, rows, ratings, of_events, fields = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
        given: dict[str, Any] = {**live.inputs(asking.user_id, ids, past, tokens)}
        return Batch(
            items,
            rows,
            ratings,
            fields,
            torch.from_numpy(numbers),
            events=of_events if self._fields.events else None,
            **given,
        )

    def _history(self, user: User, live: LiveState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Item ids, -1 for padding, outcomes and events as training encodes them: int64 [history_length] each."""
        behaviors: np.ndarray | None
        if user.history is not None:
            behaviors = user.behaviors()
        else:
            behaviors = None if user.user_id is None else live.behaviors(user.user_id)
        items, outcomes = np.full(self._length, _NO_ID, dtype=np.int64), np.zeros(self._length, dtype=np.int64)
        events = np.zeros(self._length, dtype=np.int64)
        if behaviors is not None and len(behaviors):
            last = behaviors[-self._length :]
            items[: len(last)] = last["item"]
            outcomes[: len(last)] = self.vocabularies.grades.tokens(last["rating"].astype(float), last["label"])
            events[: len(last)] = last["event"]
        return items, outcomes, events


@dataclass(frozen=True)
class CtrArtifact:
    """A finished artifact: the scorer, and the description of the releases it may read."""

    scorer: CtrScorer
    card: ModelCard
    projection: Projection | None

    @classmethod
    def open(cls, workspace: Workspace, folder: str) -> "CtrArtifact":
        """Raises WorkspaceError if the folder has no finished artifact, or if it is damaged."""
        card = read_card(workspace, folder)
        reduced = workspace.exists(folder, "projection.json")
        projection = Projection.load(workspace, folder, card.grid) if reduced else None
        return cls(CtrScorer.open(workspace, folder), card, projection)

    def over(self, store: ReleaseReader, *, dim: int, held: Mapping[str, FieldCache] | None = None) -> LiveState:
        """The model's inputs from a release, which must have passed `Reads.refuse_other`.

        dim: components of the release's vectors. held: by kind, fields that are known to be the same there.
        Raises SchemaError for vectors of another length than in training.
        """
        model, reads = self.scorer.model, self.card.reads
        if reads is None:
            return LiveState(model, None, store, held)
        form = arm_parts(self.card.trial.arm)[1]
        trained_on = len(self.projection.center) if self.projection else model.spec.knowledge_dim
        if form != "codes" and dim != trained_on:
            raise SchemaError(
                f"the release's vectors have {dim} components, but the model was trained on {trained_on}. "
                "Train and export again."
            )
        levels = {"user": len(model.spec.user_codes), "item": len(model.spec.item_codes)}
        return LiveState(model, ReleaseKnowledge(store, reads, form, self.projection, levels), store, held)


# --------------------------------------------------------------------------------------------------------------- parity
# Checks that an artifact scores like the trainer, by scoring the trainer's test samples again, one request at a time.
#
# Each row becomes a request of its user with the sample's history. This
# compares everything in between: the encoding of features, the fields of knowledge, the one-user path, the program.


TOLERANCE = 1e-5  # in probability; float32 sums in another order differ by about 1e-7


def largest_difference(
    scorer: CtrScorer, tables: Tables | None, workspace: Workspace, grid: str, trial: Trial, *, rows: int = 200
) -> float:
    """Largest difference in probability from the trial's own scores, over `rows` test samples, evenly spaced over the
    first shards.

    tables: that the trial read. Raises WorkspaceError if the trial has no test scores, or scores of other
    samples than the workspace has.
    """
    scored = read_grid_scores(workspace, grid, [trial])
    fields = scorer.vocabularies.fields
    extra = [f"interactions/{field.column}" for field in fields.interactions if field.column not in TIMES]
    extra += ["history_events"] if fields.events else []
    shards, n = [], 0
    for number in workspace.table_shards("samples"):
        samples = read_samples(workspace, number, [*SAMPLES.names, *extra])
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
            f"{workspace.root}: the test scores of {trial.path} are missing, or do not match the current "
            "samples. Run `train_ctr` again."
        )
    chosen = np.unique(np.linspace(0, n - 1, rows).astype(np.int64))
    ours = []
    for row in samples.take(chosen).to_pylist():
        # A sample reads the knowledge before it, each in a separate state.
        known = TableKnowledge(tables, row["timestamp"]) if tables else None
        ours.append(scorer.score(User.from_sample(row), [row["item_id"]], LiveState(scorer.model, known))[0])
    return float(np.abs(np.array(ours) - scored.scores[trial.path][chosen]).max())
