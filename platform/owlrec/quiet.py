"""Keeps third-party chatter out of the terminal: it goes to a log file whose path the run prints."""

import os
import sys
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
