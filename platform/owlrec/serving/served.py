"""The current release, held open for requests and swapped between two requests, never during one.

A request leases the release it starts with and keeps it to its end, even if another one becomes current, so no
response mixes two. A watcher reads the pointer every second, so a roll-back is seen like any other swap. If a new
release cannot be opened, only `error` changes: the old one continues.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from owlrec import __version__
from owlrec.erasure.forget import ErasedCopies
from owlrec.errors import OwlRecError
from owlrec.releases.release import Release, ReleaseSource, current_release, open_release
from owlrec.serving.guard import Telemetry
from owlrec.serving.problems import Problem, Stopping, install_problem_handlers, readiness
from owlrec.serving.schemas import Health
from owlrec.serving.similar import SimilarEntities
from owlrec.workspace import Workspace, read_tombstones

REFRESH_S = 1.0  # default interval of checks for another release
_log = logging.getLogger("owlrec.serving")


class WorkspaceReleases:
    """Releases of a workspace: LMDB files on this machine, mapped into memory and shared by its replicas."""

    def __init__(self, workspace: Workspace, *, verify: bool = False) -> None:
        """verify: compare checksums whenever a release is opened, about 1 s per GB; sizes are always compared, and
        copies of remote releases are verified on arrival.
        """
        self._workspace = workspace
        self._verify = verify
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
        return open_release(self._workspace, name, verify=self._verify, warmed=True)


class _Held:
    def __init__(self, release: Release) -> None:
        self.release = release
        self.leases = 0
        self.retired = False


class ServedReleases:
    """Thread-safe. Call `refresh` regularly; close it at the end."""

    def __init__(self, source: ReleaseSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._held: _Held | None = None
        self.error: str | None = None  # last error in following the pointer

    @property
    def name(self) -> str | None:
        """Name of the release for the next request."""
        held = self._held
        return held.release.name if held else None

    def refresh(self) -> bool:
        """Opens the current release, if it is another one or users were forgotten since; returns whether it swapped.
        Never raises an OwlRecError: on failure, `error` has the message and the previous release stays.
        """
        with self._refreshing:
            try:
                name = self._source.current()
                if name is None:
                    self.error = "there is no current release any more" if self._held else "nothing has been published"
                    return False
                held = self._held
                if held and (name, self._source.forgotten()) == (held.release.name, held.release.tombstones.mark):
                    self.error = None
                    return False
                release = self._source.open(name)
            except (OwlRecError, OSError) as error:
                if self.error != str(error):
                    _log.error("the current release cannot be served: %s", error)
                self.error = str(error)
                return False
            with self._lock:
                before, self._held = self._held, _Held(release)
                self._retire(before)
            self.error = None
            _log.info("serving release %s", name)
            return True

    @contextmanager
    def lease(self) -> Iterator[Release]:
        """The current release, open until the end of the block. Raises Problem (503) if there is none."""
        with self._lock:
            held = self._held
            if held is None:
                raise Problem(503, "no release is loaded yet", headers={"Retry-After": "5"})
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
            self._retire(before)

    @staticmethod
    def _retire(held: _Held | None) -> None:
        if held is not None:
            held.retired = True
            if not held.leases:
                held.release.close()


@asynccontextmanager
async def following(
    served: ServedReleases, every_s: float, telemetry: Telemetry, *, on_swap: Callable[[str | None], None] | None = None
) -> AsyncIterator[None]:
    """Follows the pointer during the block, for the lifetime of an application or a replica.

    on_swap: called from a thread with the name of the new release.
    """
    await asyncio.to_thread(served.refresh)

    async def follow() -> None:
        while True:
            await asyncio.sleep(every_s)
            if await asyncio.to_thread(served.refresh):
                telemetry.count("swaps")
                if on_swap is not None:
                    await asyncio.to_thread(on_swap, served.name)
            with suppress(Problem), served.lease() as release:
                age = datetime.now(UTC) - datetime.fromisoformat(release.manifest.created)
                telemetry.gauge("release_age_s", age.total_seconds())
                telemetry.gauge("release_texts", float(sum(release.manifest.totals.values())))
            telemetry.gauge("release_error", 1.0 if served.error else 0.0)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# -------------------------------------------------------------------------------------------------------- following app
# Shared parts of applications over releases: they follow the current release, answer errors with problem documents,
# and report at /readyz whether they are ready.


def following_app(
    title: str,
    served: ServedReleases,
    similar: SimilarEntities,
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
        async with following(served, refresh_s, telemetry, on_swap=similar.forget_all_but):
            yield

    app = FastAPI(title=title, version=__version__, lifespan=lifespan, **options)
    install_problem_handlers(app)

    @app.get("/readyz", response_model=Health, responses={503: {"model": Health}})
    async def readyz() -> Response:
        """Whether lookups are ready, that is, whether a release is loaded."""
        missing = None if served.name else served.error or "no release is loaded yet"
        return readiness(missing, stopping, release=served.name, note=served.error)

    return app
