"""The current release, held open for requests, and its indexes of similar vectors."""

import asyncio
import logging
import math
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.responses import Response

from owlrec import __version__
from owlrec.erasure.forget import ErasedCopies
from owlrec.errors import OwlRecError
from owlrec.machine import cache_folder
from owlrec.releases.release import Release, ReleaseSource, current_release, open_release
from owlrec.serving.guard import Problem, Stopping, Telemetry, install_problem_handlers, readiness
from owlrec.serving.schemas import Health, Kind, Neighbor, Similar
from owlrec.storage import Storage, fingerprint
from owlrec.workspace import Workspace, read_tombstones

# -------------------------------------------------------------------------------------------------------------- similar
# Similar entities by vector: one faiss index per release and kind, built once per machine and shared by memory map.
#
# Cosine is the inner product of vectors of length 1. Up to 50,000 vectors are compared one by one, which is exact; more
# go into inverted lists of float16 (as in the release), of which the nearest 32 are searched. The file is built
# for the first request, in the cache folder next to copies of releases, and replicas of a machine map the same pages;
# requests during the build are told to try again.


# ---------------------------------------------------------------------------------------------------------- vector text
# Vectors as JSON, quickly: float16 has 65,536 values, so each value's text is looked up instead of formatted.
#
# 256 vectors of 384 components take 2 ms this way and 50 ms with `json.dumps` of their float32 values, whose digits
# beyond the fourth are meaningless: releases store float16.


_PADDING = b"\0"  # of NumPy's byte strings, up to the longest


def vectors_as_json(rows: np.ndarray) -> list[str]:
    """Each row as a JSON list of numbers.

    rows: float [n, d], converted to float16; values that are not finite become null.
    """
    bits = np.ascontiguousarray(rows, dtype=np.float16).view(np.uint16)
    padded = _texts()[bits]
    return [f"[{row.tobytes().translate(None, _PADDING)[:-1].decode()}]" for row in padded]


def vectors_as_bytes(rows: np.ndarray, mask: np.ndarray) -> bytes:
    """Rows of float16, little-endian, concatenated; rows with a False `mask` (bool [n]) are all NaN."""
    values = np.array(rows, dtype="<f2")
    values[~mask] = np.nan
    return values.tobytes()


@cache
def _texts() -> np.ndarray:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(values)
    # The shortest decimal that reads back as the same float16, in valid JSON.
    shortest = [repr(float(str(value))) if good else "null" for value, good in zip(values, finite, strict=True)]
    return np.array([f"{text}," for text in shortest], dtype=np.bytes_)


# -------------------------------------------------------------------------------------------------------------- similar


_EXACT_UP_TO = 50_000
_ROWS_AT_ONCE = 20_000
_LISTS_SEARCHED = 32
_MOST_FORGOTTEN = 100  # extra neighbors, in case some are forgotten
_TRAINED_ON = 64  # training vectors per list, sampled from all

_log = logging.getLogger("owlrec.serving")


class SimilarEntities:
    """Indexes of the served releases; thread-safe."""

    def __init__(self, root: str, folder: Path | None = None) -> None:
        """root: of the releases' workspace, which distinguishes its indexes from others. folder: their location, by
        default OwlRec's cache.
        """
        self._folder = folder or cache_folder("similar", fingerprint(root)[:8])
        self._lock = threading.Lock()
        self._open: dict[tuple[str, Kind], Any] = {}
        self._building: set[tuple[str, Kind]] = set()

    def find(self, release: Release, asked: Similar) -> list[Neighbor]:
        """Nearest entities, most similar first, without the queried one.

        Raises Problem: 404 if the entity has no vector, 422 for a vector of the wrong length or all zeros, 501
        without faiss, 503 during the build of the index.
        """
        question = self._question(release, asked)
        index = self._index(release, asked.kind)
        if index is None:
            return []
        # An index may be older than an `owlrec forget`, until the release without that user is served.
        spare = min(len(release.tombstones), _MOST_FORGOTTEN) if asked.kind == "user" else 0
        scores, ids = index.search(question[None], asked.limit + 1 + spare)
        gone = release.tombstones.among(ids[0]) if spare else np.zeros(ids.shape[1], dtype=bool)
        near = [
            Neighbor(id=id_, score=round(min(1.0, score), 6))
            for id_, score, forgotten in zip(ids[0].tolist(), scores[0].tolist(), gone.tolist(), strict=True)
            if id_ >= 0 and id_ != asked.id and not forgotten
        ]
        return near[: asked.limit]

    def forget_all_but(self, name: str | None) -> None:
        """Closes the indexes of releases other than `name` and removes their files, so disks do not fill up.
        A roll-back builds its index again.
        """
        with self._lock:
            self._open = {key: index for key, index in self._open.items() if key[0] == name}
        for path in self._folder.glob("*"):
            if name is not None and not path.name.startswith((name, ".")):
                path.unlink(missing_ok=True)  # processes that have mapped it keep it

    def close(self) -> None:
        """Closes all indexes; their files stay for the next start."""
        with self._lock:
            self._open.clear()

    @staticmethod
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
        length = float(np.linalg.norm(vector))
        if not length > 0:
            raise Problem(422, "is all zeros and has no direction", field="vector")
        return vector / length

    def _index(self, release: Release, kind: Kind) -> Any:
        key = (release.name, kind)
        path = self._folder / f"{release.name}-{kind}.faiss"
        with self._lock:
            if key in self._open:
                return self._open[key]
            if key in self._building:
                raise Problem(503, "the index of this release is being built", headers={"Retry-After": "5"})
            self._building.add(key)
        try:
            if not path.exists():
                _build(release, kind, path)
            index = _read(path)
            with self._lock:
                self._open[key] = index
            return index
        finally:
            with self._lock:
                self._building.discard(key)


def _read(path: Path) -> Any:
    if path.stat().st_size == 0:
        return None  # no entity of the kind has a vector
    faiss = _faiss()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    with suppress(RuntimeError):  # an exact index has no lists
        faiss.extract_index_ivf(index).nprobe = _LISTS_SEARCHED
    return index


def _build(release: Release, kind: Kind, path: Path) -> None:
    faiss = _faiss()
    storage = Storage(path.parent)
    scratch = storage.scratch()
    try:
        index, file = None, scratch / path.name
        for ids, rows in _unit_vectors(release, kind):
            if index is None:
                index = _empty_index(faiss, release, kind, rows)
            index.add_with_ids(rows, ids)
        if index is None:
            file.touch()
        else:
            faiss.write_index(index, str(file))
        storage.upload(file, path.name)  # if two processes build it at once, the later one wins
        _log.info("built the index of %s vectors for release %s", kind, release.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _empty_index(faiss: Any, release: Release, kind: Kind, first: np.ndarray) -> Any:
    n, dim = release.store.count(kind), first.shape[1]
    if n <= _EXACT_UP_TO:
        return faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    lists = int(4 * math.sqrt(n))
    flat = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
        flat, dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.own_fields, _ = True, flat.this.disown()
    index.train(_training_rows(release, kind, lists * _TRAINED_ON))
    return index


def _training_rows(release: Release, kind: Kind, n: int) -> np.ndarray:
    ids = release.store.ids(kind)
    drawn = np.sort(np.random.default_rng(0).choice(ids, size=min(n, len(ids)), replace=False))
    rows, mask = release.store.vectors(kind, drawn)
    return _scaled(rows[mask])[1]


def _unit_vectors(release: Release, kind: Kind) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    all_ids = release.store.ids(kind)
    for start in range(0, len(all_ids), _ROWS_AT_ONCE):
        ids = all_ids[start : start + _ROWS_AT_ONCE]
        rows, mask = release.store.vectors(kind, ids)
        usable, unit = _scaled(rows[mask])
        if len(unit):
            yield ids[mask][usable], unit


def _scaled(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.linalg.norm(rows, axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    return usable, np.ascontiguousarray(rows[usable] / lengths[usable, None], dtype=np.float32)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise Problem(
            501, "similar entities need faiss, which this server does not have: pip install faiss-cpu"
        ) from None
    return faiss


# --------------------------------------------------------------------------------------------------------------- served
# The current release, held open for requests and swapped between two requests, never during one.
#
# A request leases the release it starts with and keeps it to its end, even if another one becomes current, so no
# response mixes two. A watcher reads the pointer every second, so a roll-back is seen like any other swap. If a new
# release cannot be opened, only `error` changes: the old one continues.


REFRESH_S = 1.0  # default interval of checks for another release


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
