"""What the OpenAPI documents of all applications say alike: the errors, and how to come in."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from owlrec.serving.problems import ProblemDocument

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


def add_keys(app: FastAPI, required: bool) -> None:
    """Makes the document of `app` say that requests need an API key, where they do."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            if required:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
