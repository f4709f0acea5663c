"""When to ask again, without any input or output: a generator that says what to do next, and is told how it went.

Every call is a read, so each may be repeated. Waits double and are drawn at random (full jitter), so that clients that
were refused together do not come back together; a server that names a moment (Retry-After) is not asked before it.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Generic, Literal, TypeVar, cast

from pydantic import Field, ValidationError

from owlrec.config import Config
from owlrec.errors import OwlRecError
from owlrec.serving.schemas import REQUEST_ID_HEADER, FieldError, ProblemDocument

T = TypeVar("T")
# 500 too: a replica that dies under a request shows as one.
ASKED_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class ClientError(OwlRecError):
    """A call that brought no answer: refused, failed for good, or never sent because it is wrong."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        errors: Sequence[FieldError] = (),
        request_id: str | None = None,
    ) -> None:
        """status: of the last answer, None where there was none. errors: which fields are wrong. request_id: under
        which the server's log has the request.
        """
        super().__init__(message)
        self.status = status
        self.errors = tuple(errors)
        self.request_id = request_id


class RetryPolicy(Config):
    """How often and how long a call is tried."""

    attempts: int = Field(4, ge=1)  # in all
    first_wait_s: float = Field(0.1, gt=0)  # at most, before the second attempt; then twice as long each time
    longest_wait_s: float = Field(5.0, gt=0)
    timeout_s: float = Field(5.0, gt=0)  # of one attempt
    total_s: float = Field(15.0, gt=0)  # of a call: attempts and waits


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]  # keys in any case
    body: bytes


@dataclass(frozen=True)
class Failure:
    """Why nothing came back."""

    reason: str


@dataclass(frozen=True)
class Call(Generic[T]):
    """One question and how its answer is read. service: which address it goes to. extra_s: what it may take beyond
    the policy's times, since it says itself how long an answer may take.
    """

    method: Literal["GET", "POST"]
    path: str
    read: Callable[[Answer], T]
    service: Literal["knowledge", "rank"] = "knowledge"
    route: str | None = None  # the path without ids, for messages; None = `path` holds none
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_s: float = 0.0
    expected: frozenset[int] = frozenset({200})  # statuses that `read` takes
    may_miss: bool = False  # None is read where the server says that it knows nothing of the id


@dataclass(frozen=True)
class Send:
    """To do next: send the call. timeout_s: after which to give up, the whole answer read."""

    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """To do next: nothing, for so long."""

    seconds: float


def exchange(
    call: Call[T],
    policy: RetryPolicy,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> Generator[Send | Wait, Answer | Failure | None, T]:
    """The steps of one call; a Send is answered with an Answer or a Failure, a Wait with None.

    clock: seconds; draw: a random number in [0, 1). Returns what the call reads. Raises ClientError.
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
    """The error that an answer stands for."""
    problem = _problem(answer)
    detail = problem.detail if problem else "and nothing about it that OwlRec would say. Check the address."
    request_id = answer.headers.get(REQUEST_ID_HEADER)
    message = f"{_where(call)}: {answer.status}, {detail}" + (f" (request {request_id})" if request_id else "")
    return ClientError(message, status=answer.status, errors=problem.errors if problem else (), request_id=request_id)


def _given_up(call: Call[T], outcome: Answer | Failure | None, attempts: int) -> ClientError:
    if isinstance(outcome, Answer):
        error = _refusal(call, outcome)
        error.args = (f"{error}, after {attempts} attempts",)
        return error
    reason = outcome.reason if outcome else "nothing came back"
    return ClientError(f"{_where(call)}: {reason}, after {attempts} attempts. Does the server run at that address?")


def _problem(answer: Answer) -> ProblemDocument | None:
    try:
        return ProblemDocument.model_validate_json(answer.body)
    except ValidationError:
        return None


def _is_miss(answer: Answer) -> bool:
    """Whether a 404 says that nothing is known of the id, rather than that there is no such path."""
    problem = _problem(answer) if answer.status == 404 else None
    return problem is not None and [e.field for e in problem.errors] == ["id"]


def _read(call: Call[T], answer: Answer) -> T:
    try:
        return call.read(answer)
    except (ValueError, KeyError):  # a ValidationError is a ValueError
        raise ClientError(
            f"{_where(call)}: the answer is not this version of OwlRec's. Check the address, and `owlrec.__version__`.",
            status=answer.status,
        ) from None


def _where(call: Call[T]) -> str:
    """The route, without ids: errors end in logs."""
    return f"{call.method} {call.route or call.path}"


def _retry_after_s(answer: Answer) -> float:
    """What the header asks to wait: seconds, or a date (RFC 9110, section 10.2.3); 0 without."""
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
