"""The format of a release: release.json, rows as bytes, and the interface of stores that read them."""

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from owlrec.cohorts.cohort_model import by_facet
from owlrec.encoding.compression import unpack_codes
from owlrec.errors import ReleaseError, SchemaError, WorkspaceError, did_you_mean
from owlrec.schema import BEHAVIOR, Kind
from owlrec.storage import FileEntry
from owlrec.workspace import Tombstones, Workspace

# ------------------------------------------------------------------------------------------------------------- manifest
# What a release says of itself, in release.json.
#
# Manifests are small and read often: what a count or a decision needs of a whole chain of deltas is in its newest
# manifest, so that nobody has to read rows for it.


FORMAT = 4
MANIFEST = "release.json"
WAY_BACK = "Roll back to the previous release (`owlrec release rollback`), or publish again."


class SemanticIdEntry(BaseModel):
    """How the semantic ids of one kind are written."""

    sizes: tuple[int, ...]  # codes of each level
    codebooks: str = ""  # fingerprint of the quantiser


class PartEntry(BaseModel):
    """One of a release's files: the rows that it holds."""

    rows: dict[str, int]  # by database
    ids: dict[str, int]  # ids with knowledge of their own by kind


class ReleaseManifest(BaseModel):
    """release.json. Counts are the release's own rows by kind; a delta has those of its parent besides."""

    format: int = FORMAT
    name: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    model: str
    encoder: str
    encoder_identity: str = ""  # which changes with its weights
    parent: str | None = None  # what a delta is read on top of; of a full release, what was current before it
    delta: bool = False
    knowledge: dict[str, int]
    vectors: dict[str, int]  # the newest of each id
    partitions: dict[str, int] = {}  # vectors of older interest partitions
    memberships: dict[str, int] = {}
    codes: dict[str, int] = {}  # newest vectors whose semantic ids are known, or known to be none
    behaviors: dict[str, int] = {}  # users whose last behaviors it holds
    history_length: int = 0  # so many of each at most; 0 where it holds none
    semantic_ids: dict[str, SemanticIdEntry] = {}  # by kind; the codebooks are in the oldest release of a chain
    totals: dict[str, int] = {}  # ids with knowledge of their own, its parents' included
    dim: int
    as_of_min: int  # ms since 1970, UTC; no text of it or its parents is earlier
    as_of_max: int
    parts: list[PartEntry]  # a power of two; an id's part is its hash's
    files: dict[str, FileEntry]  # by their path in the release's folder

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(entry.bytes for entry in self.files.values())


def part_file(number: int) -> str:
    """The file with the rows of a part, relative to the release's folder."""
    return f"parts/{number:05d}.lmdb"


def ids_file(number: int) -> str:
    """The file with the ids of a part that have knowledge, relative to the release's folder."""
    return f"parts/{number:05d}.ids"


def quantiser_folder(kind: str) -> str:
    """Where a full release keeps the codebooks of a kind, relative to its folder."""
    return f"semantic_ids/{kind}"


def read_manifest(workspace: Workspace, name: str) -> ReleaseManifest:
    """release.json of release `name`. Raises ReleaseError where there is none, or one that this version cannot read."""
    path = f"releases/{name}/{MANIFEST}"
    if not workspace.exists(path):
        have = [n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST)]
        hint = did_you_mean(name, have) if have else " Nothing was published yet: run the publish stage."
        raise ReleaseError(f"{workspace.path('releases')} holds no release '{name}'.{hint}")
    try:
        document = workspace.read_json(path)
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise ReleaseError(
                f"{workspace.path(path)} has format {document.get('format')}; this owlrec reads {FORMAT}. Use the "
                "owlrec that wrote it, or publish again."
            )
        return ReleaseManifest.model_validate(document)
    except (ValidationError, WorkspaceError) as error:
        raise ReleaseError(f"{workspace.path(path)} is unreadable ({error}). {WAY_BACK}") from None


def list_releases(workspace: Workspace) -> list[ReleaseManifest]:
    """The manifests of all complete releases, oldest first. Raises ReleaseError where one cannot be read."""
    names = (n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST))
    return [read_manifest(workspace, name) for name in names]


def chain(workspace: Workspace, name: str) -> list[ReleaseManifest]:
    """The manifests of release `name` and of what it is read on top of: newest first, the last of them full.

    Raises ReleaseError where one is missing or cannot be read, or where deltas go round in a circle.
    """
    manifests = [read_manifest(workspace, name)]
    while (delta := manifests[-1]).delta:
        parent = delta.parent or ""
        if not workspace.exists("releases", parent, MANIFEST):
            raise ReleaseError(
                f"{workspace.path('releases', delta.name)} is a delta of release '{parent}', which is gone. "
                f"{_full_release(workspace)}"
            )
        if parent in {m.name for m in manifests}:
            raise ReleaseError(f"{workspace.path('releases', delta.name)} is a delta of itself. {WAY_BACK}")
        manifests.append(read_manifest(workspace, parent))
    return manifests


def _full_release(workspace: Workspace) -> str:
    for name in reversed(workspace.names("releases")):
        with suppress(ReleaseError):
            if not read_manifest(workspace, name).delta:
                return f"Roll back to a full release (`owlrec release rollback --to {name}`), or publish in full."
    return "Publish in full: no full release is left."


# ----------------------------------------------------------------------------------------------------------------- rows
# The rows of a release as bytes, the same in LMDB and in Redis, and the store that reads them.
#
# A key is one byte for the kind and the id as eight big-endian bytes, so that byte order is numeric order; vectors of
# older interest partitions follow their id's newest one, under its key and one byte more. Five databases hold values:
# `knowledge` (as_of, framework, quality, text), `vectors` (raw float16), `memberships` (cohort ids, each as eight
# big-endian bytes), `codes` (semantic ids as owlrec.encoding.compression writes them; empty: none) and, of users,
# `behaviors` (24 bytes each, schema.BEHAVIOR). Whole columns are encoded at once: a loop over 10^8 rows in Python
# would cost hours.


# ------------------------------------------------------------------------------------------------------------ interface
# What a store of knowledge answers, whatever database is behind it: texts and vectors, aligned with their ids.
#
# A miss is an answer, never an error, because new users and items are normal: `get` gives None in its place, `vectors`
# a zero row with a False in the mask. Before that the cohorts of an id stand in for it (REKI's collective knowledge):
# that rule is written here once, and a database only says what it holds under an id itself. Stores are read-only: what
# they hold was written and verified once, by `owlrec.releases.build`.


_Value = TypeVar("_Value")
_Store = TypeVar("_Store", bound="KnowledgeStore")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the LLM wrote about one user, item or cohort."""

    kind: str
    id: int
    as_of: int  # ms since 1970, UTC: the text knows nothing later
    text: str
    framework: str  # "collective": the texts of the id's cohorts, which has none of its own
    quality: str  # "ok", or the names of the quality rules that flagged the text

    def _repr_html_(self) -> str:
        """The text in a notebook, with what is known of it."""
        about = [self.framework, f"as of {_day(self.as_of)}" if self.as_of else "", self.quality]
        line = " · ".join(escape(part) for part in about if part)
        text = escape(self.text).replace("\n", "<br>")
        return f"<b>{self.kind} {self.id}</b> <small>{line}</small><blockquote>{text}</blockquote>"


def _day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))


class KnowledgeStore(ABC):
    """Read access to one release; a context manager that closes itself."""

    remote = False  # whether a question waits for a network: servers then ask from a thread

    def get(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """Knowledge aligned with `ids`: an id's own, else what its cohorts say, None where there is neither.

        The texts of several cohorts are joined by a line break, in the order of the memberships; the moment is the
        latest of theirs, the quality that of the first. Raises ReleaseError for an unknown kind.
        """
        answers = self.own_knowledge(kind, ids)
        missing = [row for row, knowledge in enumerate(answers) if knowledge is None]
        if not missing:
            return answers
        groups, cohorts = self._stand_ins(kind, [int(ids[row]) for row in missing])
        texts = dict(zip(cohorts, self.own_knowledge("cohort", cohorts), strict=True)) if cohorts else {}
        for row, group in zip(missing, groups, strict=True):
            known = [knowledge for cohort in group if (knowledge := texts[cohort])]
            if known:
                answers[row] = Knowledge(
                    kind=kind,
                    id=int(ids[row]),
                    as_of=max(k.as_of for k in known),
                    text="\n".join(k.text for k in known),
                    framework="collective",
                    quality=known[0].quality,
                )
        return answers

    def vectors(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors aligned with `ids`: (float32 [n, d], mask bool [n]).

        An id's own newest vector; else the mean of its cohorts' vectors, scaled to length 1; else zeros and False.
        """
        rows, mask = self.partitions(kind, ids, 1)
        return rows[:, 0], mask[:, 0]

    def partitions(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of the newest `n` interest partitions of each id: (float32 [m, n, d], mask bool [m, n]).

        Newest first. An id without a vector of its own has in slot 0 what `vectors` gives for it. n: at least 1.
        """
        rows, mask = self.own_vectors(kind, ids, n)
        missing = [row for row, there in enumerate(mask[:, 0].tolist()) if not there]
        if not missing:
            return rows, mask
        groups, cohorts = self._stand_ins(kind, [int(ids[row]) for row in missing])
        if not cohorts:
            return rows, mask
        of_cohorts, known = self.own_vectors("cohort", cohorts, 1)
        place = {cohort: at for at, cohort in enumerate(cohorts) if known[at, 0]}
        for row, group in zip(missing, groups, strict=True):
            at = [place[cohort] for cohort in group if cohort in place]
            if not at:
                continue
            mean = of_cohorts[at, 0].mean(axis=0)
            length = np.linalg.norm(mean)
            if length > 0:  # vectors that cancel each other out point nowhere: a miss
                rows[row, 0], mask[row, 0] = mean / length, True
        return rows, mask

    def codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The semantic ids of the newest vectors of `ids`: (uint16 [n, levels + 1], mask bool [n]).

        Coarse to fine, the duplicate digit last; zeros and False where an id has none of its own, for cohorts do not
        stand in: what several share tells nobody apart. [n, 0] where none of them has any.
        """
        own = self.own_codes(kind, ids)
        width = max((len(codes) for codes in own if codes), default=0)
        rows, mask = np.zeros((len(own), width), dtype=np.uint16), np.array([bool(codes) for codes in own], bool)
        if mask.any():
            rows[mask] = [codes for codes in own if codes]
        return rows, mask

    def cohorts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...]]:
        """The cohorts of each id, the one that tells most first; an empty tuple where it has none."""
        return [liked + disliked for liked, disliked in self.facets(kind, ids)]

    def facets(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The cohorts of each id, and apart from them those of users by what they disliked."""
        return [by_facet(group or ()) for group in self.memberships(kind, ids)]

    def _stand_ins(self, kind: str, ids: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
        """The cohorts of each id, and all of them, each once."""
        groups = self.cohorts(kind, ids)
        return groups, sorted({cohort for group in groups for cohort in group})

    @abstractmethod
    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """Knowledge that stands under the ids themselves, aligned, None where there is none.

        Raises ReleaseError for an unknown kind.
        """

    @abstractmethod
    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of partitions 0 to n - 1 that stand under the ids themselves: (float32 [m, n, d], mask bool [m, n]).

        An id without partition 0 has none at all.
        """

    @abstractmethod
    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """The codes of each id, its duplicate digit last; None where nothing is said of it, () where its newest vector
        is said to have none.
        """

    @abstractmethod
    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """The cohorts of each id, as `by_facet` reads them; None where nothing is said of it, () where it is said that
        it has none.
        """

    @abstractmethod
    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """The last behaviors of each user, oldest first: schema.BEHAVIOR [k]; None of those without any."""

    @abstractmethod
    def count(self, kind: str) -> int:
        """How many ids of this kind have knowledge of their own."""

    @abstractmethod
    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """The ids of this kind that have knowledge of their own: int64, ascending, at most `limit`."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the store holds; calling it twice does no harm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ChainedStore(KnowledgeStore, Generic[_Store]):
    """A delta release and what it is read on top of: whatever a layer lacks, the next older one answers.

    Only what stands under an id itself is looked up layer by layer. Which cohorts stand in for an id, and what those
    say, is settled above over the whole chain: a delta that renews a cohort's text renews what a member stored in any
    other layer resolves to.
    """

    def __init__(self, layers: Sequence[_Store], *, dim: int, totals: dict[str, int]) -> None:
        """layers: newest first, the last of them a full release; closed with the chain. dim, totals: as the newest
        manifest states.
        """
        self.layers = tuple(layers)
        self.remote = self.layers[0].remote
        self._dim = dim
        self._totals = totals

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._newest(lambda layer, asked: layer.own_knowledge(kind, asked), ids)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors. The newest layer with an id's partition 0 answers for all its partitions:
        older ones may lie elsewhere in it, or be gone.
        """
        vectors = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        missing = np.arange(len(ids))
        for layer in self.layers:
            rows, known = layer.own_vectors(kind, [int(ids[row]) for row in missing.tolist()], n)
            hit = known[:, 0]
            if hit.any():  # else its rows may have no components at all: vectors began later in the chain
                vectors[missing[hit]], mask[missing[hit]] = rows[hit], known[hit]
                missing = missing[~hit]
            if not len(missing):
                break
        return vectors, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        return self._newest(lambda layer, asked: layer.own_codes(kind, asked), ids)

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        return self._newest(lambda layer, asked: layer.memberships(kind, asked), ids)

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        return self._newest(lambda layer, asked: layer.behaviors(asked), ids)

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count."""
        return self._totals.get(kind, 0)

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        return np.unique(np.concatenate([layer.ids(kind, limit) for layer in self.layers]))[:limit]

    def close(self) -> None:
        """See KnowledgeStore.close."""
        for layer in self.layers:
            layer.close()

    def _newest(
        self, look_up: Callable[[_Store, Sequence[int]], list[_Value | None]], ids: Sequence[int] | np.ndarray
    ) -> list[_Value | None]:
        values: list[_Value | None] = [None] * len(ids)
        missing = list(range(len(ids)))
        for layer in self.layers:
            answers = look_up(layer, [int(ids[row]) for row in missing])
            for row, answer in zip(missing, answers, strict=True):
                values[row] = answer
            missing = [row for row in missing if values[row] is None]
            if not missing:
                break
        return values


class TombstonedStore(KnowledgeStore):
    """A store that says nothing of users who are forgotten, whatever it still holds."""

    def __init__(self, store: KnowledgeStore, tombstones: Tombstones) -> None:
        """store: closed with this one."""
        self.remote = store.remote
        self._store, self._tombstones = store, tombstones

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._without(kind, ids, self._store.own_knowledge(kind, ids))

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        rows, mask = self._store.own_vectors(kind, ids, n)
        gone = self._gone(kind, ids)
        rows[gone], mask[gone] = 0, False
        return rows, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        return self._without(kind, ids, self._store.own_codes(kind, ids))

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        return self._without(kind, ids, self._store.memberships(kind, ids))

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        return self._without("user", ids, self._store.behaviors(ids))

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count: as the release was built, those who are forgotten since included."""
        return self._store.count(kind)

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        if kind != "user":
            return self._store.ids(kind, limit)
        ids = self._store.ids(kind, None if limit is None else limit + len(self._tombstones))
        return ids[~self._tombstones.among(ids)][:limit]

    def close(self) -> None:
        """See KnowledgeStore.close."""
        self._store.close()

    def _gone(self, kind: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._tombstones.among(ids) if kind == "user" else np.zeros(len(ids), dtype=bool)

    def _without(self, kind: str, ids: Sequence[int] | np.ndarray, values: list[_Value | None]) -> list[_Value | None]:
        for row in np.flatnonzero(self._gone(kind, ids)).tolist():
            values[row] = None
        return values


def measure_lookup(
    store: KnowledgeStore, kind: str, ids: np.ndarray, *, n: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Times `n` single lookups each of knowledge and vectors, for ids drawn from `ids` and read once before.

    Returns {"n", "knowledge_p50_us", "knowledge_p99_us", "vector_p50_us", "vector_p99_us"} (microseconds); n is 0 where
    ids is empty.
    """
    if len(ids) == 0:
        return {"n": 0.0}
    drawn = np.random.default_rng(seed).choice(np.asarray(ids, dtype=np.int64), size=n)
    store.get(kind, drawn)
    store.vectors(kind, drawn)
    figures: dict[str, float] = {"n": float(n)}
    for name, lookup in (("knowledge", store.get), ("vector", store.vectors)):
        micros = np.empty(n)
        for row in range(n):
            one = drawn[row : row + 1]
            start = time.perf_counter_ns()
            lookup(kind, one)
            micros[row] = (time.perf_counter_ns() - start) / 1000
        figures[f"{name}_p50_us"] = round(float(np.percentile(micros, 50)), 1)
        figures[f"{name}_p99_us"] = round(float(np.percentile(micros, 99)), 1)
    return figures


# ----------------------------------------------------------------------------------------------------------------- rows


DATABASES = ("knowledge", "vectors", "memberships", "codes", "behaviors")
KEY_ORDER: tuple[Kind, ...] = ("cohort", "item", "user")  # kinds as their keys ascend
KEY_BYTES = 9
LAST_PARTITION = 255  # one byte of a key
_KIND_BYTES = {"user": b"u", "item": b"i", "cohort": b"c"}
_KINDS = {value[0]: kind for kind, value in _KIND_BYTES.items()}
_KEY = struct.Struct(">cq")
_HEAD = np.dtype([("as_of", ">i8"), ("framework", ">u2"), ("quality", ">u2")])  # lengths of the two names in bytes
_HEAD_STRUCT = struct.Struct(">qHH")
_LONGEST_NAME = (1 << 16) - 1


def encode_key(kind: str, id_: int, partition: int = 0) -> bytes:
    """The nine bytes of a row's key, ten for an older partition. Raises ReleaseError for an unknown kind."""
    key = _KEY.pack(_kind_byte(kind), id_)
    return key + bytes([partition]) if partition else key


def encode_keys(kind: str, ids: np.ndarray, partition: int = 0) -> list[bytes]:
    """The keys of many ids of a kind, aligned. Raises ReleaseError for an unknown kind."""
    width = KEY_BYTES + bool(partition)
    keys = np.empty((len(ids), width), dtype=np.uint8)
    keys[:, 0] = _kind_byte(kind)[0]
    keys[:, 1:KEY_BYTES] = np.asarray(ids, dtype=">i8").view(np.uint8).reshape(-1, 8)
    if partition:
        keys[:, KEY_BYTES] = partition
    return byte_rows(keys)


def decode_keys(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The kinds (their bytes, uint8) and ids (int64) of keys."""
    table = np.frombuffer(b"".join(key[:KEY_BYTES] for key in keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return table[:, 0], np.ascontiguousarray(table[:, 1:]).view(">i8").ravel().astype(np.int64)


def speaking(keys: Sequence[bytes], tombstones: Tombstones) -> list[bool]:
    """Of each key whether its row may be told: not that of a user who is forgotten."""
    if not keys or not len(tombstones):
        return [True] * len(keys)
    kinds, ids = decode_keys(keys)
    told: list[bool] = (~tombstones.among(ids) | (kinds != _KIND_BYTES["user"][0])).tolist()
    return told


def kind_of(byte: int) -> str:
    """The kind that a key's first byte stands for."""
    return _KINDS[byte]


def byte_rows(table: np.ndarray) -> list[bytes]:
    """Each row of a contiguous table [n, width] as bytes."""
    table = np.ascontiguousarray(table).view(np.uint8)
    return table.view(f"V{table.shape[1]}").ravel().tolist() if table.size else [b""] * len(table)


def encode_knowledge(table: pa.Table, *, name: str) -> list[bytes]:
    """The values of knowledge rows (schema.KNOWLEDGE). Raises SchemaError for a framework or quality beyond 64 kB."""
    framework, quality, text = (_binary(table[column]) for column in ("framework", "quality", "text"))
    head = np.empty(table.num_rows, dtype=_HEAD)
    head["as_of"] = table["as_of"].to_numpy()
    for column, values in (("framework", framework), ("quality", quality)):
        lengths = pc.binary_length(values).to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.max() > _LONGEST_NAME:
            row = int(lengths.argmax())
            raise SchemaError(
                f"{name}, row {row}: its {column} has {lengths[row]:,} bytes, more than {_LONGEST_NAME:,}. Shorten it."
            )
        head[column] = lengths
    heads = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_HEAD.itemsize), len(head), [None, pa.py_buffer(head)])
    return _slices(pc.binary_join_element_wise(heads.cast(pa.binary()), framework, quality, text, b""))


def decode_knowledge(kind: str, id_: int, value: bytes, where: str) -> Knowledge:
    """The knowledge that a value holds. Raises ReleaseError, which names `where`, for a damaged one."""
    try:
        as_of, framework, quality = _HEAD_STRUCT.unpack_from(value)
        first = _HEAD_STRUCT.size
        second, third = first + framework, first + framework + quality
        if third > len(value):
            raise ValueError("it is cut short")
        text = value[third:].decode()
        return Knowledge(kind, id_, as_of, text, value[first:second].decode(), value[second:third].decode())
    except (ValueError, struct.error) as error:
        raise ReleaseError(
            f"{where}: the row of {kind} {id_} is unreadable ({error!r}). The store is corrupt: "
            f"roll back to the previous release, or publish again."
        ) from None


def encode_lists(lists: pa.ListArray) -> list[bytes]:
    """The values of memberships: of each list of int64 eight big-endian bytes per cohort."""
    offsets = lists.offsets.to_numpy().astype(np.int64) * 8
    data = lists.values.to_numpy().astype(">i8").tobytes()
    return [data[start:end] for start, end in pairwise(offsets.tolist())]


def encode_behaviors(table: pa.Table) -> list[bytes]:
    """The values of behaviors (schema.BEHAVIORS): schema.BEHAVIOR after each other, NaN for no rating.

    Raises ValueError where the lists of a row differ in length.
    """
    lists = {name: table[f"{name}s"].combine_chunks() for name in BEHAVIOR.names or ()}
    offsets = np.r_[0, np.cumsum(lists["time"].value_lengths().to_numpy())]
    rows = np.empty(offsets[-1], dtype=BEHAVIOR)
    for name, column in lists.items():
        if not np.array_equal(column.value_lengths().to_numpy(), np.diff(offsets)):
            raise ValueError(f"{name}s and times differ in length")
        rows[name] = column.flatten().to_numpy(zero_copy_only=False)
    data, bounds = rows.tobytes(), (offsets * BEHAVIOR.itemsize).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


class RowStore(KnowledgeStore):
    """What a database answers that holds these rows under these keys."""

    def __init__(
        self,
        where: str,
        *,
        dim: int,
        counts: Mapping[str, int],
        partitions: Mapping[str, int],
        code_sizes: Mapping[str, Sequence[int]],
    ) -> None:
        """where: the folder or server, for errors. The others as the release's manifest states."""
        self._where, self._dim, self._counts = where, dim, counts
        self._partitions, self._code_sizes = partitions, code_sizes

    @abstractmethod
    def values(
        self, database: str, kind: str, ids: Sequence[int] | np.ndarray, partition: int = 0
    ) -> list[bytes | None]:
        """The bytes under each id in a database, None where there are none. Raises ReleaseError for an unknown kind."""

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        values = self.values("knowledge", kind, ids)
        return [
            None if value is None else decode_knowledge(kind, int(id_), value, self._where)
            for id_, value in zip(ids, values, strict=True)
        ]

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        vectors = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        asked: Sequence[int] | np.ndarray = ids
        rows: slice | np.ndarray = slice(None)  # of the ids that are asked for
        for partition in range(min(n, LAST_PARTITION + 1) if self._partitions.get(kind) else 1):
            values = self.values("vectors", kind, asked, partition)
            present = [value for value in values if value is not None]
            if not present:
                break
            if len(present) < len(values):  # who lacks a partition lacks all older ones
                known = [at for at, value in enumerate(values) if value is not None]
                rows, asked = np.arange(len(ids))[rows][known], [asked[at] for at in known]
            data = np.frombuffer(b"".join(present), dtype=np.float16)
            vectors[rows, partition] = data.reshape(len(present), -1)
            mask[rows, partition] = True
        return vectors, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        sizes = self._code_sizes.get(kind, ())
        values = self.values("codes", kind, ids)
        return [None if v is None else unpack_codes(v, sizes) if v else () for v in values]

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        values = self.values("memberships", kind, ids)
        return [None if v is None else struct.unpack(f">{len(v) // 8}q", v) for v in values]

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        values = self.values("behaviors", "user", ids)
        return [None if value is None else np.frombuffer(value, dtype=BEHAVIOR) for value in values]

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count."""
        return self._counts.get(kind, 0)


def _kind_byte(kind: str) -> bytes:
    if kind not in _KIND_BYTES:
        raise ReleaseError(f"kind '{kind}' is none that a release holds.{did_you_mean(kind, _KIND_BYTES)}")
    return _KIND_BYTES[kind]


def _binary(column: pa.ChunkedArray) -> pa.Array:
    """A string column as one array of bytes, "" in the place of nulls."""
    column = pc.fill_null(column, "") if column.null_count else column
    return column.cast(pa.binary()).combine_chunks()


def _slices(values: pa.Array) -> list[bytes]:
    """A binary array as a list of bytes; `to_pylist` takes several times as long."""
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    data = values.buffers()[2]
    data = data.to_pybytes() if data is not None else b""
    bounds = offsets.tolist()
    return [data[start:end] for start, end in pairwise(bounds)]
