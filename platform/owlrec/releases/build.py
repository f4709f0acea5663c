"""Builds a release part by part on the runner, writes its manifest when all parts exist, then swaps the pointer.

After an interruption at any point, the current release and finished parts remain: the next publish of the same
fingerprint continues in the same folder. Publishing existing contents verifies the release and makes it current again
instead of building a copy. A delta has only new or changed rows and is read on top of its parent.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.cohorts.cohort_model import memberships
from owlrec.config import Config
from owlrec.encoding.compression import Quantizer
from owlrec.errors import OwlRecError, ReleaseError, SchemaError
from owlrec.ids import Kind, shard_of
from owlrec.releases.format import (
    DATABASES,
    KEY_ORDER,
    MANIFEST,
    PartEntry,
    ReleaseManifest,
    SemanticIdEntry,
    chain,
    ids_file,
    part_file,
    quantizer_folder,
    read_manifest,
)
from owlrec.releases.parts import PartWriter
from owlrec.releases.release import ANY, check_files, make_current, read_part_ids
from owlrec.releases.similar import build_indexes, similar_file
from owlrec.releases.similar import entries as similar_entries
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import newest
from owlrec.shards import Card, Shard
from owlrec.sources.splits import last_behaviors
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import Workspace, read_tombstones, shard_file, shards_for

PART_IDS = 131_072  # maximum ids of a kind in a part: about 150 MB, which a worker builds in seconds
_READERS = 8  # threads that read shards: on an object store each mostly waits
BUILDS = "releases/.builds"  # names the folders of unfinished releases


class ReleaseInfo(Config):
    """Origin of a release's contents."""

    fingerprint: str  # of everything that shaped the contents; publishing it twice gives one release
    model: str
    encoder: str
    encoder_identity: str = ""  # EncoderConfig.identity; "" for a delta: as in its parent
    history_length: int = 0  # maximum behaviors per user; 0 for a delta: as in its parent
    parent: str | None = None  # the current release before it, if any
    delta: bool = False  # only new or changed rows; others are read from `parent`


class ReleaseRows(Protocol):
    """Contents of a release. Pickled to workers."""

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """Writes the rows of one part: each database in order of KEY_ORDER."""


@dataclass(frozen=True)
class RowsInMemory:
    """Rows in memory: a delta's, or those of a small data set."""

    knowledge: pa.Table | None  # schema.KNOWLEDGE
    vectors: pa.Table | None  # schema.vectors_schema, with a column `partition` if ids have several
    memberships: pa.Table | None  # schema.MEMBERSHIPS
    behaviors: pa.Table | None = None  # schema.BEHAVIORS

    @classmethod
    def of(cls, *tables: Iterable[pa.Table]) -> "RowsInMemory":
        """Concatenates several tables each, in the order of the fields."""
        listed = map(list, tables)
        return cls(*(pa.concat_tables(t, promote_options="default") if t else None for t in listed))

    @property
    def most_ids(self) -> int:
        """Rows of the longest table."""
        tables = (self.knowledge, self.vectors, self.memberships, self.behaviors)
        return max((t.num_rows for t in tables if t is not None), default=0)

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """See ReleaseRows.write."""
        for table, add, name in (
            (self.knowledge, writer.add_knowledge, "knowledge"),
            (self.vectors, writer.add_vectors, "vectors"),
            (self.memberships, writer.add_memberships, "memberships"),
        ):
            if table is None:
                continue
            rows = _part_rows(table, part, n_parts)
            for kind in KEY_ORDER:
                add(kind, rows.filter(pc.equal(rows["kind"], kind)), name=f"{name} to publish")
        if self.behaviors is not None:
            writer.add_behaviors(_part_rows(self.behaviors, part, n_parts), name="behaviors to publish")


@dataclass(frozen=True)
class ShardRows:
    """Newest rows of each id from `prepare`, `generate`, `encode` and `cohorts`: a part is a union of their
    shards.
    """

    knowledge: str  # the artifacts' folders, relative to the workspace
    vectors: str
    cohorts: str | None = None
    history_length: int = 0  # maximum behaviors from the interactions; 0: none

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """See ReleaseRows.write."""
        for kind in KEY_ORDER:
            table, name = self._read(workspace, self.knowledge, kind, ".parquet", kind, part, n_parts)
            if table is not None:
                writer.add_knowledge(kind, table, name=name)
        for kind in KEY_ORDER:
            table, name = self._read(workspace, self.vectors, f"knowledge-{kind}", ".arrow", kind, part, n_parts)
            if table is not None:
                _refuse_other_codebooks(kind, table, writer, name)
                writer.add_vectors(kind, table, name=name)
        for kind in KEY_ORDER if self.cohorts else ():
            table, name = self._read(workspace, self.cohorts or "", kind, ".parquet", kind, part, n_parts)
            if table is not None and kind != "cohort":
                writer.add_memberships(kind, memberships(table, marked=True).drop_columns(["as_of"]), name=name)
        if self.history_length:
            table, name = self._read(workspace, "tables", "interactions", ".parquet", "user", part, n_parts, self._last)
            if table is not None:
                writer.add_behaviors(table, name=name)

    def _last(self, interactions: pa.Table) -> pa.Table:
        return last_behaviors(interactions, self.history_length)

    @staticmethod
    def _read(
        workspace: Workspace,
        folder: str,
        below: str,
        suffix: str,
        kind: Kind,
        part: int,
        n_parts: int,
        made: Callable[[pa.Table], pa.Table] | None = None,
    ) -> tuple[pa.Table | None, str]:
        """A part's rows of one artifact, and their name in errors; None if it has none of the kind.

        made: applied to each shard, so that only a few are held completely.
        """
        n_shards = workspace.layout.shards.get(kind, 0)
        if not n_shards:
            return None, ""
        numbers = range(part, n_shards, n_parts) if n_shards > n_parts else (part & (n_shards - 1),)
        paths = [f"{folder}/{below}/{shard_file(number, suffix)}" for number in numbers]

        def read(path: str) -> pa.Table | None:
            if workspace.entry(path) is None:
                return None
            if suffix == ".parquet":
                table = workspace.read_parquet(path)
                return made(table) if made else table
            # Not through the node's cache, which is for files that are read more than once.
            return pa.ipc.open_file(workspace.open_input(path)).read_all()

        with ThreadPoolExecutor(_READERS) as pool:
            tables = {path: table for path, table in zip(paths, pool.map(read, paths), strict=True) if table}
        if not tables:
            return None, ""
        table = pa.concat_tables([newest(table) for table in tables.values()])
        return _part_rows(table, part, n_parts) if n_shards < n_parts else table, workspace.path(next(iter(tables)))


def publish(
    workspace: Workspace,
    *,
    knowledge: Iterable[pa.Table],
    vectors: Iterable[pa.Table],
    info: ReleaseInfo,
    memberships: Iterable[pa.Table] = (),
    behaviors: Iterable[pa.Table] = (),
    quantizers: Mapping[str, Quantizer] | None = None,
) -> ReleaseManifest:
    """Publishes rows in memory (a small delta) and makes the release current. `publish_rows` takes shards.

    The tables: see TableRows; they are not read if a complete release of this fingerprint exists (and, for a
    delta, of this parent). Otherwise see publish_rows.
    """
    existing = whole_release(workspace, info)
    if existing is None:
        rows = RowsInMemory.of(knowledge, vectors, memberships, behaviors)
        existing = build_release(workspace, info, rows, shards_for(rows.most_ids, PART_IDS), quantizers=quantizers)
    make_current(workspace, existing.name, expected=info.parent or ANY)
    return existing


def publish_rows(
    workspace: Workspace,
    info: ReleaseInfo,
    rows: ReleaseRows,
    n_parts: int,
    *,
    quantizers: Mapping[str, Quantizer] | None = None,
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> ReleaseManifest:
    """Publishes a release of `n_parts` (a power of two) and makes it current.

    quantizers: by kind, for the vectors' codes; a full release keeps them, and a delta uses its parent's.
    pool: builds the parts, by default in this process. on_card: called for each finished part.
    Raises SchemaError for a broken table, a duplicate key or vectors of another length than a delta's
    parent; ReleaseError if there is nothing to publish, a delta has no complete parent, written rows read back
    differently, or another release than `info.parent` is current by then; PointerHeld on a HOLD. The current release
    stays in each case.
    """
    manifest = whole_release(workspace, info) or build_release(
        workspace, info, rows, n_parts, quantizers=quantizers, pool=pool, on_card=on_card
    )
    make_current(workspace, manifest.name, expected=info.parent or ANY)
    return manifest


def build_release(
    workspace: Workspace,
    info: ReleaseInfo,
    rows: ReleaseRows,
    n_parts: int,
    *,
    base: Sequence[ReleaseManifest] = (),
    quantizers: Mapping[str, Quantizer] | None = None,
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> ReleaseManifest:
    """Builds a release, verified and complete but not current; returns its manifest.

    base: the chain, newest first, whose rows a full release takes over (for a delta, that of its parent); vectors must
    have its dimension and codes its codebooks. Otherwise see publish_rows.
    """
    if info.delta and quantizers:
        raise ValueError("a delta uses its parent's quantizers: do not pass any.")
    base = _parents(workspace, info) if info.delta else base
    info = _inherited(info, base)
    build = _begin(workspace, info)
    folder = f"releases/{build['name']}"
    try:
        books = _write_quantizers(workspace, folder, quantizers or {})
        codes = dict(base[0].semantic_ids) if base else {}
        for kind, quantizer in (quantizers or {}).items():
            codes[kind] = SemanticIdEntry(sizes=quantizer.sizes, codebooks=quantizer.fingerprint)
        stage = PartStage(folder, rows, n_parts, codes, base[0].dim if base else 0, base if info.delta else ())
        digest = fingerprint(info.fingerprint, n_parts)
        inputs = {Shard("part", number): digest for number in range(n_parts)}
        cards = list(run_stage(workspace, stage, inputs, pool, on_card).values())
        manifest = _manifest(workspace, info, build, cards, books, codes, base)
    except OwlRecError as error:
        if isinstance(error, (SchemaError, ReleaseError)):  # a fault of the rows: nothing is usable
            workspace.delete_dir(folder)
            workspace.delete_file(_build_file(info))
        raise
    workspace.write_bytes(f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
    workspace.delete_file(_build_file(info))
    return manifest


class PartStage(Stage):
    """Builds a part and its indexes on the worker's disk, reads it back and uploads it."""

    name = "publish"

    def __init__(
        self,
        folder: str,
        rows: ReleaseRows,
        n_parts: int,
        codes: Mapping[str, SemanticIdEntry],
        dim: int,
        parents: Sequence[ReleaseManifest],
    ) -> None:
        """codes: format of semantic ids, by kind. dim: see PartWriter. parents: the chain below a
        delta; ids that it does not have count as new.
        """
        self.folder, self.rows, self.n_parts = folder, rows, n_parts
        self.codes, self.dim, self.parents = dict(codes), dim, tuple(parents)

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, number = work.workspace, work.shard.number
        scratch = workspace.scratch()
        try:
            gone = read_tombstones(workspace)
            writer = PartWriter(scratch / "part.lmdb", codes=self.codes, dim=self.dim, tombstones=gone)
            try:
                self.rows.write(workspace, writer, number, self.n_parts)
            except BaseException:
                writer.abort()
                raise
            writer.close()
            work.check()
            indexes = build_indexes(writer.path, scratch)
            work.check()
            files = {
                ids_file(number): workspace.write_bytes(work.artifact.path(ids_file(number)), writer.ids_bytes()),
                part_file(number): workspace.upload(writer.path, work.artifact.path(part_file(number))),
            }
            for kind, (path, _, _) in indexes.items():
                file = similar_file(number, kind)
                files[file] = workspace.upload(path, work.artifact.path(file))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        counts: dict[str, float | int | str] = {
            f"{name}/{kind}": n for name, kinds in writer.counts.items() for kind, n in kinds.items()
        }
        for kind, (_, n, recall) in indexes.items():
            counts |= {f"similar/{kind}": n, f"recalled/{kind}": n * recall}
        counts |= {f"new/{kind}": n for kind, n in self._new_ids(workspace, writer).items()}
        counts["dim"] = writer.dim
        if writer.as_of:
            counts["as_of_min"], counts["as_of_max"] = writer.as_of
        rows = sum(sum(kinds.values()) for kinds in writer.counts.values())
        return Result(files, rows_in=rows, rows_out=rows, counts=counts)

    def _new_ids(self, workspace: Workspace, writer: PartWriter) -> dict[str, int]:
        """Number of ids by kind with knowledge in this part and in none of the parents."""
        new = {}
        for kind, pieces in writer.ids.items() if self.parents else ():
            ids = np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
            for parent in self.parents:
                homes = shard_of(ids, len(parent.parts))
                for part in np.unique(homes).tolist():
                    known = read_part_ids(workspace, parent, part, kind)
                    ids = ids[(homes != part) | ~np.isin(ids, known)] if len(known) else ids
                    homes = shard_of(ids, len(parent.parts))
            new[kind] = len(ids)
        return new


def whole_release(workspace: Workspace, info: ReleaseInfo) -> ReleaseManifest | None:
    """The release with this content, and for a delta this parent, if it is complete: files rewritten since
    are hashed.
    """
    for name in reversed(workspace.names("releases")):
        if not name.endswith(info.fingerprint[:8]) or not workspace.exists("releases", name, MANIFEST):
            continue
        try:
            manifest = read_manifest(workspace, name)
            if (manifest.fingerprint, manifest.delta) != (info.fingerprint, info.delta):
                continue
            if info.delta and manifest.parent != info.parent:
                continue
            check_files(workspace, manifest, hashed=True, unless_tagged=True)
            return manifest
        except ReleaseError:
            continue  # damaged: rebuilt under a new name
    return None


def _parents(workspace: Workspace, info: ReleaseInfo) -> list[ReleaseManifest]:
    if info.parent is None:
        raise ReleaseError(
            f"{workspace.root}: a delta release needs a parent. Pass the release that it changes, or publish in full."
        )
    try:
        return chain(workspace, info.parent)
    except ReleaseError as error:
        raise ReleaseError(
            f"release '{info.parent}' cannot be the parent of a delta: {error} Use a complete release, or "
            "publish in full."
        ) from None


def _inherited(info: ReleaseInfo, base: Sequence[ReleaseManifest]) -> ReleaseInfo:
    """`info` with missing values filled in: encoder of the vectors, and number of behaviors kept. Refuses a release on
    top of another encoder's vectors.
    """
    given, before = info.encoder_identity, base[0].encoder_identity if base else ""
    if given and before and given != before:
        raise ReleaseError(
            f"release {base[0].name} has vectors of encoder {before}, but the new ones come from {given}. "
            "Restore the encoder, or run `encode` and `publish` with the new one first."
        )
    length = info.history_length or (base[0].history_length if base else 0)
    return info.model_copy(update={"encoder_identity": given or before, "history_length": length})


def _build_file(info: ReleaseInfo) -> str:
    return f"{BUILDS}/{fingerprint(info.fingerprint, info.delta, info.parent if info.delta else None)[:16]}.json"


def _begin(workspace: Workspace, info: ReleaseInfo) -> dict[str, str]:
    """Name and moment of a release to build: those of an interrupted build of the same, if there is one.
    If several jobs start at once, one chooses and all others follow.
    """
    moment = datetime.now(UTC).replace(microsecond=0)
    while workspace.exists("releases", name := f"{moment:%Y%m%dT%H%M%SZ}-{info.fingerprint[:8]}"):
        moment += timedelta(seconds=1)  # a damaged release with the same second
    build = {"name": name, "created": moment.isoformat()}
    if not workspace.create_bytes(_build_file(info), json.dumps(build).encode()):
        build = workspace.read_json(_build_file(info))
    return build


def _write_quantizers(workspace: Workspace, folder: str, quantizers: Mapping[str, Quantizer]) -> dict[str, FileEntry]:
    """Writes codebooks into a release's folder; returns their files by relative path."""
    for kind, quantizer in quantizers.items():
        quantizer.save(workspace, f"{folder}/{quantizer_folder(kind)}")
    books = {}
    for kind in quantizers:
        below = quantizer_folder(kind)
        for name, entry in workspace.entries(folder, below).items():
            digest = workspace.digest(f"{folder}/{below}/{name}")
            books[f"{below}/{name}"] = FileEntry(bytes=entry.bytes, sha256=digest, e_tag=entry.e_tag)
    return books


def _manifest(
    workspace: Workspace,
    info: ReleaseInfo,
    build: Mapping[str, str],
    cards: Sequence[Card],
    books: Mapping[str, FileEntry],
    codes: Mapping[str, SemanticIdEntry],
    base: Sequence[ReleaseManifest],
) -> ReleaseManifest:
    sums = {name: _sums(cards, name) for name in (*DATABASES, "partitions", "new")}
    if info.delta and not any(any(kinds.values()) for kinds in sums.values()):
        raise ReleaseError(
            f"{workspace.root}: the delta of release '{info.parent}' has no rows. Nothing is new or changed, "
            "so there is nothing to publish."
        )
    as_of = [int(card.counts[end]) for card in cards for end in ("as_of_min", "as_of_max") if end in card.counts]
    as_of += [base[0].as_of_min, base[0].as_of_max] if base else []
    if not as_of:
        raise ReleaseError(f"{workspace.root}: there is no knowledge to publish. Run the generate stage first.")
    dims = sorted({int(card.counts["dim"]) for card in cards} - {0})
    if len(dims) > 1:
        raise ReleaseError(
            f"{workspace.root}: the vectors to publish have {' and '.join(map(str, dims))} components. A "
            "release has vectors of one encoder: encode all of them again."
        )
    return ReleaseManifest(
        name=build["name"],
        created=build["created"],
        knowledge=sums["knowledge"],
        vectors=sums["vectors"],
        partitions=sums["partitions"],
        memberships=sums["memberships"],
        behaviors=sums["behaviors"],
        codes=sums["codes"],
        semantic_ids=dict(codes),
        similar=similar_entries({name: _sums(cards, name) for name in ("similar", "recalled")}),
        totals=dict(Counter(sums["new"]) + Counter(base[0].totals)) if info.delta else sums["knowledge"],
        dim=dims[0] if dims else 0,
        as_of_min=min(as_of),
        as_of_max=max(as_of),
        parts=[_part_entry(card) for card in cards],
        files={path: entry for card in cards for path, entry in sorted(card.files.items())} | dict(books),
        **info.model_dump(),
    )


def _part_entry(card: Card) -> PartEntry:
    rows = {database: sum(_sums([card], database).values()) for database in DATABASES}
    rows["vectors"] += sum(_sums([card], "partitions").values())
    return PartEntry(rows=rows, ids=_sums([card], "knowledge"))


def _sums(cards: Sequence[Card], name: str) -> dict[str, int]:
    """Sums of the parts' counts under a name, by kind."""
    sums: Counter[str] = Counter()
    for card in cards:
        sums.update({k.removeprefix(f"{name}/"): int(n) for k, n in card.counts.items() if k.startswith(f"{name}/")})
    return {kind: sums[kind] for kind in sorted(sums)}


def _refuse_other_codebooks(kind: Kind, table: pa.Table, writer: PartWriter, name: str) -> None:
    """Refuses vectors coded with other codebooks than the release's."""
    coded_by = (table.schema.metadata or {}).get(b"quantizer", b"").decode()
    if coded_by and kind in writer.codes and coded_by != writer.codes[kind].codebooks:
        raise SchemaError(
            f"{name}: its codes come from codebooks {coded_by[:8]}, but the release has "
            f"{writer.codes[kind].codebooks[:8]}. Run `encode` again."
        )


def _part_rows(table: pa.Table, part: int, n_parts: int) -> pa.Table:
    """Rows of a table whose ids belong to a part."""
    if n_parts == 1:
        return table
    return table.filter(pa.array(shard_of(table["id"].to_numpy(), n_parts) == part))
