"""Where Serve's HTTP server listens, and the refusal to answer everybody there."""

from ray.serve import context

from owlrec.errors import ServingError
from owlrec.serving.guard import check_binding
from owlrec.serving.keys import KeyRing


def refuse_open_binding(keys: KeyRing) -> None:
    """Raises ServingError where requests may come from other machines and no API key is asked for. For replicas."""
    # Serve tells an application nothing of its listeners: this is what `serve status` itself asks (Ray 2.60).
    problem = check_binding(context._get_global_client().http_config.host, keys)
    if problem:
        raise ServingError(problem)
