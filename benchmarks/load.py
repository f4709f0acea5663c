"""A load generator over HTTP/1.1, as a process of its own: open loop (arrivals come when they come, and wait is
counted) or closed loop (as fast as answers arrive).

`python -m benchmarks.load` reads a LoadSpec as JSON from its standard input and prints a LoadResult as JSON. It speaks
just enough HTTP to cost the measured machine little: one request a time on each of its connections, answers with a
Content-Length.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import cast
from urllib.parse import urlsplit

import numpy as np
import uvloop
from pydantic import BaseModel, ConfigDict


class LoadSpec(BaseModel):
    """What to ask, and how often."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    url: str
    bodies: list[str] = []  # of POST requests, in turns; none: GET of `paths`
    paths: list[str] = []
    headers: dict[str, str] = {}
    rate: float | None = None  # requests/s, as a Poisson process; None = closed loop
    seconds: float
    connections: int = 16  # at most, where `rate` is given
    count: str = ""  # a word to look for in answers
    count_within_s: float = float("inf")  # of the answers that came so soon
    check_labels: bool = False  # every text of an answer begins with one and the same word, a release's own


class LoadResult(BaseModel):
    """What came back. Times are nan where there is nothing to measure."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    seconds: float
    asked: int
    statuses: dict[str, int]  # "lost" for an answer that never came
    ok_per_s: float  # that came before the seconds of the spec were over
    ok_p50_ms: float
    ok_p99_ms: float
    refused_p99_ms: float  # of every answer but 200
    counted: int = 0  # answers with 200 that held the word to count, and came soon enough
    labels: dict[str, list[str]] = {}  # by release: what its texts began with
    mixed: int = 0  # answers whose texts began with different words


def main() -> None:
    """Runs the spec that standard input holds."""
    print(uvloop.run(_Load(LoadSpec.model_validate_json(sys.stdin.read())).run()).model_dump_json())


class _Load:
    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        parts = urlsplit(spec.url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.requests = _requests(spec, parts.path)
        self.free: list[_Connection] = []
        self.slots = asyncio.Semaphore(spec.connections)
        self.times: list[tuple[int, float]] = []  # status (0: lost), seconds
        self.ok_in_time = 0  # before the spec's seconds were over
        self.end = 0.0
        self.labels: dict[str, set[str]] = {}
        self.mixed = 0
        self.counted = 0

    async def run(self) -> LoadResult:
        start = time.perf_counter()
        self.end = start + self.spec.seconds
        if self.spec.rate is None:
            await asyncio.gather(*[self._closed(worker) for worker in range(self.spec.connections)])
        else:
            gaps = np.random.default_rng(0).exponential(1 / self.spec.rate, int(self.spec.rate * self.spec.seconds * 2))
            due = start + np.cumsum(gaps)
            due = due[due < self.end]
            tasks = []
            for number, at in enumerate(due.tolist()):
                if (wait := at - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(self._one(number, at)))
            await asyncio.gather(*tasks)
        return self._result(time.perf_counter() - start)

    async def _closed(self, worker: int) -> None:
        number = worker
        while (now := time.perf_counter()) < self.end:
            await self._one(number, now)
            number += self.spec.connections

    async def _one(self, number: int, due: float) -> None:
        async with self.slots:
            status = 0
            try:
                connection = self._connected() or await self._connect()
                async with asyncio.timeout(30):
                    status, body, keep = await connection.ask(self.requests[number % len(self.requests)])
                if keep:
                    self.free.append(connection)
                else:
                    connection.close()
                if status == 200 and self.spec.check_labels:
                    self._check(body)
                if status == 200 and self.spec.count and time.perf_counter() - due <= self.spec.count_within_s:
                    self.counted += self.spec.count.encode() in body
            except (OSError, TimeoutError):
                status = 0
            now = time.perf_counter()
            self.times.append((status, now - due))
            self.ok_in_time += status == 200 and now <= self.end

    def _connected(self) -> "_Connection | None":
        """A connection that is free, and that the server has not closed for having been idle too long."""
        while self.free:
            connection = self.free.pop()
            if not connection.closed:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self.host, self.port)
        return connection

    def _check(self, body: bytearray) -> None:
        answer = json.loads(body)
        labels = {result["text"].split(" ", 1)[0] for result in answer["results"]}
        self.mixed += len(labels) > 1
        self.labels.setdefault(answer["release"], set()).update(labels)

    def _result(self, seconds: float) -> LoadResult:
        ok = [t for status, t in self.times if status == 200]
        refused = [t for status, t in self.times if status not in (0, 200)]
        counts = Counter(str(status) if status else "lost" for status, _ in self.times)

        def percentile(values: list[float], p: int) -> float:
            return float(np.percentile(values, p)) * 1e3 if values else float("nan")

        return LoadResult(
            seconds=seconds,
            asked=len(self.times),
            statuses=dict(counts),
            ok_per_s=self.ok_in_time / self.spec.seconds,
            ok_p50_ms=percentile(ok, 50),
            ok_p99_ms=percentile(ok, 99),
            refused_p99_ms=percentile(refused, 99),
            counted=self.counted,
            labels={release: sorted(seen) for release, seen in self.labels.items()},
            mixed=self.mixed,
        )


def _requests(spec: LoadSpec, path: str) -> list[bytes]:
    headers = {"Host": urlsplit(spec.url).netloc, **spec.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if not spec.bodies:
        return [f"GET {one} HTTP/1.1\r\n{lines}\r\n".encode() for one in spec.paths]
    kind = "Content-Type: application/json\r\n"
    return [
        f"POST {path} HTTP/1.1\r\n{lines}{kind}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()
        for body in spec.bodies
    ]


class _Connection(asyncio.Protocol):
    """One request at a time; a stream of asyncio would cost three times as much, on the cores that are measured."""

    closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reset()

    def ask(self, request: bytes) -> "asyncio.Future[tuple[int, bytearray, bool]]":
        """Status, body, and whether the connection can be used again: not after a body of unknown length, as proxies'
        refusals have.
        """
        self._answer: asyncio.Future[tuple[int, bytearray, bool]] = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._size:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._received[:end]).lower()
            length = head.partition(b"content-length:")[2].split(b"\r\n", 1)[0].strip()
            self._status, self._keep = int(head[9:12]), bool(length) and b"connection: close" not in head
            self._body, self._size = end + 4, end + 4 + int(length or b"0")
        if len(self._received) >= self._size:
            del self._received[: self._body]  # without a copy
            answer = self._status, self._received, self._keep
            self._reset()
            if not self._answer.done():
                self._answer.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if (waiting := getattr(self, "_answer", None)) and not waiting.done():
            waiting.set_exception(ConnectionError("closed"))

    def close(self) -> None:
        self.closed = True
        self._transport.close()

    def _reset(self) -> None:
        self._received, self._size = bytearray(), 0


if __name__ == "__main__":
    main()
