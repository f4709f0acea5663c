"""The address of Serve's HTTP server, and the refusal to serve it openly."""

from ray._private import worker
from ray.serve import context

from owlrec.errors import ServingError
from owlrec.serving.guard import check_binding
from owlrec.serving.keys import KeyRing


def refuse_open_binding(keys: KeyRing) -> None:
    """Raises ServingError if other machines may send requests and no API key is required. For replicas."""
    # Serve gives an application no information on its listeners: this is what `serve status` itself uses (Ray 2.60).
    problem = check_binding(context._get_global_client().http_config.host, keys)
    if problem:
        raise ServingError(problem)


# ------------------------------------------------------------------------------------------------------------- stopping
# Whether Serve has requested this replica to stop.


def asked_to_stop() -> bool:
    """True after a stop request: current requests finish, but load balancers should send no new ones. For replicas."""
    # Serve informs an application only after draining: its own health page uses this (Ray 2.60).
    return any(actor._replica_impl._shutting_down for actor in worker.global_worker.actors.values())
