"""The current release, held open for requests and swapped between two requests, never during one.

A request leases the release it starts with and keeps it to its end, even if another one becomes current, so no
response mixes two. A follower reads the pointer every second, so a roll-back is seen like any other swap. If a new
release cannot be opened, only `error` changes: the old one continues. It ends for no exception.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.responses import Response

from owlrec import __version__
from owlrec.erasure.forget import ErasedCopies
from owlrec.errors import OwlRecError
from owlrec.releases.release import Release, ReleaseSource, current_release, open_release
from owlrec.serving.guard import Problem, Stopping, Telemetry, install_problem_handlers, readiness
from owlrec.serving.schemas import RELEASE_HEADER, Health, Neighbor, Similar
from owlrec.workspace import Workspace, read_tombstones

_log = logging.getLogger("owlrec.serving")
REFRESH_S = 1.0  # default interval of checks for another release
PINNED_S = 60.0  # after a swap, lookups that pin the release before it are still answered
_STUCK_S = 60.0  # without a look at the pointer: a restart may help

# -------------------------------------------------------------------------------------------------------------- similar


def similar_entities(release: Release, asked: Similar) -> list[Neighbor]:
    """Nearest entities, most similar first, without the queried one.

    Raises Problem: 404 if the entity has no vector, 422 for a vector of the wrong length or all zeros, 501 without an
    index in the release.
    """
    question = _question(release, asked)
    if release.similar is None:
        raise Problem(
            501,
            "this release has no index of similar vectors here: install faiss on the machines that publish and serve, "
            "publish again, and serve from the workspace",
        )
    tombstones = release.tombstones
    hidden = tombstones.among if asked.kind == "user" and len(tombstones) else None
    ids, scores = release.similar.nearest(asked.kind, question, asked.limit + (asked.id is not None), hidden)
    near = [
        Neighbor(id=id_, score=round(min(1.0, score), 6))
        for id_, score in zip(ids.tolist(), scores.tolist(), strict=True)
        if id_ != asked.id
    ]
    return near[: asked.limit]


def _question(release: Release, asked: Similar) -> np.ndarray:
    if asked.id is not None:
        rows, mask = release.store.vectors(asked.kind, [asked.id])
        if not mask[0]:
            raise Problem(404, "this id has no vector", field="id")
        vector = rows[0]
    else:
        vector = np.array(asked.vector, dtype=np.float32)
        if len(vector) != release.manifest.dim:
            raise Problem(
                422, f"has {len(vector)} components, but the release has {release.manifest.dim}", field="vector"
            )
    if not float(np.linalg.norm(vector)) > 0:
        raise Problem(422, "is all zeros and has no direction", field="vector")
    return vector


# --------------------------------------------------------------------------------------------------------------- served


class WorkspaceReleases:
    """Releases of a workspace: LMDB files on this machine, mapped into memory and shared by its replicas."""

    remote = False

    def __init__(self, workspace: Workspace, *, verify: bool = False, similar: bool = False) -> None:
        """similar: also open indexes of similar vectors. verify: compare checksums whenever a release is opened, about
        1 s per GB; sizes are always compared, and copies of remote releases are verified on arrival.
        """
        self._workspace = workspace
        self._verify = verify
        self._similar = similar
        self._copies = ErasedCopies(workspace)

    def current(self) -> str | None:
        """See ReleaseSource.current."""
        return current_release(self._workspace)

    def forgotten(self) -> str:
        """See ReleaseSource.forgotten. Evicts what this node has of files that were erased."""
        mark = read_tombstones(self._workspace).mark
        if mark:
            self._copies.evict()
        return mark

    def open(self, name: str) -> Release:
        """See ReleaseSource.open."""
        return open_release(self._workspace, name, verify=self._verify, warmed=True, similar=self._similar)


class _Held:
    def __init__(self, release: Release) -> None:
        self.release = release
        self.leases = 0
        self.retired = False


class ServedReleases:
    """Thread-safe. Call `refresh` regularly; close it at the end."""

    def __init__(self, source: ReleaseSource, *, pinned_s: float = 0.0) -> None:
        """pinned_s: how long a release is kept after a swap, for requests that pin it."""
        self._source = source
        self._pinned_s = pinned_s
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._held: _Held | None = None
        self._before: tuple[_Held, float] | None = None  # the release before it, and when that was replaced
        self._gone: set[str] = set()  # releases that were served here
        self._vanished = 0  # looks in a row that found no pointer any more
        self.error: str | None = None  # last error in following the pointer
        self._looked = time.time()
        self._opening = False
        self.failures = 0  # exceptions, of any kind, in following the pointer

    @property
    def name(self) -> str | None:
        """Name of the release for the next request."""
        held = self._held
        return held.release.name if held else None

    @property
    def remote(self) -> bool:
        """Whether lookups wait for a network."""
        return bool(getattr(self._source, "remote", False))

    @property
    def looked(self) -> float:
        """Last time that the pointer was looked at, successfully or not, in seconds since 1970. Now, while a release is
        being opened, which may be a copy of many minutes.
        """
        return time.time() if self._opening else self._looked

    @property
    def unready(self) -> str | None:
        """The reason for which no request can be answered; None if there is a release."""
        if self._held is None:
            return self.error or "no release is loaded yet"
        return self.error if self._vanished > 1 else None

    @property
    def unhealthy(self) -> str | None:
        """The reason for which a restart may help: the pointer has not been looked at for a minute."""
        late_s = time.time() - self.looked
        return f"the release has not been looked for since {late_s:.0f} s" if late_s > _STUCK_S else None

    def refresh(self) -> bool:
        """Opens the current release, if it is another one or users were forgotten since; returns whether it swapped.
        Never raises an Exception: on failure, `error` has the message and the previous release stays.
        """
        with self._refreshing:
            try:
                return self._refresh()
            except Exception as error:
                self.failures += 1
                message = str(error) if isinstance(error, OwlRecError | OSError) else f"{type(error).__name__}: {error}"
                if self.error != message:
                    _log.error("the current release cannot be served: %s", message, exc_info=error)
                self.error = message
                return False
            finally:
                self._looked = time.time()

    def _refresh(self) -> bool:
        name = self._source.current()
        self._drop_before()
        if name is None:
            self._vanished += 1
            self.error = "there is no current release any more" if self._held else "nothing has been published"
            return False
        self._vanished = 0
        held = self._held
        mark = self._source.forgotten() if held else ""
        if held and (name, mark) == (held.release.name, held.release.tombstones.mark):
            self.error = None
            return False
        self._opening = True
        try:
            release = self._source.open(name)
        finally:
            self._opening = False
        with self._lock:
            before, self._held = self._held, _Held(release)
            older, self._before = self._before, None
            # Not if users were forgotten since, whom it would show.
            if before and self._pinned_s and before.release.tombstones.mark == release.tombstones.mark:
                self._before = before, time.monotonic()
            else:
                self._retire(before)
            self._retire(older[0] if older else None)
            if before is not None:
                self._gone.add(before.release.name)
        self.error = None
        _log.info("serving release %s", name)
        return True

    @contextmanager
    def lease(self, pinned: str | None = None) -> Iterator[Release]:
        """The current release, open until the end of the block. pinned: the only release to answer from, which for a
        while after a swap may be the previous one.

        Raises Problem: 503 if there is none, 410 or 409 if the pinned one is not served any more, or not here.
        """
        with self._lock:
            held = self._held
            if held is None or self._vanished > 1:
                raise Problem(503, f"no release can be served: {self.unready}", headers={"Retry-After": "5"})
            if pinned is not None and pinned != held.release.name:
                before = self._before[0] if self._before else None
                if before is None or before.release.name != pinned:
                    raise self._refusal(pinned, held.release.name)
                held = before
            held.leases += 1
        try:
            yield held.release
        finally:
            with self._lock:
                held.leases -= 1
                if held.retired and not held.leases:
                    held.release.close()

    def close(self) -> None:
        """Closes the release after its last request."""
        with self._lock:
            before, self._held = self._held, None
            older, self._before = self._before, None
            self._retire(before)
            self._retire(older[0] if older else None)

    def _refusal(self, pinned: str, current: str) -> Problem:
        gone, headers = pinned in self._gone, {RELEASE_HEADER: current}
        where = "is not served any more" if gone else "is not served here"
        again = "read again from it, or without `if-release`"
        detail = f"the pinned release {where}; the current one is in the header {RELEASE_HEADER}: {again}"
        return Problem(410 if gone else 409, detail, field="if-release", headers=headers)

    def _drop_before(self) -> None:
        with self._lock:
            if self._before and time.monotonic() - self._before[1] > self._pinned_s:
                self._retire(self._before[0])
                self._before = None

    @staticmethod
    def _retire(held: _Held | None) -> None:
        if held is not None:
            held.retired = True
            if not held.leases:
                held.release.close()


@asynccontextmanager
async def following(served: ServedReleases, every_s: float, telemetry: Telemetry) -> AsyncIterator[None]:
    """Follows the pointer during the block, for the lifetime of an application or a replica."""
    await asyncio.to_thread(served.refresh)

    async def follow() -> None:
        failures = 0
        while True:
            await asyncio.sleep(every_s)
            try:
                refreshing = asyncio.ensure_future(asyncio.to_thread(served.refresh))
                while not (await asyncio.wait({refreshing}, timeout=max(1.0, every_s)))[0]:
                    _report(served, telemetry)
                if refreshing.result():
                    telemetry.count("swaps")
                _report(served, telemetry)
            except Exception:  # not even a full table of threads ends it
                served.failures += 1
                _log.exception("following the current release failed; it goes on")
            if served.failures > failures:
                telemetry.count("follow_failures", served.failures - failures)
                failures = served.failures

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _report(served: ServedReleases, telemetry: Telemetry) -> None:
    telemetry.gauge("release_looked", served.looked)
    telemetry.gauge("release_error", 1.0 if served.error else 0.0)
    with suppress(Problem), served.lease() as release:
        age = datetime.now(UTC) - datetime.fromisoformat(release.manifest.created)
        telemetry.gauge("release_age_s", age.total_seconds())
        telemetry.gauge("release_texts", float(sum(release.manifest.totals.values())))


# -------------------------------------------------------------------------------------------------------- following app
# Shared parts of applications over releases: they follow the current release, answer errors with problem documents,
# and report at /readyz whether they are ready.


def following_app(
    title: str,
    served: ServedReleases,
    *,
    refresh_s: float,
    telemetry: Telemetry,
    stopping: Stopping,
    **options: Any,
) -> FastAPI:
    """An application without its own routes. It follows the pointer while it runs.

    refresh_s: interval of reading the pointer. options: of FastAPI.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with following(served, refresh_s, telemetry):
            yield

    app = FastAPI(title=title, version=__version__, lifespan=lifespan, **options)
    install_problem_handlers(app)

    @app.get("/readyz", response_model=Health, responses={503: {"model": Health}})
    async def readyz() -> Response:
        """Whether lookups are ready, that is, whether a release is loaded."""
        return readiness(served.unready, stopping, release=served.name, note=served.error)

    return app
