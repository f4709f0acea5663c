"""What a process finds around it: environment variables, streams, Ray, and the node's cache of files.

OWLREC_CACHE      folder for converted models and copied files (default ~/.cache/owlrec)
OWLREC_CACHE_GIB  maximum size of copied files (default: half of the free disk space)
OWLREC_API_KEYS   contents of a key file, for endpoints without a key file (owlrec.serving.guard)

No other module reads OwlRec's environment variables; everything else is configured by the recipe.
"""

import errno
import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from owlrec.errors import WorkspaceError

# -------------------------------------------------------------------------------------------------------------- process
# This process's environment variables, streams and Ray.


# ---------------------------------------------------------------------------------------------------------- environment


_LOCK, _PART = ".lock", ".part"  # suffixes in the folder of copies: of locks, and of copies that are arriving


def cache_folder(*parts: str) -> Path:
    """A folder in OwlRec's cache, created if missing."""
    base = os.environ.get("OWLREC_CACHE") or Path.home() / ".cache" / "owlrec"
    folder = Path(base).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes(folder: Path) -> int:
    """Maximum bytes of copied files below `folder`."""
    if limit := os.environ.get("OWLREC_CACHE_GIB"):
        return int(float(limit) * 2**30)
    held = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                held += 0 if entry.name.endswith(_LOCK) else entry.stat().st_size
    return (shutil.disk_usage(folder).free + held) // 2


def package_folder(name: str) -> Path | None:
    """Folder of an installed package, None if it is missing; imports nothing."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def secret(variable: str | None) -> str | None:
    """Value of an environment variable that a recipe names for a secret, such as an API key."""
    return os.environ.get(variable) if variable else None


def api_keys() -> str | None:
    """Lines of a key file; None if the variable is missing or empty."""
    return os.environ.get("OWLREC_API_KEYS") or None


# ---------------------------------------------------------------------------------------------------------------- quiet
# Sends third-party output to a log file, whose path the run prints, instead of the terminal.


class _LogStream(io.TextIOWrapper):
    """Text to a file descriptor, unbuffered; on a full disk it loses the line, not the process."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(open(descriptor, "wb", buffering=0, closefd=False), errors="replace", write_through=True)  # noqa: SIM115 - never closed

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def redirect_output(path: str | os.PathLike[str]) -> None:
    """Appends this process's standard output and error to `path`, from native code as well as from Python.

    If the file cannot be opened, they stay as they are: a log is not worth a worker.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        # Ray flushes a worker's streams after each task, and treats an error there as the task's own.
        sys.stdout, sys.stderr = _LogStream(1), _LogStream(2)


@contextmanager
def native_errors_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Sends standard error of native code (Ray's core, OpenMP) to `path` during the block; Python's own
    stays.
    """
    sys.stderr.flush()
    original = os.dup(2)
    python_stderr = sys.stderr
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    os.close(file)
    sys.stderr = os.fdopen(os.dup(original), "w", buffering=1)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = python_stderr
        os.dup2(original, 2)
        os.close(original)


# ------------------------------------------------------------------------------------------------------------- ray data
# Reads the results of a Ray Data job.


Row = dict[str, Any]


def on_ray() -> bool:
    """Whether this process belongs to a Ray cluster."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def dataset_rows(dataset: Any) -> Generator[Row, None, None]:
    """Rows of a data set, as its blocks finish. Close it before Ray shuts down.

    Uses blocks instead of `iter_rows`, which reads ahead in threads that outlive its iterator, find Ray shut down after
    an error and end the whole process from native code (Ray 2.60), so that the error's message is lost.
    """
    import ray  # here, since every recipe imports this module, and Ray takes a second
    from ray.data.block import BlockAccessor

    bundles = dataset.iter_internal_ref_bundles()
    try:
        for block in (ray.get(ref) for bundle in bundles for ref in bundle.block_refs):
            yield from BlockAccessor.for_block(block).iter_rows(public_row_format=True)
    finally:
        del bundles
        # Ray 2.60 gives its own scheduling thread two seconds (streaming_executor.py:338).
        for thread in threading.enumerate():
            if thread.name.startswith("StreamingExecutor-"):
                thread.join(timeout=60)


# ----------------------------------------------------------------------------------------------------------- node cache
# A bounded folder of copies on the node's own disk, shared by its processes.
#
# A file is fetched once per node, by the first process; a lock makes the others wait. It is verified on arrival
# and mapped from then on. If space runs out, the least recently used copies are evicted, but never open ones:
# readers hold a shared lock on their copy, which the kernel releases even when they are killed.


_STALE_S = 3600.0  # a download writes continuously: an hour without a change means that its process died


class CachedFile:
    """A file on this machine's disk; a cached copy stays until it is closed."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """lock: descriptor of the copy's shared lock, if it is a copy."""
        self.path = path
        self._release = weakref.finalize(self, os.close, lock) if lock is not None else None

    def close(self) -> None:
        """Allows the cache to evict the copy. Safe to call twice."""
        if self._release:
            self._release()

    def keep_for(self, owner: Any) -> None:
        """Keeps the copy while `owner`, which has mapped it, is alive."""
        if self._release and self._release.alive:
            weakref.finalize(owner, self.close)

    def __enter__(self) -> "CachedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NodeCache:
    """Copies by key under one folder, with at most `max_bytes` in total."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    @lru_cache(maxsize=1)
    def default() -> "NodeCache":
        """The node's own cache, set by OWLREC_CACHE and OWLREC_CACHE_GIB."""
        folder = cache_folder("files")
        return NodeCache(folder, cache_bytes(folder))

    def open(self, key: str, size: int, fetch: Callable[[Path], None], sha256: str | None = None) -> CachedFile:
        """The copy under `key`, fetched if missing.

        size: in bytes. fetch: writes the file to the path it is given. sha256: expected digest of the content.
        Raises WorkspaceError if it does not fit in addition to open copies, or arrives damaged.
        """
        path, lock = self.folder / key, self._lock(key)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not self._there(path, size):
                fcntl.flock(lock, fcntl.LOCK_EX)  # not atomic: another process may have fetched it in between
                if not self._there(path, size):
                    self._fetch(path, size, fetch, sha256)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if not self._there(path, size):  # evicted between the two locks
                    os.close(lock)
                    return self.open(key, size, fetch, sha256)
            with suppress(FileNotFoundError):
                os.utime(path)
            return CachedFile(path, lock)
        except BaseException:
            with suppress(OSError):
                os.close(lock)
            raise

    def _fetch(self, path: Path, size: int, fetch: Callable[[Path], None], sha256: str | None) -> None:
        self.make_room(size)
        temporary = path.with_name(f"{path.name}{_PART}")
        try:
            fetch(temporary)
            if temporary.stat().st_size != size:
                raise WorkspaceError(f"{path.name}: {temporary.stat().st_size} of {size} bytes arrived. Try again.")
            if sha256 is not None:
                with temporary.open("rb") as file:
                    arrived = hashlib.file_digest(file, "sha256").hexdigest()
                if arrived != sha256:
                    raise WorkspaceError(
                        f"{path.name}: the file has SHA-256 {arrived[:16]}… instead of {sha256[:16]}…. The "
                        "stored file is damaged: run its stage again."
                    )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def make_room(self, size: int) -> None:
        """Evicts unused copies until `size` bytes fit. Raises WorkspaceError if they cannot."""
        copies = sorted(self._copies(), key=lambda copy: copy[2])
        used = sum(bytes_ for _, bytes_, _ in copies)
        for path, bytes_, _ in copies:
            if used + size <= self.max_bytes and shutil.disk_usage(self.folder).free >= size:
                return
            if self._evict(Path(path)):
                used -= bytes_
        if used + size > self.max_bytes:
            raise WorkspaceError(
                f"{self.folder}: {size:,} bytes do not fit in addition to {used:,} in use; the limit of the "
                f"cache is {self.max_bytes:,}. Raise OWLREC_CACHE_GIB, or set OWLREC_CACHE to a folder on a "
                "larger disk."
            )
        if shutil.disk_usage(self.folder).free < size:
            raise WorkspaceError(
                f"{self.folder}: {size:,} bytes do not fit on this node's disk. Free some space, or set "
                "OWLREC_CACHE to a folder on a larger disk."
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def evict(self, names: Collection[str]) -> tuple[int, int]:
        """Removes all copies of some files (Storage.copy_name); returns how many, and how many stay because they are
        open.
        """
        copies = [path for copy, _, _ in self._copies() if (path := Path(copy)).name.partition("-")[0] in names]
        evicted = sum(self._evict(path) for path in copies)
        return evicted, len(copies) - evicted

    def _evict(self, path: Path) -> bool:
        """Removes a copy unless it is open; returns whether it did."""
        lock = self._lock(path.name)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(lock)

    def _copies(self) -> list[tuple[str, int, float]]:
        """Path, bytes and time of last use. Every fetch comes here, and there may be many thousands."""
        copies = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(_LOCK):
                    continue
                with suppress(FileNotFoundError):
                    info = entry.stat()
                    if not entry.name.endswith(_PART):
                        copies.append((entry.path, info.st_size, info.st_mtime))
                    elif time.time() - info.st_mtime > _STALE_S:
                        os.unlink(entry.path)
        return copies

    def _lock(self, key: str) -> int:
        return os.open(self.folder / f"{key}{_LOCK}", os.O_RDWR | os.O_CREAT, 0o644)

    @staticmethod
    def _there(path: Path, size: int) -> bool:
        try:
            return path.stat().st_size == size
        except FileNotFoundError:
            return False
