"""`owlrec submit`: a pipeline as a job on a Ray cluster. Twice is once, and the command's exit code is the job's."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

import owlrec
from owlrec.errors import OwlRecError, RecipeError, did_you_mean
from owlrec.ops import submission
from owlrec.ops.console import note, warn
from owlrec.ops.doctor import Check
from owlrec.ops.submission import Submission, existing, start, submission_name
from owlrec.recipe import load_recipe
from pipelines.stage import STAGES, plain_errors

PIPELINES = (*STAGES, "tune_ranker", "score_pairs", "refresh", "export_ctr", "sweep_ctr")
_ROOT = Path(__file__).resolve().parent.parent
CODE = {
    f"{submission.CODE_ROOT}/owlrec": Path(owlrec.__file__).parent,
    **{package: _ROOT / package for package in ("pipelines", "serve_apps")},
}


def submit(
    pipeline: Annotated[str, typer.Argument(help=f"one of {', '.join(PIPELINES)}")],
    recipe: Annotated[Path, typer.Option("--recipe", help="the YAML file that describes the run")],
    address: Annotated[str, typer.Option("--address", help="the head's dashboard, such as http://HEAD:8265")],
    workspace: Annotated[str | None, typer.Option("--workspace", help="in place of the recipe's own")] = None,
    max_replicas: Annotated[int | None, typer.Option("--max-replicas", help="in place of the recipe's own")] = None,
    flag: Annotated[list[str] | None, typer.Option("--flag", help="of the pipeline, such as retry-dead")] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="the cluster's image has OwlRec: only the recipe travels")
    ] = False,
    runtime_env: Annotated[Path | None, typer.Option("--runtime-env", help="YAML of more fields: pip, say")] = None,
    driver_cpus: Annotated[float | None, typer.Option("--driver-cpus", help="default: runs on the head")] = None,
    driver_gpus: Annotated[float | None, typer.Option("--driver-gpus", help="where `encode` uses one, say")] = None,
    again: Annotated[bool, typer.Option("--again", help="also where it has succeeded before")] = False,
    look: Annotated[bool, typer.Option("--preflight/--no-preflight", help="look at the cluster first")] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log and end as the job does")] = True,
) -> None:
    """Run a pipeline as a job on a Ray cluster; the same command again follows it, reports it or resumes it."""
    with plain_errors():
        if (name := pipeline.replace("-", "_")) not in PIPELINES:
            raise RecipeError(f"there is no pipeline '{pipeline}'.{did_you_mean(name, PIPELINES)}")
        root = workspace_root(workspace or load_recipe(recipe).workspace)
        settings = load_recipe(recipe, workspace=root, max_replicas=max_replicas)
        submission.refuse_local_paths(settings)
        jobs, words = submission.connect(address), [f"--{f}" for f in flag or []]
        id_ = submission_name(settings, name, words)
        again = again or name == "refresh"  # which finds new events each time
        attempt = existing(jobs, id_, again=again)
        if attempt is None:
            words += ["--recipe", submission.RECIPE, "--workspace", root]
            words += ["--max-replicas", str(max_replicas)] if max_replicas is not None else []
            with submission.job_folder(recipe, {} if installed else CODE) as folder:
                environment = submission.runtime_env(folder, installed=installed, extra=runtime_env)
                if look:
                    demand = submission.gpu_demand(settings, name)
                    checks = submission.examine_inside(jobs, environment, root, demand)
                    submission.refuse(checks)
                    for check in checks:
                        if check.ok == "warn":
                            warn(f"{check.found}. If they never come, {check.mend}.")
                command = shlex.join(["python", "-m", f"pipelines.{name}", *words])
                job = Submission(id_, command, environment, driver_cpus, driver_gpus)
                attempt = start(jobs, job, again=again)
        if attempt.state == "finished":
            note(f"job {attempt.id} has succeeded before, nothing to do; --again runs it once more")
            return
        note(f"job {attempt.id} {'is running already' if attempt.state == 'running' else 'started'}")
        if wait:
            raise typer.Exit(submission.follow_to_end(jobs, attempt.id))


def check_cluster(address: str, workspace: str | None) -> list[Check]:
    """What `owlrec doctor --cluster` finds, a workspace as the cluster's machines see it included."""
    jobs, checks = submission.examine(address)
    if jobs is None:
        return checks
    root = workspace_root(workspace) if workspace else None
    with submission.job_folder(None, CODE) as folder:
        environment = submission.runtime_env(folder, installed=False)
        try:
            return [*checks, *submission.examine_inside(jobs, environment, root)]
        except OwlRecError as error:
            return [*checks, Check("jobs", "fail", str(error), "see above")]


def workspace_root(workspace: str) -> str:
    """A workspace as the cluster's machines should open it: theirs is another current folder."""
    return workspace if "://" in workspace else os.path.abspath(os.path.expanduser(workspace))
