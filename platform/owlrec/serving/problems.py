"""Error bodies: RFC 9457 problem documents, which name the invalid field and never repeat its value.

Responses contain neither client data nor internal errors: a message has only what the schema itself says.
"""

import json
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response

from owlrec.errors import OwlRecError, StoreUnavailableError
from owlrec.serving.schemas import BYTES_TYPE, FieldError, Health, ProblemDocument

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger("owlrec.serving")


class Problem(OwlRecError):
    """Ends a request with an error status."""

    def __init__(
        self, status: int, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """field: the invalid field of the request, if any."""
        super().__init__(detail)
        self.status = status
        self.errors = [FieldError(field=field, message=detail)] if field else []
        self.headers = dict(headers or {})


def problem_bytes(status: int, detail: str, errors: list[FieldError] | None = None) -> bytes:
    """A problem document as JSON."""
    document = ProblemDocument(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or [])
    return json.dumps(document.model_dump(), ensure_ascii=False).encode("utf-8", "backslashreplace")


def problem_response(
    status: int, detail: str, errors: list[FieldError] | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """A problem document as a response."""
    return Response(problem_bytes(status, detail, errors), status, dict(headers or {}), MEDIA_TYPE)


def install_problem_handlers(app: FastAPI) -> None:
    """Makes `app` answer errors with problem documents. The guard handles other errors."""

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> Response:
        return problem_response(error.status, str(error), error.errors, error.headers)

    @app.exception_handler(StoreUnavailableError)
    async def _unavailable(_: Request, error: StoreUnavailableError) -> Response:
        _log.error("%s", error)
        return problem_response(503, "the store does not respond; try again", headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:
        return problem_response(500, "a server error; find it in the server's log by this request id")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        errors = [_field_error(e) for e in error.errors()]
        return problem_response(422, f"{errors[0].field}: {errors[0].message}", errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), headers=error.headers)


def _field_error(error: Any) -> FieldError:
    # A location reads ("body", "ids", 3); for JSON that does not parse, ("body", <offset>).
    where, *parts = error["loc"]
    if error["type"] == "json_invalid":
        return FieldError(field="body", message=f"is not valid JSON, at character {parts[0] if parts else 0}")
    field = ""
    for part in parts:
        field += f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}" if field else str(part)[:60]
    return FieldError(field=field or str(where), message=error["msg"].removeprefix("Value error, "))


# -------------------------------------------------------------------------------------------------------------- openapi
# Shared parts of all applications' OpenAPI documents: the errors and the authentication.


_PROBLEM = "#/components/schemas/ProblemDocument"

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": about}
    for status, about in {
        400: "the request cannot be read",
        401: "no valid API key",
        403: "not a request from this machine, which needs no key",
        413: "the body is too large",
        422: "a field is invalid; the message names it",
        503: "overloaded, or a dependency is unavailable; try again",
        504: "no answer in time",
    }.items()
}
PROBLEMS_OF_ONE: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    404: {"model": ProblemDocument, "description": "this id has no knowledge"},
}


BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {BYTES_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


def complete_document(app: FastAPI, *, keys: bool) -> None:
    """Adds the type of errors to the document of `app` and, with `keys`, that requests need one."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operation in (o for path in made["paths"].values() for o in path.values()):
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if _PROBLEM in str(content.get("application/json")):  # FastAPI has one type for all models
                        content[MEDIA_TYPE] = content.pop("application/json")
            if keys:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------------ readiness
# Response of /readyz, for load balancers.


Stopping = Callable[[], bool]  # whether a stop was requested


def never_stopping() -> bool:
    """For a process without stop requests."""
    return False


def readiness(
    problem: str | None, stopping: Stopping, *, release: str | None = None, note: str | None = None
) -> Response:
    """200, or 503 with the problem. After a stop request a process finishes its requests and is no longer
    ready, so it gets no new ones. note: a problem that does not prevent answers.
    """
    problem = "stopping" if stopping() else problem
    health = Health(status="not ready" if problem else "ready", release=release, problem=problem or note)
    return Response(health.model_dump_json(), 503 if problem else 200, media_type="application/json")
