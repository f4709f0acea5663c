"""What /readyz answers: the truth, for load balancers to go by."""

from collections.abc import Callable

from starlette.responses import Response

from owlrec.serving.schemas import Health

Stopping = Callable[[], bool]  # whether this process was asked to stop


def never_stopping() -> bool:
    """Of a process that nobody asks."""
    return False


def readiness(
    problem: str | None, stopping: Stopping, *, release: str | None = None, note: str | None = None
) -> Response:
    """200, or 503 with what keeps it from answering. A process that was asked to stop finishes what it has and is not
    ready from then on, so that nothing new is sent to it. note: what is wrong though requests are answered.
    """
    problem = "stopping" if stopping() else problem
    health = Health(status="not ready" if problem else "ready", release=release, problem=problem or note)
    return Response(health.model_dump_json(), 503 if problem else 200, media_type="application/json")
