"""Keeps third-party chatter out of the terminal: it goes to a log file whose path the run prints."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def redirect_output(path: str | os.PathLike[str]) -> None:
    """Sends this process's standard output and error to `path`, appending, from native code as well as from Python."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


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
