"""This process's surroundings: environment variables, streams and Ray.

OWLREC_CACHE      folder for converted models and copied files (default ~/.cache/owlrec)
OWLREC_CACHE_GIB  how much of it copied files may take (default: half of what the disk has free)
OWLREC_API_KEYS   the lines of a key file, for endpoints that are given none (owlrec.serving.keys)

No other module reads OwlRec's environment variables; everything else is configured by the recipe.
"""

import importlib.util
import io
import os
import shutil
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------------------- environment


def cache_folder(*parts: str) -> Path:
    """A folder in OwlRec's cache, made if absent."""
    base = os.environ.get("OWLREC_CACHE") or Path.home() / ".cache" / "owlrec"
    folder = Path(base).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes(folder: Path) -> int:
    """How many bytes copied files may take below `folder`."""
    if limit := os.environ.get("OWLREC_CACHE_GIB"):
        return int(float(limit) * 2**30)
    held = sum(path.stat().st_size for path in folder.iterdir())
    return (shutil.disk_usage(folder).free + held) // 2


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, None where it does not: without importing it or what it needs."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def secret(variable: str | None) -> str | None:
    """The value of an environment variable that the recipe names as the holder of a secret, such as an API key."""
    return os.environ.get(variable) if variable else None


def api_keys() -> str | None:
    """The lines of a key file; None where the variable is absent or empty."""
    return os.environ.get("OWLREC_API_KEYS") or None


# ---------------------------------------------------------------------------------------------------------------- quiet
# Keeps third-party chatter out of the terminal: it goes to a log file whose path the run prints.


class _LogStream(io.TextIOWrapper):
    """Text to a file descriptor, unbuffered; a disk that is full costs the line and not the process."""

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
    """Sends this process's standard output and error to `path`, appending, from native code as well as from Python.

    A file that cannot be opened leaves them where they are: no log is worth a worker.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        # Ray flushes a worker's streams after each task, and takes an error there for the task's own.
        sys.stdout, sys.stderr = _LogStream(1), _LogStream(2)


@contextmanager
def native_errors_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Sends what native code (Ray's core, OpenMP) writes to standard error to `path` for the block; Python's own
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
# Reading what a Ray Data job returns.


Row = dict[str, Any]


def on_ray() -> bool:
    """Whether this process belongs to a Ray cluster."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def dataset_rows(dataset: Any) -> Generator[Row, None, None]:
    """The rows of a data set, as its blocks are finished. Close it before Ray is shut down.

    Blocks, not `iter_rows`: that reads ahead in threads which outlive its iterator, find Ray shut down after an error
    and end the whole process from native code (Ray 2.60), so that the error's message is lost.
    """
    import ray  # here, since recipes load modules that import this one, and Ray takes a second
    from ray.data.block import BlockAccessor

    bundles = dataset.iter_internal_ref_bundles()
    try:
        for block in (ray.get(ref) for bundle in bundles for ref in bundle.block_refs):
            yield from BlockAccessor.for_block(block).iter_rows(public_row_format=True)
    finally:
        del bundles
        # Ray 2.60 itself gives its scheduling thread two seconds (streaming_executor.py:338).
        for thread in threading.enumerate():
            if thread.name.startswith("StreamingExecutor-"):
                thread.join(timeout=60)
