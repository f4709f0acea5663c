"""Where Serve's HTTP server listens, and the refusal to answer everybody there."""

from ray._private import worker
from ray.serve import context

from owlrec.errors import ServingError
from owlrec.serving.guard import KeyRing, check_binding


def refuse_open_binding(keys: KeyRing) -> None:
    """Raises ServingError where requests may come from other machines and no API key is asked for. For replicas."""
    # Serve tells an application nothing of its listeners: this is what `serve status` itself asks (Ray 2.60).
    problem = check_binding(context._get_global_client().http_config.host, keys)
    if problem:
        raise ServingError(problem)


# ------------------------------------------------------------------------------------------------------------- stopping
# Whether Serve has asked this replica to stop.


def asked_to_stop() -> bool:
    """True from then on: what is at work is finished, but load balancers should send nothing new. For replicas."""
    # Serve tells an application nothing before it has drained: this is what its own health page goes by (Ray 2.60).
    return any(actor._replica_impl._shutting_down for actor in worker.global_worker.actors.values())
