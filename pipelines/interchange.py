"""Knowledge in and out: a file made elsewhere stands in for `generate`; what was generated goes out as one file."""

from owlrec.encoding.inputs import import_vectors as shard_vectors
from owlrec.errors import WorkspaceError
from owlrec.generation.import_export import ImportSource, adopt, export_jsonl, export_parquet
from owlrec.generation.job import add_cards, iterate_knowledge
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
    job = adopt(workspace, recipe.domain, recipe.quality, source)[0]
    cards = job.artifact(workspace).cards()  # of all imports: this one replaced what an earlier one brought of its kind
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


def import_vectors(workspace: Workspace, kind: Kind, vectors: str, ids: str, as_of_ms: int | None = None) -> int:
    """Takes in vectors made elsewhere, which `encode` then prefers to its own for their ids; how many there are."""
    stage_header("import", f"{kind} vectors from {vectors}")
    return shard_vectors(workspace, kind, vectors, ids, as_of_ms).rows


def export_knowledge(workspace: Workspace, path: str, kind: Kind | None = None) -> int:
    """Writes what `generate` made to one file, JSON lines or Parquet by its name; the number of rows."""
    generated = finished_stage(workspace, "generate")
    if generated is None:
        raise WorkspaceError(f"{workspace.root}: no knowledge yet. Run `generate` first, or import some.")
    tables = iterate_knowledge(workspace, generated.outputs["knowledge"], (kind,) if kind else KINDS)
    write = export_parquet if path.endswith(".parquet") else export_jsonl
    return write(tables, path)
