"""Processes that others started, looked at while they may end at any moment."""

from collections.abc import Iterable
from contextlib import suppress

import psutil


def command_lines(processes: Iterable[psutil.Process]) -> dict[psutil.Process, str]:
    """Of those that still run, zombies left out."""
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process] = " ".join(process.cmdline())
    return found
