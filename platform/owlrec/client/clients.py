"""The clients: the same calls, sent by httpx, blocking or from asyncio.

    from owlrec import Client
    with Client("http://127.0.0.1:8000", api_key="owl_…") as owl:
        owl.get("user", 7).text
        owl.vectors("item", [1, 2, 3]).rows

Both may be used by many threads or tasks at once, and keep their connections open between calls.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self, TypeVar, Unpack, cast

import httpx
import numpy as np

from owlrec.client import calls
from owlrec.client.calls import Ids, RankOptions, Vectors
from owlrec.client.exchange import Answer, Call, ClientError, Failure, RetryPolicy, Send, Wait, exchange
from owlrec.serving.schemas import (
    DEFAULT_FIELDS,
    BatchAnswer,
    Health,
    Kind,
    RankAnswer,
    ReleaseAnswer,
    SimilarAnswer,
    SingleAnswer,
    What,
)

T = TypeVar("T")


class _Addresses:
    """What both clients are made with."""

    def __init__(self, url: str, rank_url: str | None, api_key: str | None, policy: RetryPolicy | None) -> None:
        self._policy = policy or RetryPolicy()
        self._urls = {"knowledge": url.rstrip("/"), "rank": (rank_url or url).rstrip("/")}
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        for one in self._urls.values():
            if not one.startswith(("http://", "https://")):
                raise ClientError(f"'{one}' is no address. It begins with http:// or https://.")

    def _request(self, call: Call[T]) -> dict[str, Any]:
        url = self._urls[call.service] + call.path
        return {"method": call.method, "url": url, "content": call.body, "headers": {**self._headers, **call.headers}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._urls['knowledge']!r})"  # never the key


class Client(_Addresses):
    """The blocking client, a context manager that closes its connections."""

    def __init__(
        self,
        url: str,
        *,
        rank_url: str | None = None,
        api_key: str | None = None,
        policy: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """url: of the knowledge application, with its route prefix if it has one. rank_url: of the ranking application,
        where it is another. transport: in place of the network, for tests. Raises ClientError for what is no address.
        """
        super().__init__(url, rank_url, api_key, policy)
        self._http = httpx.Client(transport=transport)

    def get(self, kind: Kind, id: int, fields: Sequence[What] = DEFAULT_FIELDS) -> SingleAnswer | None:
        """What is known of one id, None where nothing is. Raises ClientError, as all calls do."""
        return self._run(calls.get(kind, id, fields))

    def batch_get(self, kind: Kind, ids: Ids, fields: Sequence[What] = DEFAULT_FIELDS) -> BatchAnswer:
        """What is known of up to 1,000 ids, aligned with them and all of one release; `found` is False for a miss."""
        return self._run(calls.batch_get(kind, ids, fields))

    def vectors(self, kind: Kind, ids: Ids) -> Vectors:
        """The vectors of up to 1,000 ids, aligned with them, with a mask."""
        return self._run(calls.vectors(kind, ids))

    def similar(
        self,
        kind: Kind,
        id: int | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        limit: int = 10,
    ) -> SimilarAnswer | None:
        """The entities nearest to one of them or to a vector, None where the one has no vector."""
        return self._run(calls.similar(kind, id, vector, limit))

    def current_release(self) -> ReleaseAnswer:
        """The release that lookups are answered from."""
        return self._run(calls.current_release())

    def readiness(self) -> Health:
        """Whether lookups can be answered; `problem` says why not."""
        return self._run(calls.readiness())

    def rank(self, candidates: Ids, **options: Unpack[RankOptions]) -> RankAnswer:
        """Candidates in order, the best first. options: see RankOptions."""
        return self._run(calls.rank(candidates, options))

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
                    if time.monotonic() > end:  # httpx's time-out is of each read: a server that trickles would pass it
                        return _too_slow(timeout_s)
                    parts.append(part)
                return Answer(response.status_code, response.headers, b"".join(parts))
        except httpx.TimeoutException:
            return _too_slow(timeout_s)
        except httpx.HTTPError as error:
            return Failure(str(error) or type(error).__name__)


class AsyncClient(_Addresses):
    """The same for asyncio: an async context manager whose calls are awaited."""

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

    async def get(self, kind: Kind, id: int, fields: Sequence[What] = DEFAULT_FIELDS) -> SingleAnswer | None:
        """See Client.get."""
        return await self._run(calls.get(kind, id, fields))

    async def batch_get(self, kind: Kind, ids: Ids, fields: Sequence[What] = DEFAULT_FIELDS) -> BatchAnswer:
        """See Client.batch_get."""
        return await self._run(calls.batch_get(kind, ids, fields))

    async def vectors(self, kind: Kind, ids: Ids) -> Vectors:
        """See Client.vectors."""
        return await self._run(calls.vectors(kind, ids))

    async def similar(
        self,
        kind: Kind,
        id: int | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        limit: int = 10,
    ) -> SimilarAnswer | None:
        """See Client.similar."""
        return await self._run(calls.similar(kind, id, vector, limit))

    async def current_release(self) -> ReleaseAnswer:
        """See Client.current_release."""
        return await self._run(calls.current_release())

    async def readiness(self) -> Health:
        """See Client.readiness."""
        return await self._run(calls.readiness())

    async def rank(self, candidates: Ids, **options: Unpack[RankOptions]) -> RankAnswer:
        """See Client.rank."""
        return await self._run(calls.rank(candidates, options))

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
