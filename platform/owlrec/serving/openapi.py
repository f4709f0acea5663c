"""What the OpenAPI documents of all applications say alike: the errors, and how to come in."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from owlrec.serving.problems import MEDIA_TYPE
from owlrec.serving.schemas import BYTES_TYPE, ProblemDocument

_PROBLEM = "#/components/schemas/ProblemDocument"

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": about}
    for status, about in {
        400: "the request cannot be read",
        401: "no valid API key",
        403: "not a request of this machine, where no key is asked for",
        413: "the body is too large",
        422: "a field is wrong; the message names it",
        503: "overloaded, or what it needs is not at hand: try again",
        504: "not answered in time",
    }.items()
}
PROBLEMS_OF_ONE: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    404: {"model": ProblemDocument, "description": "nothing is known of this id"},
}


BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {BYTES_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


def complete_document(app: FastAPI, *, keys: bool) -> None:
    """Makes the document of `app` say of what type errors are and, with `keys`, that requests need one."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operation in (o for path in made["paths"].values() for o in path.values()):
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if _PROBLEM in str(content.get("application/json")):  # FastAPI knows one type for all models
                        content[MEDIA_TYPE] = content.pop("application/json")
            if keys:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
