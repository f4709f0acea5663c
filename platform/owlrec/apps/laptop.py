"""All applications on this machine until somebody stops them: what `owlrec serve` runs inside its Ray session.

No Ray at import: `set_environment` has to come first.
"""

import os
import threading
from collections.abc import Callable

from pydantic import Field

from owlrec.config import Config

_ENVIRONMENT = {
    # Behind HAProxy replicas answer HTTP themselves. User code in a thread of its own would fight with that for
    # Python's lock: a refusal, a matter of microseconds, would wait up to 5 ms at each system call.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # uvloop accepts one connection in each round of its loop, asyncio all that wait. Beyond capacity rounds are long,
    # and requests that should have been refused at once would wait seconds for their connection. The gate then sets
    # TCP_NODELAY, as uvloop does.
    "RAY_USE_UVLOOP": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "owlrec.apps.gate:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy laptop a proxy needs longer than Serve's 5 s
    # A full replica answers HAProxy's checks late, and after two HAProxy would send its requests to Serve's own proxy,
    # where they get stuck. A dead one it sees at once, by connections that fail.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "12",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # 30 s before every end, else
}


class LaptopArgs(Config):
    """What to serve, and where."""

    workspace: str
    host: str
    port: int
    store: str | None = None
    keys_file: str | None = None
    replicas: int = Field(1, ge=1)  # of the lookup
    max_replicas: int = Field(2, ge=1)
    artifact: str | None = None  # of `owlrec ctr export`, relative to the workspace: with it, candidates are ranked
    recipe: str | None = None  # whose LLM re-ranks; None = none does
    llm_cpus: int = Field(1, ge=1)

    @property
    def cpus(self) -> int:
        """Of the Ray session: what the applications ask for."""
        return self.max_replicas + 1 + (1 if self.artifact else 0) + (self.llm_cpus if self.recipe else 0)


def set_environment(haproxy: bool) -> None:
    """What Serve reads when it is imported, here and in its processes: before `ray.init`. Set variables stay."""
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if haproxy else "0"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def serve_until(stopped: threading.Event, args: LaptopArgs, on_ready: Callable[[], None]) -> None:
    """Serves in the Ray session that is open; calls on_ready once all applications answer."""
    from ray import serve

    from owlrec.apps import explorer, knowledge

    # Without the proxy's access log, which has paths, and with them ids; replicas write one without.
    serve.start(
        http_options={"host": args.host, "port": args.port, "request_timeout_s": 40},  # above the applications' own
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    common = {"workspace": args.workspace, "keys_file": args.keys_file}
    lookup = knowledge.KnowledgeArgs(
        **common, store=args.store, min_replicas=args.replicas, max_replicas=args.max_replicas
    )
    applications = {"knowledge": ("/", knowledge.app(lookup))}
    if args.artifact:
        from owlrec.apps import rank

        ranking = rank.RankArgs(**common, artifact=args.artifact, recipe=args.recipe, llm_cpus=args.llm_cpus)
        applications["rank"] = ("/rank", rank.app(ranking))
    applications["explorer"] = ("/explorer", explorer.app(explorer.ExplorerArgs(**common)))
    for name, (route, application) in applications.items():
        serve.run(application, name=name, route_prefix=route)
    on_ready()
    stopped.wait()
    for name in applications:  # while the proxy still runs: replicas are not ready any more, and finish what they have
        serve.delete(name)
    serve.shutdown()
