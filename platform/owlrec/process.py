"""This process's environment variables, streams and Ray.

OWLREC_CACHE      folder for converted models and copied files (default ~/.cache/owlrec)
OWLREC_CACHE_GIB  maximum size of copied files (default: half of the free disk space)
OWLREC_API_KEYS   contents of a key file, for endpoints without a key file (owlrec.serving.keys)

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
    """A folder in OwlRec's cache, created if missing."""
    base = os.environ.get("OWLREC_CACHE") or Path.home() / ".cache" / "owlrec"
    folder = Path(base).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes(folder: Path) -> int:
    """Maximum bytes of copied files below `folder`."""
    if limit := os.environ.get("OWLREC_CACHE_GIB"):
        return int(float(limit) * 2**30)
    held = sum(path.stat().st_size for path in folder.iterdir())
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
