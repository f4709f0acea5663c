"""The explorer as a Ray Serve application: `serve run serve_apps.explorer:app workspace=runs/movielens-demo`.

Pages for people, over the same release as lookups; off loopback a browser asks for a key (any name, the key as the
password). It reads a workspace's tables as well, for names and histories.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.exceptions import RayServeException

from owlrec.config import Config
from owlrec.errors import ServingError
from owlrec.machine import api_keys
from owlrec.serving.explorer.pages import build_explorer
from owlrec.serving.guard import KeyRing, Limits
from owlrec.serving.knowledge_api import KnowledgeConfig
from owlrec.serving.questions import WorkspaceTables
from owlrec.serving.schemas import Rank, RankAnswer
from owlrec.serving.served import ServedReleases, SimilarEntities, WorkspaceReleases
from owlrec.workspace import Workspace
from serve_apps.binding import asked_to_stop, refuse_open_binding
from serve_apps.telemetry import RayTelemetry, log_with_serve


class ExplorerArgs(Config):
    """The arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str
    rank_app: str = "rank"  # the name of the ranking application; without one, the page says so
    keys_file: str | None = None
    timeout_s: float = Field(10.0, gt=0)
    num_cpus: float = Field(0.1, ge=0)  # people click seldom


@serve.ingress()
class ExplorerReplica:
    """The one replica."""

    def __init__(self, args: dict[str, Any]) -> None:
        """args: of ExplorerArgs."""
        settings = ExplorerArgs.model_validate(args)
        self._keys = KeyRing(settings.keys_file, api_keys())
        refuse_open_binding(self._keys)
        log_with_serve()
        self._config = KnowledgeConfig(limits=Limits(max_active=16, timeout_s=settings.timeout_s))
        self._rank_app = settings.rank_app
        workspace = Workspace(settings.workspace)
        self._served = ServedReleases(WorkspaceReleases(workspace))
        self._similar = SimilarEntities(settings.workspace)
        self._tables = WorkspaceTables(workspace)

    def __serve_build_asgi_app__(self) -> FastAPI:
        telemetry = RayTelemetry("explorer")
        return build_explorer(
            self._served, self._similar, self._tables, self._keys, self._config, telemetry, self._rank, asked_to_stop
        )

    async def _rank(self, asked: Rank) -> RankAnswer:
        try:
            handle = serve.get_app_handle(self._rank_app)
        except RayServeException:
            raise ServingError("no ranking application is deployed beside this page") from None
        return RankAnswer.model_validate(await handle.rank.remote(asked.model_dump()))


def app(args: ExplorerArgs) -> serve.Application:
    """Builds the application."""
    deployment = serve.deployment(
        ExplorerReplica,
        name="Explorer",
        ray_actor_options={"num_cpus": args.num_cpus},
        max_ongoing_requests=16,
        max_queued_requests=64,
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    application: serve.Application = deployment.bind(args.model_dump())
    return application
