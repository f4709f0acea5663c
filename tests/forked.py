"""Commands in processes that are forked from one which has imported what commands import.

A forked command is a process of its own, which can be killed and whose exit code, output and files are the command's;
what it saves is the imports, three CPU seconds each.
"""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_OURS = ["owlrec.cli", *(f"owlrec.runs.{name}" for name in ("stages", "models", "upkeep", "exchange"))]
assert all(map(importlib.util.find_spec, _OURS)), "the server would go on without a module, and say nothing"
_SERVER.set_forkserver_preload([*_OURS, "faiss", "ray.data", "ray.train", "sklearn.cluster"])


class Forked:
    """A function that runs in a process of its own, with the names of `subprocess.Popen`. Its output goes to `log`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, log: Path) -> None:
        # The server keeps the environment that it was started with.
        self._process = _SERVER.Process(target=_run, args=(log, dict(os.environ), function, arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the signal's number for one that was killed. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def owlrec(*arguments: str, log: Path, constants: Mapping[str, Any] = {}) -> Forked:
    """Starts the `owlrec` command. constants: values of attributes of modules, by their full names."""
    return Forked(_owlrec, arguments, dict(constants), log=log)


def owlrec_run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command from start to end, and what it said: both streams are in `stdout`. folder: for its log."""
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    return subprocess.CompletedProcess(arguments, owlrec(*arguments, log=log).wait(), log.read_text())


def _owlrec(arguments: tuple[str, ...], constants: dict[str, Any]) -> None:
    for name, value in constants.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    from owlrec.cli import app

    app(list(arguments))


def _run(log: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*arguments)
