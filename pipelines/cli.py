"""The `owlrec` command: run a recipe, look knowledge up, move the release pointer, check the machine."""

import getpass
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from owlrec.errors import OwlRecError, RecipeError, did_you_mean
from owlrec.ops.console import note, progress, stage_header, table
from owlrec.recipe import load_recipe
from owlrec.releases import retention
from owlrec.releases.manifest import list_releases
from owlrec.releases.release import current_release, open_release, pointer, roll_back
from owlrec.schema import KINDS, Kind, as_ids
from owlrec.shards import Card, finished_stage
from owlrec.workspace import Workspace
from pipelines import forget, plan, push, serving, submit
from pipelines.serving import RecipeOption, releases_workspace
from pipelines.stage import STAGES, chosen_stages, load_stage, open_workspace, plain_errors, run_stages

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RecipePath = Annotated[Path, typer.Argument(help="the YAML file that describes the run")]
WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="in place of the recipe's own workspace")]


@app.command()
def run(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    first: Annotated[str, typer.Option("--from", help=f"first stage to run: {', '.join(STAGES)}")] = STAGES[0],
    last: Annotated[str, typer.Option("--to", help="last stage to run")] = STAGES[-1],
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="generate: ask again for the rows that ended as dead letters")
    ] = False,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", help="generate: in place of the recipe's own")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would run")] = False,
) -> None:
    """Run all stages of a recipe, or those from --from to --to; what is done already is skipped."""
    with plain_errors():
        chosen = chosen_stages(first, last)
        settings = load_recipe(recipe, workspace=workspace, max_replicas=max_replicas)
        if dry_run:
            store = Workspace(settings.workspace)
            rows = [(s, "has run" if finished_stage(store, s) else "would run") for s in chosen]
            table(f"{settings.name} in {settings.workspace}", ["stage", "state"], rows)
            return
        _summary(run_stages(settings, chosen, retry_dead=retry_dead))


@app.command()
def refresh(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    watch: Annotated[float | None, typer.Option("--watch", help="seconds between refreshes; default: one")] = None,
    max_replicas: Annotated[int | None, typer.Option("--max-replicas", help="in place of the recipe's own")] = None,
) -> None:
    """Take in the log's new interactions and renew the texts of users who have moved on, as a delta release."""
    from owlrec.ops.watching import repeat
    from pipelines.refresh import run as run_refresh

    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace, max_replicas=max_replicas)
        repeat(lambda signals: run_refresh(settings, open_workspace(settings), signals=signals), watch)


@app.command("tune-ranker")
def tune_ranker(recipe: RecipePath, workspace: WorkspaceOption = None) -> None:
    """Tune the LLM ranker of a prepared run, and judge it beside the model as it is."""
    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace)
        load_stage("tune_ranker")(settings, open_workspace(settings))


@app.command("score-pairs")
def score_pairs(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="ask again about the pairs that ended as dead letters")
    ] = False,
    max_replicas: Annotated[int | None, typer.Option("--max-replicas", help="in place of the recipe's own")] = None,
) -> None:
    """Write the LLM's probability of Yes for pairs of user and item, which CTR models then learn from."""
    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace, max_replicas=max_replicas)
        load_stage("score_pairs")(settings, open_workspace(settings), retry_dead=retry_dead)


@app.command("train-ctr")
def train_ctr(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    warm_start: Annotated[
        str | None, typer.Option("--warm-start", help="go on from this artifact of `owlrec export-ctr`")
    ] = None,
) -> None:
    """Train the CTR models of a recipe, as `owlrec run` does, or go on from an exported one on newer samples."""
    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace)
        load_stage("train_ctr")(settings, open_workspace(settings), warm_start=warm_start)


@app.command("export-ctr")
def export_ctr(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    trial: Annotated[
        str | None, typer.Option("--trial", help="such as din/knowledge/seed-0; default: the best on valid")
    ] = None,
) -> None:
    """Write a trained CTR model as an artifact that a serving process opens."""
    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace)
        exported = load_stage("export_ctr")(settings, open_workspace(settings), trial=trial)
        note(f"serve it with --artifact {exported.outputs['model']}")


@app.command("import")
def import_(
    recipe: RecipePath,
    file: Annotated[Path, typer.Argument(help="KAR JSON, OpenAI JSON lines, CSV, TSV, Parquet or an OwlRec export")],
    kind: Annotated[str, typer.Option("--kind", help="user or item: whom the texts are about")],
    format_: Annotated[str | None, typer.Option("--format", help="default: by the file's name and first lines")] = None,
    id_field: Annotated[str | None, typer.Option("--id-field", help="openai: the field with the row's id")] = None,
    as_of_ms: Annotated[
        int | None,
        typer.Option("--as-of-ms", help="the last moment that texts know of their users, where rows do not say"),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="our field = the file's column, such as id=sku; repeatable")
    ] = None,
    framework: Annotated[str, typer.Option("--framework", help="how to call the way the texts were made")] = "imported",
    workspace: WorkspaceOption = None,
) -> None:
    """Take in knowledge that was made elsewhere; `owlrec run --from encode` goes on from there."""
    from owlrec.generation.import_export import ImportSource
    from pipelines.interchange import import_knowledge

    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace)
        columns = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in column or [])}
        values = {"path": str(file), "format": format_, "kind": kind, "id_field": id_field, "columns": columns}
        try:
            source = ImportSource.model_validate({**values, "framework": framework, "as_of_ms": as_of_ms})
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise RecipeError(f"import of {file}: {'; '.join(lines)}") from None
        import_knowledge(settings, open_workspace(settings), source)


@app.command("import-vectors")
def import_vectors_(
    recipe: RecipePath,
    vectors: Annotated[Path, typer.Argument(help="a .npy file: float [n, dim]")],
    ids: Annotated[Path, typer.Argument(help="the ids, aligned: int64 .npy, or a text file with one raw id a line")],
    kind: Annotated[str, typer.Option("--kind", help="user or item: whom the vectors are about")],
    as_of_ms: Annotated[
        int | None, typer.Option("--as-of-ms", help="the last moment that the vectors know of their ids; items: 0")
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Take in vectors that another encoder made; `owlrec run --from encode` uses them in place of its own."""
    from pipelines.interchange import import_vectors

    with plain_errors():
        store, of = open_workspace(load_recipe(recipe, workspace=workspace)), _known(kind)
        if of == "cohort":
            raise OwlRecError("vectors of cohorts cannot be imported, only those of kind user or item.")
        note(f"{import_vectors(store, of, str(vectors), str(ids), as_of_ms):,} vectors")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="what to write: a name in .jsonl, .jsonl.gz or .parquet")],
    kind: Annotated[str | None, typer.Option("--kind", help="only user, item or cohort knowledge")] = None,
    workspace: serving.WorkspaceOption = None,
    recipe: RecipeOption = None,
) -> None:
    """Write all knowledge of a workspace to one file."""
    from pipelines.interchange import export_knowledge

    with plain_errors():
        if not str(file).endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise OwlRecError(f"{file}: name a file in .jsonl, .jsonl.gz or .parquet.")
        rows = export_knowledge(releases_workspace(workspace, recipe), str(file), _known(kind) if kind else None)
        note(f"{rows:,} rows in {file}")


@app.command("export-vectors")
def export_vectors_(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    release: Annotated[str | None, typer.Option("--release", help="default: the current one")] = None,
    artifact: Annotated[str | None, typer.Option("--artifact", help="of export-ctr, for its adapted fields")] = None,
) -> None:
    """Write a release's vectors as Parquet by raw id, for a trainer of your own."""
    from pipelines.export_vectors import run as export_vectors

    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace)
        export_vectors(settings, open_workspace(settings), release=release, artifact=artifact)


@app.command()
def lookup(
    kind: Annotated[str, typer.Argument(help="user, item or cohort")],
    ids: Annotated[list[str], typer.Argument(help="one or more raw ids")],
    workspace: serving.WorkspaceOption = None,
    recipe: RecipeOption = None,
    release: Annotated[str | None, typer.Option("--release", help="a release's name; default: the current one")] = None,
) -> None:
    """Print the published knowledge of users or items, and how long the lookup took."""
    with plain_errors():
        kind = _known(kind)
        with open_release(releases_workspace(workspace, recipe), release) as opened:
            start = time.perf_counter()
            texts = opened.get(kind, ids)
            took_us = (time.perf_counter() - start) * 1e6
            for id_, knowledge, codes in zip(ids, texts, opened.store.own_codes(kind, as_ids(ids)), strict=True):
                stage_header(
                    f"{kind} {id_}", f"as of {_date(knowledge.as_of)}" if knowledge and knowledge.as_of else ""
                )
                note(knowledge.text if knowledge else "no knowledge: the model uses its learned default")
                if codes:
                    note(f"semantic id {'-'.join(map(str, codes[:-1]))}, duplicate digit {codes[-1]}")
            note(f"release {opened.manifest.name}: {len(ids)} ids in {took_us:.0f} µs")


@app.command()
def releases(workspace: serving.WorkspaceOption = None, recipe: RecipeOption = None) -> None:
    """List the releases of a workspace, the current one marked."""
    with plain_errors():
        store = releases_workspace(workspace, recipe)
        current = current_release(store)
        rows = [
            (
                "*" if m.name == current else "",
                m.name,
                (m.parent or "") if m.delta else "",
                m.model,
                m.encoder,
                sum(m.knowledge.values()),
                sum(m.vectors.values()),
            )
            for m in list_releases(store)
        ]
        table(f"releases of {store.root}", ["", "release", "delta of", "model", "encoder", "texts", "vectors"], rows)


@app.command()
def rollback(
    workspace: serving.WorkspaceOption = None,
    recipe: RecipeOption = None,
    to: Annotated[str | None, typer.Option("--to", help="a release's name; default: the one before")] = None,
) -> None:
    """Make an earlier release current again."""
    with plain_errors():
        note(f"release {roll_back(releases_workspace(workspace, recipe), to)} is current")


@app.command()
def hold(
    reason: Annotated[str, typer.Option("--reason", help="shown to those whose publish is refused")] = "not said",
    workspace: serving.WorkspaceOption = None,
    recipe: RecipeOption = None,
) -> None:
    """Keep the current release: publish, refresh, compaction and roll-back are refused until `owlrec unhold`."""
    with plain_errors():
        store = releases_workspace(workspace, recipe)
        pointer(store).hold(reason, f"{getpass.getuser()}@{socket.gethostname()}")
        note(f"release {current_release(store)} stays current until `owlrec unhold`")


@app.command()
def unhold(workspace: serving.WorkspaceOption = None, recipe: RecipeOption = None) -> None:
    """Lift a hold: the current release may be replaced again."""
    with plain_errors():
        pointer(releases_workspace(workspace, recipe)).lift()
        note("no hold")


@app.command()
def compact(workspace: serving.WorkspaceOption = None, recipe: RecipeOption = None) -> None:
    """Merge the current release and what it is a delta of into one full release."""
    with plain_errors():
        store = releases_workspace(workspace, recipe)
        before = current_release(store)
        with progress("compacting", None) as advance:
            name = retention.compact(store, on_card=lambda card: advance(card.rows_out)).name
        note(f"release {name} is current" + (": it is full already" if name == before else f", in place of {before}"))


@app.command()
def prune(
    workspace: serving.WorkspaceOption = None,
    recipe: RecipeOption = None,
    keep: Annotated[int, typer.Option("--keep", min=0, help="how many that were current last stay")] = 3,
    min_age_hours: Annotated[float, typer.Option("--min-age-hours", min=0.0, help="younger ones stay")] = 1.0,
) -> None:
    """Remove old releases and their retrieval pools; the current one, and what it is a delta of, stay."""
    with plain_errors():
        removed = retention.prune(releases_workspace(workspace, recipe), keep=keep, min_age_s=3600 * min_age_hours)
        note(f"removed {', '.join(removed)}" if removed else "nothing to remove")


@app.command()
def reshard(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="user, item or cohort; default: all")] = None,
) -> None:
    """Double the number of shards of a workspace; no text is asked for again. Run it while no stage is running."""
    from pipelines.reshard import run as run_reshard

    with plain_errors():
        settings = load_recipe(recipe, workspace=workspace)
        shards = run_reshard(settings, open_workspace(settings), [_known(name) for name in kind or []])
        note(", ".join(f"{n:,} {name} shards" for name, n in shards.items()))


@app.command()
def doctor(
    workspace: Annotated[str | None, typer.Option("--workspace", help="also check that it is writable")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="a Ray head's dashboard: check that cluster")] = None,
) -> None:
    """Check versions, cores, memory and packaged assets, or a cluster; say how to mend what is missing."""
    from owlrec.ops.doctor import run_checks

    checks = submit.check_cluster(cluster, workspace) if cluster else run_checks(workspace)
    table("owlrec doctor", ["check", "state", "found", "to mend"], [(c.name, c.ok, c.found, c.mend) for c in checks])
    if any(c.ok == "fail" for c in checks):
        raise typer.Exit(1)


app.command()(serving.serve)
app.command()(serving.keys)
app.command()(push.push)
app.command()(forget.forget)
app.command()(submit.submit)
app.command()(plan.plan)


def _known(kind: str) -> Kind:
    for known in KINDS:
        if kind == known:
            return known
    raise OwlRecError(f"there is no kind '{kind}'.{did_you_mean(kind, KINDS)}")


def _summary(cards: Mapping[str, Card]) -> None:
    rows = [
        (name, card.seconds, ", ".join(f"{k} {v:,}" for k, v in card.counts.items() if isinstance(v, int)))
        for name, card in cards.items()
    ]
    table("summary", ["stage", "seconds", "counts"], rows)


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))
