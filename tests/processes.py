"""Processes that others started, looked at while they may end at any moment, and ports for them."""

import socket
from collections.abc import Iterable
from contextlib import suppress

import psutil


def command_lines(processes: Iterable[psutil.Process]) -> dict[psutil.Process, str]:
    """Of those that still run, zombies left out."""
    lines = {}
    for process in processes:
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                lines[process] = " ".join(process.cmdline())
    return lines


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
