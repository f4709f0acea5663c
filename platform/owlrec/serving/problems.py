"""Error bodies of one shape: RFC 9457 problem documents, which name the field that is wrong and never repeat its value.

What clients sent and what went wrong inside stay out of the answers: a message holds only what the schema itself says.
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from owlrec.errors import OwlRecError, StoreUnavailableError
from owlrec.serving.schemas import FieldError, ProblemDocument

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger("owlrec.serving")


class Problem(OwlRecError):
    """Ends a request with an error status."""

    def __init__(
        self, status: int, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """field: the field of the request that is wrong, if it is one's."""
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
    """Makes `app` answer its errors with problem documents. What is no error of the request is left to the guard."""

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> Response:
        return problem_response(error.status, str(error), error.errors, error.headers)

    @app.exception_handler(StoreUnavailableError)
    async def _unavailable(_: Request, error: StoreUnavailableError) -> Response:
        _log.error("%s", error)
        return problem_response(503, "the store does not answer; try again", headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:
        return problem_response(500, "an error on our side; the server's log has it under this request id")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        errors = [_field_error(e) for e in error.errors()]
        return problem_response(422, f"{errors[0].field}: {errors[0].message}", errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), headers=error.headers)


def _field_error(error: Any) -> FieldError:
    # A location reads ("body", "ids", 3); of JSON that does not parse, ("body", <offset>).
    where, *parts = error["loc"]
    if error["type"] == "json_invalid":
        return FieldError(field="body", message=f"is no JSON, at character {parts[0] if parts else 0}")
    field = ""
    for part in parts:
        field += f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}" if field else str(part)[:60]
    return FieldError(field=field or str(where), message=error["msg"].removeprefix("Value error, "))
