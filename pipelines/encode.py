"""Knowledge to vectors, and the metadata-only vectors of the control arm, beside memory-mapped copies for training."""

import pyarrow as pa

from owlrec import __version__
from owlrec.cohorts.memberships import iterate_memberships, member_vectors
from owlrec.ctr.knowledge import KnowledgeTable
from owlrec.encoding.coded_vectors import CODED_KINDS, code_vectors
from owlrec.encoding.importing_vectors import imported_vectors, take_imported
from owlrec.encoding.vectors import encode_knowledge, encode_texts, item_metadata, user_metadata
from owlrec.errors import SchemaError
from owlrec.generation.job import read_knowledge
from owlrec.ops.console import note, progress
from owlrec.recipe import Recipe
from owlrec.schema import KINDS
from owlrec.shards import Card, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.cohorts import cohorts_folder
from pipelines.stage import Counts, Outputs, execute, main


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Encodes what `generate` wrote; each kind and source is a vectors table and a folder that training maps."""
    generated = needed_stage(workspace, "generate", "no knowledge yet")
    settings = recipe.encoder.model_dump(include={"max_tokens", "semantic_ids"})
    files = [p for p in map(imported_vectors, ("user", "item")) if workspace.exists(p)]
    settings |= {path: workspace.digest(path) for path in files}
    cohorts = cohorts_folder(recipe, workspace) if recipe.prompts.mode != "individual" else None
    print_ = fingerprint(generated.fingerprint, recipe.encoder.identity, settings, cohorts, __version__)
    folder = f"vectors/{print_[:16]}"

    def body() -> tuple[Counts, Outputs]:
        knowledge = {kind: read_knowledge(workspace, generated.outputs["knowledge"], kind) for kind in KINDS}
        users, items, histories = (workspace.read_table(t) for t in ("users", "items", "histories"))
        metadata = {"user": user_metadata(users, items, histories), "item": item_metadata(items)}
        total = sum(t.num_rows for t in knowledge.values()) + sum(len(ids) for ids, _ in metadata.values())
        encoder = recipe.encoder.load()
        counts: Counts = {"dim": encoder.dimension}

        def keep(source: str, kind: str, table: pa.Table) -> None:
            name = f"{source}-{kind}"
            sizes: tuple[int, ...] = ()
            counts[f"{source}_{kind}"] = table.num_rows
            # Members of a cohort share its vector, and have its name for a category.
            if recipe.encoder.semantic_ids and kind in CODED_KINDS and source != "collective" and table.num_rows:
                try:
                    coded = code_vectors(table, recipe.encoder.semantic_ids)
                    coded.save(workspace, folder, name)
                    counts.update({f"{source}_{kind}_{figure}": n for figure, n in coded.report.counts().items()})
                    table, sizes = coded.table, coded.quantiser.sizes
                except SchemaError as error:  # too many equal vectors, say: what was encoded is worth more than its ids
                    note(f"{name} has no semantic ids: {error}")
            workspace.write_parquet(f"{folder}/{name}.parquet", table)
            KnowledgeTable.from_table(table, kind, sizes).save(workspace.local_path(folder, name))

        with progress("encoding", total, "texts") as advance:
            for kind in KINDS:
                ready = take_imported(workspace, kind, encoder.dimension) if kind in metadata else None
                table = encode_knowledge(knowledge[kind], encoder, advance) if ready is None else ready
                if table.num_rows:
                    keep("knowledge", kind, table)
                if kind in metadata:
                    keep("metadata", kind, encode_texts(kind, *metadata[kind], encoder, advance))
                if kind == "cohort" and cohorts is not None:
                    for of in ("user", "item"):
                        members = pa.concat_tables(iterate_memberships(workspace, cohorts, (of,)))
                        keep("collective", of, member_vectors(members, table))
        return counts, {"vectors": folder, "knowledge": generated.outputs["knowledge"]}

    return execute(workspace, "encode", print_, f"{recipe.encoder.model}", body)


if __name__ == "__main__":
    main(run, __doc__ or "")
