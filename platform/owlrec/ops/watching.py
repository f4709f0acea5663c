"""Repeated refreshes in one process: requests to stop, and errors that it survives.

A request to stop is handled between the steps of a refresh, whose journal makes each a safe place to end.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

import pyarrow as pa

from owlrec.errors import EngineError, OwlRecError
from owlrec.ops.console import note, warn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A refresh ended early, between two steps, because of a request to stop."""


class StopSignals:
    """While its block runs, SIGINT and SIGTERM request a stop; a second one interrupts (KeyboardInterrupt).

    Outside a block, signals are not handled and a stop is never requested.
    """

    def __init__(self) -> None:
        self._wanted = threading.Event()
        self._before: list[object] = []

    def __enter__(self) -> Self:
        self._before = [signal.getsignal(number) for number in _SIGNALS]
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = []

    def arm(self) -> None:
        """Installs the handlers; call it again after `ray.init`, which takes over SIGTERM (Ray 2.60)."""
        if self._before:
            for number in _SIGNALS:
                signal.signal(number, self._note)

    def check(self) -> None:
        """Raises Stopped if a stop is requested."""
        if self._wanted.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Waits, unless a stop is or becomes requested."""
        self._wanted.wait(seconds)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._wanted.is_set():
            raise KeyboardInterrupt
        self._wanted.set()
        os.write(2, b"stopping after this step; once more to stop at once\n")  # print is not allowed here


def repeat(step: Callable[[StopSignals], object], seconds: float | None) -> None:
    """Runs `step` at this interval until SIGINT or SIGTERM, or once if `seconds` is None.

    A transient error (see is_transient) is reported, and the next round tries again; any other error ends it.
    """
    with StopSignals() as signals:
        try:
            while True:
                try:
                    step(signals)
                except OwlRecError as error:
                    if seconds is None or not is_transient(error):
                        raise
                    warn(f"{error} Trying again in {seconds:g} s.")
                if seconds is None:
                    return
                signals.wait(seconds)
                signals.check()
        except Stopped:
            note("stopped; the next refresh continues from here")


def is_transient(error: OwlRecError) -> bool:
    """Whether the same refresh may succeed later without intervention.

    This includes a dead engine, failed rows, a disk or network that did not respond, and a file of the
    log that is still being written. Errors in a recipe, roll-backs and lost events need a person to decide.
    """
    return isinstance(error, EngineError) or isinstance(error.__cause__, OSError | pa.ArrowInvalid)
