"""The format of a release: release.json, rows as bytes, and the interface of stores that read them."""

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Generic, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from owlrec.encoding.compression import unpack_codes
from owlrec.errors import ReleaseError, WorkspaceError, did_you_mean
from owlrec.ids import BEHAVIOR, Kind
from owlrec.storage import FileEntry
from owlrec.workspace import Tombstones, Workspace

# ------------------------------------------------------------------------------------------------------------- manifest
# A release's manifest, release.json.
#
# Manifests are small and read often: the newest manifest has all the totals of its chain of deltas,
# so nothing has to read rows for them.


FORMAT = 6
MANIFEST = "release.json"
WAY_BACK = "Roll back to the previous release (`owlrec release rollback`), or publish again."


class SemanticIdEntry(BaseModel):
    """Format of one kind's semantic ids."""

    sizes: tuple[int, ...]  # codes per level
    codebooks: str = ""  # fingerprint of the quantizer


class SimilarEntry(BaseModel):
    """The index of one kind's vectors, for nearest neighbors."""

    vectors: int
    recall: float  # at 10, against exact search


class PartEntry(BaseModel):
    """One of a release's files and its rows."""

    rows: dict[str, int]  # by database
    ids: dict[str, int]  # ids with their own knowledge, by kind


class ReleaseManifest(BaseModel):
    """release.json. Counts are the release's own rows by kind; a delta also has those of its parent."""

    format: int = FORMAT
    name: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    model: str
    encoder: str
    encoder_identity: str = ""  # changes with its weights
    parent: str | None = None  # base of a delta; for a full release, the previously current one
    delta: bool = False
    knowledge: dict[str, int]
    vectors: dict[str, int]  # the newest of each id
    partitions: dict[str, int] = {}  # vectors of older interest partitions
    memberships: dict[str, int] = {}
    codes: dict[str, int] = {}  # newest vectors with semantic ids, or marked as having none
    behaviors: dict[str, int] = {}  # users with behaviors
    history_length: int = 0  # maximum behaviors per user; 0 without any
    semantic_ids: dict[str, SemanticIdEntry] = {}  # by kind; the codebooks are in the oldest release of a chain
    similar: dict[str, SimilarEntry] = {}  # by kind; empty if it was built without faiss
    totals: dict[str, int] = {}  # ids with their own knowledge, including its parents'
    dim: int
    as_of_min: int  # ms since 1970, UTC; no text of it or its parents is earlier
    as_of_max: int
    parts: list[PartEntry]  # a power of two; an id's part is its hash's
    files: dict[str, FileEntry]  # by their path in the release's folder

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.bytes for entry in self.files.values())


def part_file(number: int) -> str:
    """File with the rows of a part, relative to the release's folder."""
    return f"parts/{number:05d}.lmdb"


def ids_file(number: int) -> str:
    """File with a part's ids that have knowledge, relative to the release's folder."""
    return f"parts/{number:05d}.ids"


def quantizer_folder(kind: str) -> str:
    """Folder of a kind's codebooks in a full release, relative to its folder."""
    return f"semantic_ids/{kind}"


def read_manifest(workspace: Workspace, name: str) -> ReleaseManifest:
    """release.json of release `name`. Raises ReleaseError if it is missing, or unreadable by this version."""
    path = f"releases/{name}/{MANIFEST}"
    if not workspace.exists(path):
        have = [n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST)]
        hint = did_you_mean(name, have) if have else " Nothing has been published: run the publish stage."
        raise ReleaseError(f"{workspace.path('releases')} has no release '{name}'.{hint}")
    try:
        document = workspace.read_json(path)
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise ReleaseError(
                f"{workspace.path(path)} has format {document.get('format')}; this owlrec reads {FORMAT}. Use "
                "the version that wrote it, or publish again."
            )
        return ReleaseManifest.model_validate(document)
    except (ValidationError, WorkspaceError) as error:
        raise ReleaseError(f"{workspace.path(path)} is unreadable ({error}). {WAY_BACK}") from None


def list_releases(workspace: Workspace) -> list[ReleaseManifest]:
    """Manifests of all complete releases, oldest first. Raises ReleaseError if one is unreadable."""
    names = (n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST))
    return [read_manifest(workspace, name) for name in names]


def chain(workspace: Workspace, name: str) -> list[ReleaseManifest]:
    """Manifests of release `name` and its parents: newest first, the last of them full.

    Raises ReleaseError if one is missing or unreadable, or if deltas form a cycle.
    """
    manifests = [read_manifest(workspace, name)]
    while (delta := manifests[-1]).delta:
        parent = delta.parent or ""
        if not workspace.exists("releases", parent, MANIFEST):
            raise ReleaseError(
                f"{workspace.path('releases', delta.name)} is a delta of release '{parent}', which is missing. "
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
# Rows of a release as bytes, the same in LMDB and in Redis, and the store that reads them.
#
# A key is one byte for the kind and eight big-endian bytes for the id, so byte order is numeric order; vectors of
# older interest partitions follow their id's newest one, under its key plus one byte. Five databases hold values:
# `knowledge` (as_of, framework, quality, text), `vectors` (raw float16), `memberships` (cohort ids, each as eight
# big-endian bytes), `codes` (semantic ids in the format of owlrec.encoding.compression; empty: none) and, for users,
# `behaviors` (25 bytes each, ids.BEHAVIOR). Whole columns are encoded at once: a loop over 10^8 rows in Python
# would take hours.


# ------------------------------------------------------------------------------------------------------------ interface
# The interface of a knowledge store over any database: texts and vectors, aligned with their ids.
#
# A miss is an answer, never an error, because new users and items are normal: `get` returns None for it, `vectors`
# a zero row with False in the mask. Before that, an id falls back to its cohorts (REKI's collective knowledge).
# That rule is implemented once, here, and a database only returns the values of an id itself. Stores are read-only:
# `owlrec.releases.build` wrote and verified their contents once.


_Value = TypeVar("_Value")
_Layer = TypeVar("_Layer", bound="KnowledgeStore")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """An LLM's text about one user, item or cohort."""

    kind: str
    id: int
    as_of: int  # ms since 1970, UTC: the text's cutoff
    text: str
    framework: str  # "collective": texts of the id's cohorts, if it has none of its own
    quality: str  # "ok", or the names of the quality rules that flagged the text
    relaxed: int = 0  # tokens that only the decoder's relaxed rule accepted

    def _repr_html_(self) -> str:
        """The text for a notebook, with its metadata."""
        about = [self.framework, f"as of {_day(self.as_of)}" if self.as_of else "", self.quality]
        line = " · ".join(escape(part) for part in about if part)
        text = escape(self.text).replace("\n", "<br>")
        return f"<b>{self.kind} {self.id}</b> <small>{line}</small><blockquote>{text}</blockquote>"


def _day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))


class KnowledgeStore(ABC):
    """Read access to one release; a context manager that closes itself."""

    remote = False  # whether lookups wait for a network; servers then use a thread

    def get(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """Knowledge aligned with `ids`: an id's own, or else its cohorts', or None.

        The texts of several cohorts are joined by a line break, in the order of the memberships; as_of is the
        latest of theirs, and quality that of the first. Raises ReleaseError for an unknown kind.
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

        An id's own newest vector, or else the mean of its cohorts' vectors, scaled to length 1, or zeros and False.
        """
        rows, mask = self.partitions(kind, ids, 1)
        return rows[:, 0], mask[:, 0]

    def texts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """The texts of `get` alone, as UTF-8: a third of its time."""
        texts = self.own_texts(kind, ids)
        if None not in texts:
            return texts
        missing = [row for row, text in enumerate(texts) if text is None]
        for row, known in zip(missing, self.get(kind, [int(ids[row]) for row in missing]), strict=True):
            texts[row] = known.text.encode("utf-8", "replace") if known else None
        return texts

    def half_vectors(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same as `vectors`, in float16, as releases store them."""
        rows, mask = self.vectors(kind, ids)
        return rows.astype(np.float16), mask

    def partitions(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the newest `n` interest partitions of each id: (float32 [m, n, d], mask bool [m, n]).

        Newest first. For an id without its own vector, slot 0 has the result of `vectors`. n: at least 1.
        """
        rows, mask = self.own_vectors(kind, ids, n)
        missing = [row for row, there in enumerate(mask[:, 0].tolist()) if not there]
        if not missing:
            return rows, mask
        groups, cohorts = self._stand_ins(kind, [int(ids[row]) for row in missing])
        if not cohorts:
            return rows, mask
        cohort_vectors, known = self.own_vectors("cohort", cohorts, 1)
        place = {cohort: at for at, cohort in enumerate(cohorts) if known[at, 0]}
        for row, group in zip(missing, groups, strict=True):
            at = [place[cohort] for cohort in group if cohort in place]
            if not at:
                continue
            mean = cohort_vectors[at, 0].mean(axis=0)
            length = np.linalg.norm(mean)
            if length > 0:  # vectors that cancel out have no direction: a miss
                rows[row, 0], mask[row, 0] = mean / length, True
        return rows, mask

    def codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Semantic ids of the newest vectors of `ids`: (uint16 [n, levels + 1], mask bool [n]).

        Coarse to fine, the duplicate digit last; zeros and False if an id has none of its own. Cohorts are no
        fallback, since shared codes would not identify an id. [n, 0] if none of them has any.
        """
        own = self.own_codes(kind, ids)
        width = max((len(codes) for codes in own if codes), default=0)
        rows, mask = np.zeros((len(own), width), dtype=np.uint16), np.array([bool(codes) for codes in own], bool)
        if mask.any():
            rows[mask] = [codes for codes in own if codes]
        return rows, mask

    def cohorts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...]]:
        """Cohorts of each id, the most informative first; an empty tuple for none."""
        return [liked + disliked for liked, disliked in self.facets(kind, ids)]

    def facets(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Cohorts of each id, and separately users' cohorts by dislikes."""
        return [by_facet(group or ()) for group in self.memberships(kind, ids)]

    def _stand_ins(self, kind: str, ids: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
        """Cohorts of each id, and all of them without duplicates."""
        groups = self.cohorts(kind, ids)
        return groups, sorted({cohort for group in groups for cohort in group})

    @abstractmethod
    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """The ids' own knowledge, aligned, None if missing.

        Raises ReleaseError for an unknown kind.
        """

    def own_texts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """The texts of `own_knowledge`, as UTF-8."""
        return [None if k is None else k.text.encode("utf-8", "replace") for k in self.own_knowledge(kind, ids)]

    @abstractmethod
    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids' own vectors of partitions 0 to n - 1: (float32 [m, n, d], mask bool [m, n]).

        An id without partition 0 has none at all.
        """

    @abstractmethod
    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """Codes of each id, its duplicate digit last; None if the store has no entry, () if its newest vector
        is marked as having none.
        """

    @abstractmethod
    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """Cohorts of each id, as read by `by_facet`; None if the store has no entry, () if the id is marked as
        having none.
        """

    @abstractmethod
    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """Latest behaviors of each user, oldest first: ids.BEHAVIOR [k]; None without any."""

    @abstractmethod
    def count(self, kind: str) -> int:
        """Number of ids of this kind with their own knowledge."""

    @abstractmethod
    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """Ids of this kind with their own knowledge: int64, ascending, at most `limit`."""

    @abstractmethod
    def close(self) -> None:
        """Frees the store's resources. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ChainedStore(KnowledgeStore, Generic[_Layer]):
    """A delta release with its parents: rows missing from a layer come from the next older one.

    Only an id's own values are looked up layer by layer. Cohort fallbacks are resolved
    above, over the whole chain: a delta that updates a cohort's text updates the result for members stored in any
    other layer.
    """

    def __init__(self, layers: Sequence[_Layer], *, dim: int, totals: dict[str, int]) -> None:
        """layers: newest first, the last of them a full release; closed with the chain. dim, totals: from the newest
        manifest.
        """
        self.layers = tuple(layers)
        self.remote = self.layers[0].remote
        self._dim = dim
        self._totals = totals

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._newest(lambda layer, asked: layer.own_knowledge(kind, asked), ids)

    def own_texts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """See KnowledgeStore.own_texts."""
        return self._newest(lambda layer, asked: layer.own_texts(kind, asked), ids)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors. The newest layer with an id's partition 0 provides all its partitions:
        older ones may have moved or been dropped.
        """
        vectors = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        missing = np.arange(len(ids))
        for layer in self.layers:
            rows, known = layer.own_vectors(kind, [int(ids[row]) for row in missing.tolist()], n)
            hit = known[:, 0]
            if hit.any():  # otherwise its rows may have no components: vectors started later in the chain
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
        self, look_up: Callable[[_Layer, Sequence[int]], list[_Value | None]], ids: Sequence[int] | np.ndarray
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
    """A store that hides forgotten users, even if it still has their rows."""

    def __init__(self, store: KnowledgeStore, tombstones: Tombstones) -> None:
        """store: closed with this one."""
        self.remote = store.remote
        self._store, self._tombstones = store, tombstones

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._without(kind, ids, self._store.own_knowledge(kind, ids))

    def own_texts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """See KnowledgeStore.own_texts."""
        return self._without(kind, ids, self._store.own_texts(kind, ids))

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
        """See KnowledgeStore.count: as the release was built, including users forgotten since."""
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
    """Times `n` single lookups each of knowledge and vectors, for ids sampled from `ids` and read once before.

    Returns {"n", "knowledge_p50_us", "knowledge_p99_us", "vector_p50_us", "vector_p99_us"} (microseconds); n is 0 if
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


def by_facet(listed: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits a member's list from a release: cohorts by likes or attributes, and cohorts by dislikes, which are
    stored as the complement of their ids.
    """
    return tuple(c for c in listed if c >= 0), tuple(~c for c in listed if c < 0)


# ----------------------------------------------------------------------------------------------------------------- rows


DATABASES = ("knowledge", "vectors", "memberships", "codes", "behaviors")
KEY_ORDER: tuple[Kind, ...] = ("cohort", "item", "user")  # kinds in ascending order of keys
KEY_BYTES = 9
LAST_PARTITION = 255  # one byte of a key
_KIND_BYTES = {"user": b"u", "item": b"i", "cohort": b"c"}
_KINDS = {value[0]: kind for kind, value in _KIND_BYTES.items()}
_KEY = struct.Struct(">cq")
_HEAD = struct.Struct(">qHHH")  # as_of, lengths of the two names in bytes, relaxed tokens


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
    """Kinds (as bytes, uint8) and ids (int64) of keys."""
    table = np.frombuffer(b"".join(key[:KEY_BYTES] for key in keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return table[:, 0], np.ascontiguousarray(table[:, 1:]).view(">i8").ravel().astype(np.int64)


def speaking(keys: Sequence[bytes], tombstones: Tombstones) -> list[bool]:
    """Whether each key's row may be shown, because it does not belong to a forgotten user."""
    if not keys or not len(tombstones):
        return [True] * len(keys)
    kinds, ids = decode_keys(keys)
    visible: list[bool] = (~tombstones.among(ids) | (kinds != _KIND_BYTES["user"][0])).tolist()
    return visible


def kind_of(byte: int) -> str:
    """Kind for a key's first byte."""
    return _KINDS[byte]


def byte_rows(table: np.ndarray) -> list[bytes]:
    """Each row of a contiguous table [n, width] as bytes."""
    table = np.ascontiguousarray(table).view(np.uint8)
    return table.view(f"V{table.shape[1]}").ravel().tolist() if table.size else [b""] * len(table)


def decode_knowledge(kind: str, id_: int, value: bytes, where: str) -> Knowledge:
    """Knowledge from a value. Raises ReleaseError, naming `where`, for a damaged one."""
    try:
        as_of, framework, quality, relaxed = _HEAD.unpack_from(value)
        first = _HEAD.size
        second, third = first + framework, first + framework + quality
        if third > len(value):
            raise ValueError("it is truncated")
        text = value[third:].decode()
        return Knowledge(kind, id_, as_of, text, value[first:second].decode(), value[second:third].decode(), relaxed)
    except (ValueError, struct.error) as error:
        raise ReleaseError(
            f"{where}: the row of {kind} {id_} is unreadable ({error!r}). The store is corrupt: "
            f"roll back to the previous release, or publish again."
        ) from None


class RowStore(KnowledgeStore):
    """Store over a database with these rows under these keys."""

    def __init__(
        self,
        where: str,
        *,
        dim: int,
        counts: Mapping[str, int],
        partitions: Mapping[str, int],
        code_sizes: Mapping[str, Sequence[int]],
    ) -> None:
        """where: the folder or server, for errors. The others come from the release's manifest."""
        self._where, self._dim, self._counts = where, dim, counts
        self._partitions, self._code_sizes = partitions, code_sizes

    @abstractmethod
    def values(
        self, database: str, kind: str, ids: Sequence[int] | np.ndarray, partition: int = 0
    ) -> list[bytes | None]:
        """Bytes under each id in a database, None if missing. Raises ReleaseError for an unknown kind."""

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        values = self.values("knowledge", kind, ids)
        return [
            None if value is None else decode_knowledge(kind, int(id_), value, self._where)
            for id_, value in zip(ids, values, strict=True)
        ]

    def own_texts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """See KnowledgeStore.own_texts."""
        unpack, first = _HEAD.unpack_from, _HEAD.size
        texts: list[bytes | None] = []
        try:
            for value in self.values("knowledge", kind, ids):
                if value is None:
                    texts.append(None)
                    continue
                _, framework, quality, _ = unpack(value)
                texts.append(value[first + framework + quality :])
        except struct.error as error:
            raise ReleaseError(f"{self._where}: a row of {kind} {ids[len(texts)]} is unreadable ({error!r}).") from None
        return texts

    def half_vectors(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.half_vectors. Without any conversion, if all ids have their own."""
        values = self.values("vectors", kind, ids)
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            return super().half_vectors(kind, ids)
        rows = np.frombuffer(b"".join(present), dtype=np.float16).reshape(len(values), -1)
        return rows, np.ones(len(values), dtype=bool)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        vectors = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        asked: Sequence[int] | np.ndarray = ids
        rows: slice | np.ndarray = slice(None)  # of the requested ids
        for partition in range(min(n, LAST_PARTITION + 1) if self._partitions.get(kind) else 1):
            values = self.values("vectors", kind, asked, partition)
            present = [value for value in values if value is not None]
            if not present:
                break
            if len(present) < len(values):  # an id without a partition has no older ones
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
        raise ReleaseError(f"kind '{kind}' is not in a release.{did_you_mean(kind, _KIND_BYTES)}")
    return _KIND_BYTES[kind]
