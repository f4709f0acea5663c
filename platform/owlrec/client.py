"""HTTP clients with the same calls: `Client` blocks, `AsyncClient` is for asyncio; both use httpx.

    from owlrec import Client
    with Client("http://127.0.0.1:8000", api_key="owl_…") as owl:
        owl.get("user", 7).text
        owl.vectors("item", [1, 2, 3]).rows

Many threads or tasks may share one client; it keeps its connections open between calls.
"""

import asyncio
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote, urlencode

import httpx
import numpy as np
from pydantic import BaseModel, Field, ValidationError

from owlrec.config import Config
from owlrec.errors import OwlRecError, naming_extras
from owlrec.serving.schemas import (
    ARROW_TYPE,
    BATCH_PATH,
    BYTES_TYPE,
    DEFAULT_FIELDS,
    DIM_HEADER,
    IF_RELEASE_HEADER,
    ONE_PATH,
    RELEASE_HEADER,
    REQUEST_ID_HEADER,
    BatchAnswer,
    BatchGet,
    FeatureValue,
    FieldError,
    Health,
    HistoryEntry,
    Kind,
    Mode,
    ProblemDocument,
    Rank,
    RankAnswer,
    ReleaseAnswer,
    Request,
    Similar,
    SimilarAnswer,
    SingleAnswer,
    What,
)

if TYPE_CHECKING:
    import pyarrow as pa

# ------------------------------------------------------------------------------------------------------------- exchange
# Retry policy, without I/O: a generator that yields the next action and receives the result.
#
# Every call is a read, so it can be repeated. Waits double and have full jitter, so clients that were refused
# together do not retry together. A server that sends Retry-After is not called before that
# time.


T = TypeVar("T")
# Includes 500: that is what a client sees when a replica dies during a request.
ASKED_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class ClientError(OwlRecError):
    """A call without a result: refused, failed permanently, or not sent because it is invalid."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        errors: Sequence[FieldError] = (),
        request_id: str | None = None,
    ) -> None:
        """status: of the last response, None if there was none. errors: invalid fields. request_id: the id of the
        request in the server's log.
        """
        super().__init__(message)
        self.status = status
        self.errors = tuple(errors)
        self.request_id = request_id


class RetryPolicy(Config):
    """Number and duration of a call's attempts."""

    attempts: int = Field(4, ge=1)  # total
    first_wait_s: float = Field(0.1, gt=0)  # maximum wait before the second attempt; doubles each time
    longest_wait_s: float = Field(5.0, gt=0)
    timeout_s: float = Field(5.0, gt=0)  # per attempt
    total_s: float = Field(15.0, gt=0)  # per call: attempts and waits


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]  # case-insensitive keys
    body: bytes


@dataclass(frozen=True)
class Failure:
    """The reason for a missing response."""

    reason: str


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the function that reads its response. service: the application to call. extra_s: time on top of
    the policy's limits, for requests with their own deadline.
    """

    method: Literal["GET", "POST"]
    path: str
    read: Callable[[Answer], T]
    service: Literal["knowledge", "rank"] = "knowledge"
    route: str | None = None  # the path without ids, for messages; None if `path` has none
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_s: float = 0.0
    expected: frozenset[int] = frozenset({200})  # statuses that `read` accepts
    may_miss: bool = False  # returns None if the server has nothing for the id


@dataclass(frozen=True)
class Send:
    """Next action: send the call. timeout_s: limit for the complete response."""

    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """Next action: wait."""

    seconds: float


def exchange(
    call: Call[T],
    policy: RetryPolicy,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> Generator[Send | Wait, Answer | Failure | None, T]:
    """Steps of one call: yields Send (receives an Answer or a Failure) and Wait (receives None).

    clock: seconds; draw: a random number in [0, 1). Returns the call's result. Raises ClientError.
    """
    due = clock() + policy.total_s + call.extra_s
    attempt = 0
    while True:
        attempt += 1
        outcome = yield Send(min(policy.timeout_s + call.extra_s, max(0.001, due - clock())))
        if isinstance(outcome, Answer):
            if outcome.status in call.expected:
                return _read(call, outcome)
            if call.may_miss and _is_miss(outcome):
                return cast(T, None)
            if outcome.status not in ASKED_AGAIN:
                raise _refusal(call, outcome)
        wait = draw() * min(policy.longest_wait_s, policy.first_wait_s * 2 ** (attempt - 1))
        if isinstance(outcome, Answer):
            wait = max(wait, _retry_after_s(outcome))
        if attempt == policy.attempts or clock() + wait >= due:
            raise _given_up(call, outcome, attempt)
        yield Wait(wait)


def _refusal(call: Call[T], answer: Answer) -> ClientError:
    """The error for a response."""
    problem = _problem(answer)
    detail = problem.detail if problem else "without a message from OwlRec. Check the address."
    request_id = answer.headers.get(REQUEST_ID_HEADER)
    message = f"{_where(call)}: {answer.status}, {detail}" + (f" (request {request_id})" if request_id else "")
    return ClientError(message, status=answer.status, errors=problem.errors if problem else (), request_id=request_id)


def _given_up(call: Call[T], outcome: Answer | Failure | None, attempts: int) -> ClientError:
    if isinstance(outcome, Answer):
        error = _refusal(call, outcome)
        error.args = (f"{error}, after {attempts} attempts",)
        return error
    reason = outcome.reason if outcome else "no response"
    return ClientError(f"{_where(call)}: {reason}, after {attempts} attempts. Is the server running at that address?")


def _problem(answer: Answer) -> ProblemDocument | None:
    try:
        return ProblemDocument.model_validate_json(answer.body)
    except ValidationError:
        return None


def _is_miss(answer: Answer) -> bool:
    """Whether a 404 means an unknown id rather than an unknown path."""
    problem = _problem(answer) if answer.status == 404 else None
    return problem is not None and [e.field for e in problem.errors] == ["id"]


def _read(call: Call[T], answer: Answer) -> T:
    try:
        return call.read(answer)
    except (ValueError, KeyError):  # a ValidationError is a ValueError
        raise ClientError(
            f"{_where(call)}: the response does not match this version of OwlRec. Check the address and "
            "`owlrec.__version__`.",
            status=answer.status,
        ) from None


def _where(call: Call[T]) -> str:
    """The route without ids, since errors end up in logs."""
    return f"{call.method} {call.route or call.path}"


def _retry_after_s(answer: Answer) -> float:
    """Seconds to wait according to the header: seconds or a date (RFC 9110, section 10.2.3); 0 without it."""
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


# ---------------------------------------------------------------------------------------------------------------- calls
# Calls to OwlRec's endpoints: each function builds a request and reads its response, without I/O.
#
# The server's own schemas validate requests before they are sent, so a mistake costs no round trip.


Ids = Sequence[int | str] | np.ndarray  # ids, or raw ids as text
_M = TypeVar("_M", bound=BaseModel)
_R = TypeVar("_R", bound=Request)
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Vectors:
    """Vectors in the order of the requested ids, all from one release."""

    release: str
    rows: np.ndarray  # float16 [n, d]; zeros where `mask` is False
    mask: np.ndarray  # bool [n]


class RankOptions(TypedDict, total=False):
    """Options of a ranking besides its candidates; see schemas.Rank for limits and defaults."""

    user_id: int | None
    history: Sequence[HistoryEntry | dict[str, Any]] | None  # latest last; replaces the stored history
    profile: Mapping[str, FeatureValue]
    context: Mapping[str, FeatureValue]
    time: int | None
    mode: Mode
    top_k: int
    rerank: int
    llm_weight: float
    deadline_ms: int
    explain: bool
    labels: bool


def get_call(kind: Kind, id: int | str, fields: Sequence[What], if_release: str | None) -> Call[SingleAnswer | None]:
    """One entity, or None if unknown."""
    asked = _validated(BatchGet, {"kind": kind, "ids": [_plain(id)], "fields": list(fields), "if_release": if_release})
    query = urlencode([("fields", one) for one in fields])
    assert asked.ids is not None
    name = asked.ids[0]
    path, route = f"/v1/knowledge/{kind}/{quote(str(name), safe='')}?{query}", ONE_PATH
    headers = {IF_RELEASE_HEADER.decode(): if_release} if if_release else {}
    return Call("GET", path, _reader(SingleAnswer), route=route, headers=headers, may_miss=True)


def batch_call(kind: Kind, ids: Ids, fields: Sequence[What], if_release: str | None) -> Call[BatchAnswer]:
    """Up to 1,000 entities, aligned with `ids`."""
    asked = {"kind": kind, "ids": _plain(ids), "fields": list(fields), "if_release": if_release}
    return Call("POST", BATCH_PATH, _reader(BatchAnswer), body=_json(_validated(BatchGet, asked)), headers=_JSON)


def table_call(kinds: Mapping[Kind, Ids], fields: Sequence[What], if_release: str | None) -> Call["pa.Table"]:
    """Up to 1,000 entities of several kinds as columns."""
    with naming_extras():
        import pyarrow as pa

    plain = {kind: _plain(ids) for kind, ids in kinds.items()}
    body = _json(_validated(BatchGet, {"kinds": plain, "fields": list(fields), "if_release": if_release}))

    def read(answer: Answer) -> pa.Table:
        with pa.ipc.open_stream(answer.body) as stream:
            return stream.read_all()

    return Call("POST", BATCH_PATH, read, body=body, headers={**_JSON, "accept": ARROW_TYPE})


def vectors_call(kind: Kind, ids: Ids) -> Call[Vectors]:
    """Up to 1,000 vectors as raw float16."""
    asked = _plain(ids)
    body = _json(_validated(BatchGet, {"kind": kind, "ids": asked}))

    def read(answer: Answer) -> Vectors:
        rows = np.frombuffer(answer.body, "<f2").reshape(len(asked), int(answer.headers[DIM_HEADER]))
        mask = ~np.isnan(rows).any(axis=1)
        return Vectors(answer.headers[RELEASE_HEADER], np.where(mask[:, None], rows, np.float16(0)), mask)

    return Call("POST", BATCH_PATH, read, body=body, headers={**_JSON, "accept": BYTES_TYPE})


def similar_call(
    kind: Kind, id: int | None, vector: Sequence[float] | np.ndarray | None, limit: int
) -> Call[SimilarAnswer | None]:
    """Nearest neighbors of an entity or a vector; None if the entity has no vector."""
    body = _json(_validated(Similar, {"kind": kind, "id": _plain(id), "vector": _plain(vector), "limit": limit}))
    return Call("POST", "/v1/knowledge:similar", _reader(SimilarAnswer), body=body, headers=_JSON, may_miss=True)


def release_call() -> Call[ReleaseAnswer]:
    """The current release."""
    return Call("GET", "/v1/releases/current", _reader(ReleaseAnswer))


def readiness_call() -> Call[Health]:
    """Whether lookups are ready; if not, the response gives the reason."""
    return Call("GET", "/readyz", _reader(Health), expected=frozenset({200, 503}))


def rank_call(candidates: Ids, options: RankOptions) -> Call[RankAnswer]:
    """Candidates in order. The call may take as long as its own deadline."""
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
    """Converts numpy numbers and arrays to Python's, as schemas require; leaves everything else unchanged."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _validated(model: type[_R], values: Mapping[str, Any]) -> _R:
    """The validated request. Raises ClientError if it violates the schema."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = [_field_error(e["loc"], e["msg"]) for e in error.errors(include_input=False, include_url=False)]
        complaint = f"{errors[0].field}: {errors[0].message}"
        raise ClientError(f"{model.__name__} was not sent because it is invalid: {complaint}", errors=errors) from None


def _json(asked: Request) -> bytes:
    return asked.model_dump_json(exclude_unset=True, exclude_none=True).encode()


def _field_error(where: tuple[int | str, ...], message: str) -> FieldError:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    return FieldError(field=field or "body", message=message.removeprefix("Value error, "))


# -------------------------------------------------------------------------------------------------------------- clients


class _Addresses:
    """Constructor arguments of both clients."""

    def __init__(self, url: str, rank_url: str | None, api_key: str | None, policy: RetryPolicy | None) -> None:
        self._policy = policy or RetryPolicy()
        self._urls = {"knowledge": url.rstrip("/"), "rank": (rank_url or url).rstrip("/")}
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        for one in self._urls.values():
            if not one.startswith(("http://", "https://")):
                raise ClientError(f"'{one}' is not a valid address: it must start with http:// or https://.")

    def _request(self, call: Call[T]) -> dict[str, Any]:
        url = self._urls[call.service] + call.path
        return {"method": call.method, "url": url, "content": call.body, "headers": {**self._headers, **call.headers}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._urls['knowledge']!r})"  # never the key


class Client(_Addresses):
    """Blocking client for a running server, and a context manager that closes its connections.

    >>> import owlrec
    >>> with owlrec.Client("http://127.0.0.1:8000") as owl:  # where `owlrec serve` listens
    ...     owl.get("user", 1).text
    'first likes films'
    """

    def __init__(
        self,
        url: str,
        *,
        rank_url: str | None = None,
        api_key: str | None = None,
        policy: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """url: the knowledge application, with its route prefix if it has one. rank_url: the ranking application,
        if it has another address. transport: replaces the network in tests. Raises ClientError for an invalid address.
        """
        super().__init__(url, rank_url, api_key, policy)
        self._http = httpx.Client(transport=transport)

    def get(
        self, kind: Kind, id: int | str, fields: Sequence[What] = DEFAULT_FIELDS, *, if_release: str | None = None
    ) -> SingleAnswer | None:
        """Knowledge about one id, or None if there is none. Raises ClientError, as all calls do."""
        return self._run(get_call(kind, id, fields, if_release))

    def batch_get(
        self, kind: Kind, ids: Ids, fields: Sequence[What] = DEFAULT_FIELDS, *, if_release: str | None = None
    ) -> BatchAnswer:
        """Knowledge about up to 1,000 ids, in their order and from one release; `found` is False for a miss."""
        return self._run(batch_call(kind, ids, fields, if_release))

    def table(
        self, kinds: Mapping[Kind, Ids], fields: Sequence[What] = ("text", "vector"), *, if_release: str | None = None
    ) -> "pa.Table":
        """Knowledge about up to 1,000 ids of one or several kinds, all from one release, as an Arrow table: `kind`,
        `id`, `found` and a column per field. The fastest way to read many vectors. Needs pyarrow.
        """
        return self._run(table_call(kinds, fields, if_release))

    def vectors(self, kind: Kind, ids: Ids) -> Vectors:
        """Vectors of up to 1,000 ids, in their order, with a mask."""
        return self._run(vectors_call(kind, ids))

    def similar(
        self,
        kind: Kind,
        id: int | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        limit: int = 10,
    ) -> SimilarAnswer | None:
        """Nearest neighbors of an entity or a vector; None if the entity has no vector."""
        return self._run(similar_call(kind, id, vector, limit))

    def current_release(self) -> ReleaseAnswer:
        """The release that answers lookups."""
        return self._run(release_call())

    def readiness(self) -> Health:
        """Whether lookups are ready; `problem` gives the reason if not."""
        return self._run(readiness_call())

    def rank(self, candidates: Ids, **options: Unpack[RankOptions]) -> RankAnswer:
        """Candidates in order, the best first. options: see RankOptions."""
        return self._run(rank_call(candidates, options))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        steps, outcome = exchange(call, self._policy), None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return cast(T, done.value)
            outcome = self._send(call, step.timeout_s) if isinstance(step, Send) else None
            if isinstance(step, Wait):
                time.sleep(step.seconds)

    def _send(self, call: Call[T], timeout_s: float) -> Answer | Failure:
        end = time.monotonic() + timeout_s
        try:
            with self._http.stream(**self._request(call), timeout=timeout_s) as response:
                parts = []
                for part in response.iter_bytes():
                    if time.monotonic() > end:  # httpx's time-out applies to each read, so a slow trickle would pass it
                        return _too_slow(timeout_s)
                    parts.append(part)
                return Answer(response.status_code, response.headers, b"".join(parts))
        except httpx.TimeoutException:
            return _too_slow(timeout_s)
        except httpx.HTTPError as error:
            return Failure(str(error) or type(error).__name__)


class AsyncClient(_Addresses):
    """The same client for asyncio: an async context manager whose calls are awaited.

    >>> import asyncio
    >>> import owlrec
    >>> async def ask():
    ...     async with owlrec.AsyncClient("http://127.0.0.1:8000") as owl:
    ...         return (await owl.get("user", 1)).text
    >>> asyncio.run(ask())
    'first likes films'
    """

    def __init__(
        self,
        url: str,
        *,
        rank_url: str | None = None,
        api_key: str | None = None,
        policy: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """See Client."""
        super().__init__(url, rank_url, api_key, policy)
        self._http = httpx.AsyncClient(transport=transport)

    async def get(
        self, kind: Kind, id: int | str, fields: Sequence[What] = DEFAULT_FIELDS, *, if_release: str | None = None
    ) -> SingleAnswer | None:
        """See Client.get."""
        return await self._run(get_call(kind, id, fields, if_release))

    async def batch_get(
        self, kind: Kind, ids: Ids, fields: Sequence[What] = DEFAULT_FIELDS, *, if_release: str | None = None
    ) -> BatchAnswer:
        """See Client.batch_get."""
        return await self._run(batch_call(kind, ids, fields, if_release))

    async def table(
        self, kinds: Mapping[Kind, Ids], fields: Sequence[What] = ("text", "vector"), *, if_release: str | None = None
    ) -> "pa.Table":
        """See Client.table."""
        return await self._run(table_call(kinds, fields, if_release))

    async def vectors(self, kind: Kind, ids: Ids) -> Vectors:
        """See Client.vectors."""
        return await self._run(vectors_call(kind, ids))

    async def similar(
        self,
        kind: Kind,
        id: int | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        limit: int = 10,
    ) -> SimilarAnswer | None:
        """See Client.similar."""
        return await self._run(similar_call(kind, id, vector, limit))

    async def current_release(self) -> ReleaseAnswer:
        """See Client.current_release."""
        return await self._run(release_call())

    async def readiness(self) -> Health:
        """See Client.readiness."""
        return await self._run(readiness_call())

    async def rank(self, candidates: Ids, **options: Unpack[RankOptions]) -> RankAnswer:
        """See Client.rank."""
        return await self._run(rank_call(candidates, options))

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        steps, outcome = exchange(call, self._policy), None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return cast(T, done.value)
            outcome = await self._send(call, step.timeout_s) if isinstance(step, Send) else None
            if isinstance(step, Wait):
                await asyncio.sleep(step.seconds)

    async def _send(self, call: Call[T], timeout_s: float) -> Answer | Failure:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.request(**self._request(call), timeout=timeout_s)
            return Answer(response.status_code, response.headers, response.content)
        except (TimeoutError, httpx.TimeoutException):
            return _too_slow(timeout_s)
        except httpx.HTTPError as error:
            return Failure(str(error) or type(error).__name__)


def _too_slow(timeout_s: float) -> Failure:
    return Failure(f"no answer within {timeout_s:.3g} s")
