"""Small files that say what is current: a release, a set of cohorts, the state of the refresh.

A pointer carries its own history, so that one write changes both, and it is only replaced by compare-and-swap: of two
that move it at once one is told. A HOLD beside it stops every replacement until a person lifts it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from owlrec.errors import WorkspaceError
from owlrec.storage import Storage


class PointerMoved(WorkspaceError):
    """The pointer no longer names what its mover expected: somebody else was first."""


class PointerHeld(WorkspaceError):
    """A HOLD beside the pointer stops every replacement until a person lifts it."""


class Hold(BaseModel):
    """The content of a HOLD file."""

    reason: str
    by: str
    since: float  # seconds since 1970


_HISTORY = 100  # moves remembered
_TRIES = 20
_ANY: Any = object()


@dataclass(frozen=True)
class Pointer:
    """A small file that names what is current and what was before, replaced by compare-and-swap only."""

    storage: Storage
    path: str

    @property
    def current(self) -> str | None:
        """What the pointer names; None where it was never moved."""
        history = self.history
        return history[-1] if history else None

    @property
    def history(self) -> list[str]:
        """What was current, oldest first, the current one last. Raises WorkspaceError where it cannot be read."""
        return self._read()[0]

    def move(self, to: str, *, expected: str | None = _ANY) -> None:
        """Names `to`. expected: what must be current; by default anything.

        Raises PointerMoved where something else is current, PointerHeld where a HOLD stands beside the pointer.
        """
        self._swap(lambda history: history if history and history[-1] == to else [*history, to], expected)

    def rewind(self, to: str) -> None:
        """Names `to` again and forgets what was current after it. Raises PointerHeld as `move` does."""

        def back(history: list[str]) -> list[str]:
            return history[: len(history) - history[::-1].index(to)] if to in history else [*history, to]

        self._swap(back, _ANY)

    def hold(self, reason: str, by: str) -> None:
        """Stops every replacement until `lift`."""
        self.storage.write_bytes(self._hold, Hold(reason=reason, by=by, since=time.time()).model_dump_json().encode())

    def lift(self) -> None:
        """Allows replacements again."""
        self.storage.delete_file(self._hold)

    @property
    def held(self) -> Hold | None:
        """The HOLD beside the pointer, if there is one."""
        if self.storage.entry(self._hold) is None:
            return None
        return Hold.model_validate_json(self.storage.read_bytes(self._hold))

    def refuse_hold(self) -> None:
        """Raises PointerHeld, which says by whom, when and why, where a HOLD stands beside the pointer."""
        if hold := self.held:
            since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(hold.since))
            raise PointerHeld(
                f"{self.storage.path(self.path)} is on HOLD since {since} by {hold.by}: {hold.reason}. It stays as it "
                "is until the hold is lifted (`owlrec unhold`)."
            )

    @property
    def _hold(self) -> str:
        return "/".join([*self.path.split("/")[:-1], "HOLD"])

    def _read(self) -> tuple[list[str], str | None]:
        if self.storage.entry(self.path) is None:
            return [], None
        data, e_tag = self.storage.read_tagged(self.path)
        try:
            content = json.loads(data)
            history = [str(name) for name in content["history"]]
            if not history or history[-1] != content["current"]:
                raise ValueError("'history' does not end with 'current'")
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(
                f"{self.storage.path(self.path)} is not a pointer ({error!r}). Delete it and name what is current."
            ) from None
        return history, e_tag

    def _swap(self, change: Callable[[list[str]], list[str]], expected: str | None) -> None:
        where = self.storage.path(self.path)
        for _ in range(_TRIES):
            history, e_tag = self._read()
            current = history[-1] if history else None
            if expected is not _ANY and current != expected:
                raise PointerMoved(f"{where} names {current!r}, not {expected!r}: somebody else was first.")
            wanted = change(history)
            if wanted == history:
                return
            self.refuse_hold()
            content = {"current": wanted[-1], "history": wanted[-_HISTORY:]}
            if self.storage.swap_bytes(self.path, json.dumps(content).encode(), e_tag) is not None:
                return
        raise PointerMoved(f"{where} was moved by others {_TRIES} times in a row. Try again.")
