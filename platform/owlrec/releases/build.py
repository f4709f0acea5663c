"""Builds a release part by part on the runner, writes its manifest when all parts are there, then swaps the pointer.

An interruption at any point leaves what was current, and finished parts: the next publish of the same fingerprint goes
on in the same folder. Publishing what is there already verifies it and makes it current again instead of building a
twin. A delta holds only what is new or changed, and is read on top of its parent.
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
from owlrec.encoding.compression import Quantiser
from owlrec.errors import OwlRecError, ReleaseError, SchemaError
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
    quantiser_folder,
    read_manifest,
)
from owlrec.releases.lmdb import PartWriter
from owlrec.releases.release import ANY, check_files, make_current, read_part_ids
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import Kind, newest, shard_of
from owlrec.shards import Card, Shard
from owlrec.sources.splits import last_behaviors
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import Workspace, read_tombstones, shard_file, shards_for

PART_IDS = 131_072  # ids of a kind in a part at most: some 150 MB, which a worker builds in seconds
_READERS = 8  # threads that read shards: on an object store each waits for its answer most of the time
BUILDS = "releases/.builds"  # which folder a release that is not finished yet is built in


class ReleaseInfo(Config):
    """Where a release's contents come from."""

    fingerprint: str  # of all that shaped the contents; publishing it twice gives one release
    model: str
    encoder: str
    encoder_identity: str = ""  # EncoderConfig.identity, which changes with its weights; "" of a delta: as its parent
    history_length: int = 0  # behaviors that it keeps of each user at most; 0 of a delta: as its parent
    parent: str | None = None  # what is current before it, if anything
    delta: bool = False  # only rows that are new or changed; what it lacks is read from `parent`


class ReleaseRows(Protocol):
    """What a release is made from. Pickled to workers."""

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """Writes the rows of one part: each database in order of KEY_ORDER."""


@dataclass(frozen=True)
class RowsInMemory:
    """Rows in memory: a delta's, or those of a small world."""

    knowledge: pa.Table | None  # schema.KNOWLEDGE
    vectors: pa.Table | None  # schema.vectors_schema, with a column `partition` where ids have several
    memberships: pa.Table | None  # schema.MEMBERSHIPS
    behaviors: pa.Table | None = None  # schema.BEHAVIORS

    @classmethod
    def of(cls, *tables: Iterable[pa.Table]) -> "RowsInMemory":
        """Those of several tables each, in the order of the fields."""
        listed = map(list, tables)
        return cls(*(pa.concat_tables(t, promote_options="default") if t else None for t in listed))

    @property
    def most_ids(self) -> int:
        """Rows of its longest table."""
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
            rows = _of_part(table, part, n_parts)
            for kind in KEY_ORDER:
                add(kind, rows.filter(pc.equal(rows["kind"], kind)), name=f"{name} to publish")
        if self.behaviors is not None:
            writer.add_behaviors(_of_part(self.behaviors, part, n_parts), name="behaviors to publish")


@dataclass(frozen=True)
class ShardRows:
    """The newest rows of each id that `prepare`, `generate`, `encode` and `cohorts` wrote: a part is a union of their
    shards.
    """

    knowledge: str  # the artifacts' folders, relative to the workspace
    vectors: str
    cohorts: str | None = None
    history_length: int = 0  # of the behaviors that are taken from the interactions; 0: none are

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
        """A part's rows of one artifact, and what to call them in errors; None where it has none of the kind.

        made: what is made of each shard, so that no more than a few are held whole.
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
            # Not through the node's cache, which is for what is read more than once.
            return pa.ipc.open_file(workspace.open_input(path)).read_all()

        with ThreadPoolExecutor(_READERS) as pool:
            tables = {path: table for path, table in zip(paths, pool.map(read, paths), strict=True) if table}
        if not tables:
            return None, ""
        table = pa.concat_tables([newest(table) for table in tables.values()])
        return _of_part(table, part, n_parts) if n_shards < n_parts else table, workspace.path(next(iter(tables)))


def publish(
    workspace: Workspace,
    *,
    knowledge: Iterable[pa.Table],
    vectors: Iterable[pa.Table],
    info: ReleaseInfo,
    memberships: Iterable[pa.Table] = (),
    behaviors: Iterable[pa.Table] = (),
    quantisers: Mapping[str, Quantiser] | None = None,
) -> ReleaseManifest:
    """Publishes rows in memory, a delta's few, and makes the release current. `publish_rows` takes what lies in shards.

    The tables: see TableRows; they are not read at all where a whole release of this fingerprint exists (and, for a
    delta, of this parent). Else see publish_rows.
    """
    existing = whole_release(workspace, info)
    if existing is None:
        rows = RowsInMemory.of(knowledge, vectors, memberships, behaviors)
        existing = build_release(workspace, info, rows, shards_for(rows.most_ids, PART_IDS), quantisers=quantisers)
    make_current(workspace, existing.name, expected=info.parent or ANY)
    return existing


def publish_rows(
    workspace: Workspace,
    info: ReleaseInfo,
    rows: ReleaseRows,
    n_parts: int,
    *,
    quantisers: Mapping[str, Quantiser] | None = None,
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> ReleaseManifest:
    """Publishes a release of `n_parts` (a power of two) and makes it current.

    quantisers: by kind, whose codes the vectors have; a full release keeps them, and a delta's codes are its parent's.
    pool: where parts are built, by default in this process. on_card: hears of each part that is done.
    Raises SchemaError for a broken table, a key that occurs twice or vectors of another length than a delta's parent
    has; ReleaseError where there is nothing to publish, a delta has no complete parent, what was written does not read
    back, or another release than `info.parent` is current by then; PointerHeld on a HOLD. What was current stays in
    each case.
    """
    manifest = whole_release(workspace, info) or build_release(
        workspace, info, rows, n_parts, quantisers=quantisers, pool=pool, on_card=on_card
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
    quantisers: Mapping[str, Quantiser] | None = None,
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> ReleaseManifest:
    """Builds a release, verified and whole but not current; gives its manifest.

    base: the chain, newest first, whose rows a full release takes over (a delta's is that of its parent); vectors must
    be as long as its own, and their codes its own. Else see publish_rows.
    """
    if info.delta and quantisers:
        raise ValueError("a delta's vectors have the codes of its parent's quantisers: give it none.")
    base = _parents(workspace, info) if info.delta else base
    info = _inherited(info, base)
    build = _begin(workspace, info)
    folder = f"releases/{build['name']}"
    try:
        books = _write_quantisers(workspace, folder, quantisers or {})
        codes = dict(base[0].semantic_ids) if base else {}
        for kind, quantiser in (quantisers or {}).items():
            codes[kind] = SemanticIdEntry(sizes=quantiser.sizes, codebooks=quantiser.fingerprint)
        stage = PartStage(folder, rows, n_parts, codes, base[0].dim if base else 0, base if info.delta else ())
        digest = fingerprint(info.fingerprint, n_parts)
        inputs = {Shard("part", number): digest for number in range(n_parts)}
        cards = list(run_stage(workspace, stage, inputs, pool, on_card).values())
        manifest = _manifest(workspace, info, build, cards, books, codes, base)
    except OwlRecError as error:
        if isinstance(error, (SchemaError, ReleaseError)):  # the rows are to blame: nothing of it can be used
            workspace.delete_dir(folder)
            workspace.delete_file(_build_file(info))
        raise
    workspace.write_bytes(f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
    workspace.delete_file(_build_file(info))
    return manifest


class PartStage(Stage):
    """Builds a part on the worker's disk, reads it back and uploads it."""

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
        """codes: how semantic ids are written, by kind. dim: see PartWriter. parents: the chain that a delta is read on
        top of: ids that it does not hold are counted as new.
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
            files = {
                ids_file(number): workspace.write_bytes(work.artifact.path(ids_file(number)), writer.ids_bytes()),
                part_file(number): workspace.upload(writer.path, work.artifact.path(part_file(number))),
            }
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        counts: dict[str, float | int | str] = {
            f"{name}/{kind}": n for name, kinds in writer.counts.items() for kind, n in kinds.items()
        }
        counts |= {f"new/{kind}": n for kind, n in self._new_ids(workspace, writer).items()}
        counts["dim"] = writer.dim
        if writer.as_of:
            counts["as_of_min"], counts["as_of_max"] = writer.as_of
        rows = sum(sum(kinds.values()) for kinds in writer.counts.values())
        return Result(files, rows_in=rows, rows_out=rows, counts=counts)

    def _new_ids(self, workspace: Workspace, writer: PartWriter) -> dict[str, int]:
        """How many ids by kind have knowledge in this part and in none of the parents."""
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
    """The release with this content, and for a delta this parent, if it is whole: files that were written again since
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
            continue  # damaged: it is built again, under a new name
    return None


def _parents(workspace: Workspace, info: ReleaseInfo) -> list[ReleaseManifest]:
    if info.parent is None:
        raise ReleaseError(
            f"{workspace.root}: a delta release needs a parent. Name the release that it changes, or publish in full."
        )
    try:
        return chain(workspace, info.parent)
    except ReleaseError as error:
        raise ReleaseError(
            f"release '{info.parent}' cannot be the parent of a delta: {error} "
            f"Name a complete release, or publish in full."
        ) from None


def _inherited(info: ReleaseInfo, base: Sequence[ReleaseManifest]) -> ReleaseInfo:
    """`info` with what it does not say: whose the vectors are, and how many behaviors are kept. Refuses a release on
    top of vectors of another encoder.
    """
    given, before = info.encoder_identity, base[0].encoder_identity if base else ""
    if given and before and given != before:
        raise ReleaseError(
            f"release {base[0].name} has vectors of encoder {before}, but those to publish on top of it are of {given}."
            " Put the encoder back, or run `encode` and `publish` with the new one first."
        )
    length = info.history_length or (base[0].history_length if base else 0)
    return info.model_copy(update={"encoder_identity": given or before, "history_length": length})


def _build_file(info: ReleaseInfo) -> str:
    return f"{BUILDS}/{fingerprint(info.fingerprint, info.delta, info.parent if info.delta else None)[:16]}.json"


def _begin(workspace: Workspace, info: ReleaseInfo) -> dict[str, str]:
    """The name and moment of a release that is to be built: those of an interrupted build of the same, if there is one.
    Of several jobs that begin at once one chooses, and all go by that.
    """
    moment = datetime.now(UTC).replace(microsecond=0)
    while workspace.exists("releases", name := f"{moment:%Y%m%dT%H%M%SZ}-{info.fingerprint[:8]}"):
        moment += timedelta(seconds=1)  # a damaged twin of this very second
    build = {"name": name, "created": moment.isoformat()}
    if not workspace.create_bytes(_build_file(info), json.dumps(build).encode()):
        build = workspace.read_json(_build_file(info))
    return build


def _write_quantisers(workspace: Workspace, folder: str, quantisers: Mapping[str, Quantiser]) -> dict[str, FileEntry]:
    """Writes codebooks into a release's folder; its files there by their path relative to it."""
    for kind, quantiser in quantisers.items():
        quantiser.save(workspace, f"{folder}/{quantiser_folder(kind)}")
    books = {}
    for kind in quantisers:
        below = quantiser_folder(kind)
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
            f"{workspace.root}: the delta of release '{info.parent}' has no row. Nothing is new or changed, so there "
            f"is nothing to publish."
        )
    as_of = [int(card.counts[end]) for card in cards for end in ("as_of_min", "as_of_max") if end in card.counts]
    as_of += [base[0].as_of_min, base[0].as_of_max] if base else []
    if not as_of:
        raise ReleaseError(f"{workspace.root}: there is no knowledge to publish. Run the generate stage first.")
    dims = sorted({int(card.counts["dim"]) for card in cards} - {0})
    if len(dims) > 1:
        raise ReleaseError(
            f"{workspace.root}: the vectors to publish have {' and '.join(map(str, dims))} components. One release "
            f"holds the vectors of one encoder: encode all of them again."
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
    """What the parts count under a name, by kind."""
    sums: Counter[str] = Counter()
    for card in cards:
        sums.update({k.removeprefix(f"{name}/"): int(n) for k, n in card.counts.items() if k.startswith(f"{name}/")})
    return {kind: sums[kind] for kind in sorted(sums)}


def _refuse_other_codebooks(kind: Kind, table: pa.Table, writer: PartWriter, name: str) -> None:
    """Refuses vectors whose file says that other codebooks than the release's have coded them."""
    coded_by = (table.schema.metadata or {}).get(b"quantiser", b"").decode()
    if coded_by and kind in writer.codes and coded_by != writer.codes[kind].codebooks:
        raise SchemaError(
            f"{name}: its codes are of codebooks {coded_by[:8]}, but the release has "
            f"{writer.codes[kind].codebooks[:8]}. Run `encode` again."
        )


def _of_part(table: pa.Table, part: int, n_parts: int) -> pa.Table:
    """The rows of a table whose ids are a part's."""
    if n_parts == 1:
        return table
    return table.filter(pa.array(shard_of(table["id"].to_numpy(), n_parts) == part))
