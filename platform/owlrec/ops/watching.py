"""Refreshing again and again in one process: how it is asked to stop, and which errors it outlives.

A wish to stop is honoured between the steps of a refresh, whose journal makes any of them a good place to end.
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
    """A refresh ended early, between two steps, because it was asked to."""


class StopSignals:
    """While its block runs, SIGINT and SIGTERM are wishes to stop; a second one interrupts (KeyboardInterrupt).

    Outside of a block nothing is listened to, and nobody ever wants to stop.
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
        """Listens to the signals; to be called again after `ray.init`, which takes SIGTERM for itself (Ray 2.60)."""
        if self._before:
            for number in _SIGNALS:
                signal.signal(number, self._note)

    def check(self) -> None:
        """Raises Stopped where the end is wanted."""
        if self._wanted.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Waits, unless the end is wanted or becomes so."""
        self._wanted.wait(seconds)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._wanted.is_set():
            raise KeyboardInterrupt
        self._wanted.set()
        os.write(2, b"stopping after this step; once more to stop at once\n")  # print may not be called from here


def repeat(step: Callable[[StopSignals], object], seconds: float | None) -> None:
    """Runs `step` every so many seconds until SIGINT or SIGTERM, or once where `seconds` is None.

    An error that may pass (see is_transient) is said, and the next round tries again; any other ends it.
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
    """Whether the same refresh may well succeed a little later, with nobody's help.

    So may one whose engine is away or failed its rows, whose disk or network did not answer, or that met a file of the
    log in the middle of its writing. A recipe, a roll-back or a log that has lost events needs somebody to decide.
    """
    return isinstance(error, EngineError) or isinstance(error.__cause__, OSError | pa.ArrowInvalid)
