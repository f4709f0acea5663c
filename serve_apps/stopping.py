"""Whether Serve has asked this replica to stop."""

from ray._private import worker


def asked_to_stop() -> bool:
    """True from then on: what is at work is finished, but load balancers should send nothing new. For replicas."""
    # Serve tells an application nothing before it has drained: this is what its own health page goes by (Ray 2.60).
    return any(actor._replica_impl._shutting_down for actor in worker.global_worker.actors.values())
