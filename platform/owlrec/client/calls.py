"""What can be asked of OwlRec's endpoints: each question as a Call, made and read without any input or output.

Questions are checked by the server's own schemas before they leave, so that a mistake costs no round trip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar
from urllib.parse import urlencode

import numpy as np
from pydantic import BaseModel, ValidationError

from owlrec.client.exchange import Answer, Call, ClientError
from owlrec.serving.schemas import (
    BYTES_TYPE,
    DIM_HEADER,
    RELEASE_HEADER,
    BatchAnswer,
    BatchGet,
    Behaviour,
    FieldError,
    Health,
    Kind,
    Mode,
    Rank,
    RankAnswer,
    ReleaseAnswer,
    Request,
    Similar,
    SimilarAnswer,
    SingleAnswer,
    What,
)

Ids = Sequence[int] | np.ndarray
_M = TypeVar("_M", bound=BaseModel)
_R = TypeVar("_R", bound=Request)
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Vectors:
    """Vectors aligned with the ids that were asked for, all of one release."""

    release: str
    rows: np.ndarray  # float16 [n, d]; zeros where `mask` is False
    mask: np.ndarray  # bool [n]


class RankOptions(TypedDict, total=False):
    """What a ranking may say beside its candidates; see schemas.Rank for limits and defaults."""

    user_id: int | None
    history: Sequence[Behaviour | dict[str, Any]] | None  # latest last, in place of what is known of the user
    profile: dict[str, str]
    mode: Mode
    top_k: int
    rerank: int
    llm_weight: float
    deadline_ms: int
    explain: bool


def get(kind: Kind, id: int, fields: Sequence[What]) -> Call[SingleAnswer | None]:
    """One entity; None where nothing is known of it."""
    _validated(BatchGet, {"kind": kind, "ids": [_plain(id)], "fields": list(fields)})
    query = urlencode([("fields", one) for one in fields])
    path, route = f"/v1/knowledge/{kind}/{int(id)}?{query}", "/v1/knowledge/{kind}/{id}"
    return Call("GET", path, _reader(SingleAnswer), route=route, may_miss=True)


def batch_get(kind: Kind, ids: Ids, fields: Sequence[What]) -> Call[BatchAnswer]:
    """Up to 1,000 entities, aligned with `ids`."""
    body = _json(_validated(BatchGet, {"kind": kind, "ids": _plain(ids), "fields": list(fields)}))
    return Call("POST", "/v1/knowledge:batchGet", _reader(BatchAnswer), body=body, headers=_JSON)


def vectors(kind: Kind, ids: Ids) -> Call[Vectors]:
    """Up to 1,000 vectors, as raw float16."""
    asked = _plain(ids)
    body = _json(_validated(BatchGet, {"kind": kind, "ids": asked}))

    def read(answer: Answer) -> Vectors:
        rows = np.frombuffer(answer.body, "<f2").reshape(len(asked), int(answer.headers[DIM_HEADER]))
        mask = ~np.isnan(rows).any(axis=1)
        return Vectors(answer.headers[RELEASE_HEADER], np.where(mask[:, None], rows, np.float16(0)), mask)

    return Call("POST", "/v1/knowledge:batchGet", read, body=body, headers={**_JSON, "accept": BYTES_TYPE})


def similar(
    kind: Kind, id: int | None, vector: Sequence[float] | np.ndarray | None, limit: int
) -> Call[SimilarAnswer | None]:
    """The entities nearest to one of them or to a vector; None where the one has no vector."""
    body = _json(_validated(Similar, {"kind": kind, "id": _plain(id), "vector": _plain(vector), "limit": limit}))
    return Call("POST", "/v1/knowledge:similar", _reader(SimilarAnswer), body=body, headers=_JSON, may_miss=True)


def current_release() -> Call[ReleaseAnswer]:
    """The release in force."""
    return Call("GET", "/v1/releases/current", _reader(ReleaseAnswer))


def readiness() -> Call[Health]:
    """Whether lookups can be answered; a server that is not ready says why."""
    return Call("GET", "/readyz", _reader(Health), expected=frozenset({200, 503}))


def rank(candidates: Ids, options: RankOptions) -> Call[RankAnswer]:
    """Candidates in order. It may take as long as its own deadline says."""
    asked = _validated(Rank, {"candidates": _plain(candidates), **{k: _plain(v) for k, v in options.items()}})
    return Call(
        "POST",
        "/v1/rank",
        _reader(RankAnswer),
        "rank",
        body=_json(asked),
        headers=_JSON,
        extra_s=asked.deadline_ms / 1000,
    )


def _reader(model: type[_M]) -> Any:
    return lambda answer: model.model_validate_json(answer.body)


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's own, which is what schemas take; everything else as it is."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _validated(model: type[_R], values: Mapping[str, Any]) -> _R:
    """The request. Raises ClientError where the schema says that it is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = [_field_error(e["loc"], e["msg"]) for e in error.errors(include_input=False, include_url=False)]
        told = f"{errors[0].field}: {errors[0].message}"
        raise ClientError(f"{model.__name__} was not sent, for it is wrong: {told}", errors=errors) from None


def _json(asked: Request) -> bytes:
    return asked.model_dump_json(exclude_unset=True, exclude_none=True).encode()


def _field_error(where: tuple[int | str, ...], message: str) -> FieldError:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    return FieldError(field=field or "body", message=message.removeprefix("Value error, "))
