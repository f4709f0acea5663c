"""Keeps third-party chatter out of the terminal: it goes to a log file whose path the run prints."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
