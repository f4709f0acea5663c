"""Knowledge in and out: a file made elsewhere stands in for `generate`; what was generated goes out as one file."""

from owlrec.encoding.imported_vectors import import_vectors as shard_vectors
from owlrec.errors import WorkspaceError
from owlrec.generation.adoption import adopt
from owlrec.generation.exporting import export_jsonl, export_parquet
from owlrec.generation.importing import ImportSource
from owlrec.generation.shards import add_manifests, iterate_knowledge
from owlrec.ops.console import note, stage_header
from owlrec.recipe import Recipe
from owlrec.schema import KINDS, Kind
from owlrec.shards import Card, Stopwatch, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.stage import from_stage


def import_knowledge(recipe: Recipe, workspace: Workspace, source: ImportSource) -> Card:
    """Reads `source` into the workspace; `encode` and what follows then work on imported knowledge."""
    stage_header("import", f"{source.kind} knowledge from {source.path}")
    needed_stage(workspace, "prepare", "the tables are not prepared")
    watch = Stopwatch()
    forget_stages(workspace, from_stage("generate"))
    adopted = adopt(workspace, recipe.domain, recipe.quality, source, shard_rows=recipe.shard_rows)
    counts = add_manifests(adopted.manifests)
    for kind in KINDS:
        if counts[f"{kind}_rows_out"] or counts[f"{kind}_rows_dead"]:
            note(f"{kind}: {counts[f'{kind}_rows_out']:,} texts, {counts[f'{kind}_rows_dead']:,} dead rows")
    print_ = fingerprint(adopted.job.fingerprint, [(m.shard, m.sha256) for m in adopted.manifests])
    counts["shards"] = len(adopted.manifests)
    return finish_stage(
        workspace,
        "generate",
        print_,
        counts=counts,
        outputs={"knowledge": adopted.job.folder},
        seconds=watch.seconds,
    )


def import_vectors(workspace: Workspace, kind: Kind, vectors: str, ids: str) -> int:
    """Takes in vectors made elsewhere, which `encode` then prefers to its own for their ids; how many there are."""
    stage_header("import", f"{kind} vectors from {vectors}")
    return shard_vectors(workspace, kind, vectors, ids).rows


def export_knowledge(workspace: Workspace, path: str, kind: Kind | None = None) -> int:
    """Writes what `generate` made to one file, JSON lines or Parquet by its name; the number of rows."""
    generated = finished_stage(workspace, "generate")
    if generated is None:
        raise WorkspaceError(f"{workspace.root}: no knowledge yet. Run `generate` first, or import some.")
    tables = iterate_knowledge(workspace, generated.outputs["knowledge"], (kind,) if kind else KINDS)
    write = export_parquet if path.endswith(".parquet") else export_jsonl
    return write(tables, path)
