"""Import and export: knowledge and vectors from other sources come in, a release goes out as files."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from owlrec.ctr.artifact import read_card
from owlrec.encoding.inputs import import_vectors as shard_vectors
from owlrec.errors import ReleaseError, WorkspaceError
from owlrec.generation.import_export import ImportSource, export_jsonl, export_parquet, import_knowledge_file
from owlrec.generation.job import add_cards, iterate_knowledge
from owlrec.ids import KINDS, TABLES, Kind
from owlrec.ops.console import note, progress, stage_header
from owlrec.recipe import Recipe
from owlrec.releases.release import Release, open_release
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.runs.stages import from_stage, ray_session
from owlrec.shards import Card, Shard, Stopwatch, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

if TYPE_CHECKING:
    from owlrec.ctr.artifact import LiveState

FOLDER = "exports"
_HERE_IDS = 300_000  # up to this many lookups in this process, in about ten seconds
_IDS_AT_ONCE = 4096


def import_knowledge(recipe: Recipe, workspace: Workspace, source: ImportSource) -> Card:
    """Reads `source` into the workspace; `encode` and later stages then use the imported knowledge."""
    stage_header("import", f"{source.kind} knowledge from {source.path}")
    needed_stage(workspace, "prepare", "there are no prepared tables")
    watch = Stopwatch()
    forget_stages(workspace, from_stage("generate"))
    job = import_knowledge_file(workspace, recipe.domain, recipe.quality, source)[0]
    cards = job.artifact(workspace).cards()  # of all imports; this one replaced earlier ones of its kind
    counts = add_cards(cards.values())
    for kind in KINDS:
        if counts[f"{kind}_rows_out"] or counts[f"{kind}_rows_dead"]:
            note(f"{kind}: {counts[f'{kind}_rows_out']:,} texts, {counts[f'{kind}_rows_dead']:,} dead rows")
    named = fingerprint(job.fingerprint, [(name, card.files) for name, card in cards.items()])
    counts["shards"] = len(cards)
    return finish_stage(
        workspace,
        "generate",
        named,
        counts=counts,
        outputs={"knowledge": job.folder},
        seconds=watch.seconds,
    )


def import_vectors(
    workspace: Workspace, kind: Kind, vectors: str, ids: str, as_of_ms: int | None = None, source: str = "knowledge"
) -> int:
    """Imports vectors; returns their number. `encode` then prefers those of source `knowledge` to its own for their
    ids, and arms may read those of another source.
    """
    stage_header("import", f"{kind} vectors from {vectors}")
    return shard_vectors(workspace, kind, vectors, ids, as_of_ms, source).rows


def export_knowledge(workspace: Workspace, path: str, kind: Kind | None = None) -> int:
    """Writes the output of `generate` to one file, JSON lines or Parquet by its name; returns the number of rows."""
    generated = finished_stage(workspace, "generate")
    if generated is None:
        raise WorkspaceError(f"{workspace.root}: there is no knowledge. Run `generate` first, or import some.")
    tables = iterate_knowledge(workspace, generated.outputs["knowledge"], (kind,) if kind else KINDS)
    write = export_parquet if path.endswith(".parquet") else export_jsonl
    return write(tables, path)


class ExportVectors(Stage):
    """Shards of the users or items table, as files with the same number."""

    name = "export-vectors"

    def __init__(self, folder: str, release: str, artifact: str | None) -> None:
        """artifact: also export the fields of its adaptor."""
        self.folder, self.release, self.artifact = folder, release, artifact
        self._opened: Release | None = None
        self._live: LiveState | None = None

    def open(self, workspace: Workspace, worker: str) -> None:
        """Opens the release; its parts are fetched on demand."""
        self._opened = open_release(workspace, self.release, verify=False, lazily=True)
        if self.artifact is not None:
            from owlrec.ctr.artifact import CtrArtifact  # imports torch, which importing knowledge does not need
            from owlrec.serving.rank_api import live_state

            self._live = live_state(CtrArtifact.open(workspace, self.artifact), self._opened)

    def run(self, work: Work) -> Result:
        """Writes a shard's ids with a vector."""
        kind = cast(Kind, work.shard.kind)
        rows = work.workspace.read_shard(TABLES[kind], work.shard.number, [f"{kind}_id", "raw_id"])
        starts = range(0, max(1, len(rows)), _IDS_AT_ONCE)
        table = pa.concat_tables([self._piece(kind, rows.slice(at, _IDS_AT_ONCE)) for at in starts])
        path = work.shard.file()
        work.check()
        file = work.workspace.write_parquet(work.artifact.path(path), table)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))

    def close(self) -> None:
        """Closes the release."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _piece(self, kind: Kind, rows: pa.Table) -> pa.Table:
        assert self._opened is not None
        store, ids = self._opened.store, rows[f"{kind}_id"].to_numpy()
        vectors, there = store.vectors(kind, ids)
        kept = np.flatnonzero(there)
        ids, vectors = ids[kept], vectors[kept]
        codes, coded = store.codes(kind, ids)
        texts = store.get(kind, ids)
        columns = {
            "raw_id": rows["raw_id"].take(pa.array(kept)),
            "id": pa.array(ids, pa.int64()),
            "vector": _lists(vectors.astype(np.float16)),
            "semantic_id": pa.array(
                [own if there else None for own, there in zip(codes.tolist(), coded.tolist(), strict=True)],
                pa.list_(pa.uint16()),
            ),
            "as_of": pa.array([None if text is None else text.as_of for text in texts], pa.int64()),
            "release": pa.array([self._opened.name] * len(ids), pa.string()),
        }
        if self._live is not None:
            columns["adaptor_fields"] = _lists(self._live.fields(kind, ids))
        return pa.table(columns)


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), max(1, matrix.shape[1]))


def export_vectors(
    recipe: Recipe, workspace: Workspace, *, release: str | None = None, artifact: str | None = None
) -> dict[str, str]:
    """Writes the vectors of a release, by default the current one; returns the folder of each kind.

    Columns: raw_id, id, vector (float16), semantic_id (uint16, the duplicate digit last, null without one),
    as_of (ms, the text's cutoff), release, and with an artifact of `owlrec ctr export`
    adaptor_fields (float32): its adaptor's output. An id without a vector has no row. Existing files
    stay. Raises ReleaseError if nothing has been published, or the artifact's model was trained on other
    vectors; WorkspaceError if the artifact is missing, or its model reads no knowledge.
    """
    stage_header("export-vectors", release or "the current release")
    if artifact is not None and read_card(workspace, artifact).reads is None:
        raise WorkspaceError(f"{workspace.path(artifact)}: its model reads no knowledge, so it has no adaptor output.")
    with open_release(workspace, release, verify=False, lazily=True) as opened:
        name = opened.name
        kinds = {kind: opened.store.count(kind) for kind in TABLES}
    if not any(kinds.values()):
        raise ReleaseError(f"release {name} has neither users nor items. Publish some knowledge first.")
    folder = f"{FOLDER}/{name}{f'-{fingerprint(artifact)[:8]}' if artifact else ''}"
    stage = ExportVectors(folder, name, artifact)
    inputs = {Shard(kind, number): name for kind in kinds for number in range(workspace.n_shards(kind))}
    pool = Pool(
        here=sum(kinds.values()) <= _HERE_IDS,
        max_workers=len(inputs),
        log_path=str(workspace.log_path("export-vectors")),
    )
    session = nullcontext() if pool.here else ray_session(recipe.ray, workspace.log_path("ray"))
    with session, progress("writing vectors", None) as advance:
        cards = run_stage(workspace, stage, inputs, pool, lambda card: advance(card.rows_out))
    rows = {kind: sum(card.rows_out for card in cards.values() if card.shard.startswith(f"{kind}/")) for kind in kinds}
    note(", ".join(f"{n:,} {kind} vectors" for kind, n in rows.items()) + f": {workspace.path(folder)}")
    return {kind: f"{folder}/{kind}" for kind in kinds}
