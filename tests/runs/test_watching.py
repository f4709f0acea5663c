"""Refreshing again and again: which errors end it, and that a signal ends it between two steps."""

import os
import signal

import pytest

from owlrec.errors import EngineError, OwlRecError, ReleaseError, SourceError
from owlrec.runs.upkeep import Stopped, StopSignals, is_transient, repeat


def caused_by(error: OwlRecError, cause: Exception) -> OwlRecError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (EngineError("the server is away"), True),
        (caused_by(SourceError("half a file"), OSError()), True),
        (SourceError("the log has lost events"), False),
        (ReleaseError("rolled back"), False),
    ],
)
def test_which_errors_may_pass(error: OwlRecError, passes: bool) -> None:
    assert is_transient(error) == passes


def test_rounds_go_on_after_a_passing_error_and_end_with_another(capsys: pytest.CaptureFixture[str]) -> None:
    errors = [EngineError("the server is away."), None, ReleaseError("rolled back.")]

    def step(signals: StopSignals) -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    with pytest.raises(ReleaseError):
        repeat(step, 0.001)
    assert errors == []
    assert "the server is away. Trying again in 0.001 s." in capsys.readouterr().out


def test_once_is_once_and_every_error_ends_it() -> None:
    rounds = []
    repeat(rounds.append, None)
    assert len(rounds) == 1
    with pytest.raises(EngineError):
        repeat(lambda signals: (_ for _ in ()).throw(EngineError("away")), None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_between_steps(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before, done = signal.getsignal(number), []

    def step(signals: StopSignals) -> None:
        os.kill(os.getpid(), number)
        done.append("the step that was at work")
        signals.check()
        done.append("the next step")

    repeat(step, 3600)
    assert done == ["the step that was at work"]
    assert signal.getsignal(number) == before
    assert "stopped" in capfd.readouterr().out


def test_second_signal_interrupts() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_signals_are_left_alone_outside_of_the_block() -> None:
    signals, before = StopSignals(), signal.getsignal(signal.SIGTERM)
    signals.arm()
    assert signal.getsignal(signal.SIGTERM) == before
    signals.check()
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            signals.check()
