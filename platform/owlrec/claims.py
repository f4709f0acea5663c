"""Who works on which shard, when several jobs or workers share a workspace.

A claim is a small file that only one process can create and that names its holder until a moment that a heartbeat
moves on. It ends with its file, with its lease, or at once where its process is seen to be gone; then anybody may take
it over by compare-and-swap. Shards are written whole, so two that do the same shard by mistake (a stopped clock) waste
its work and break nothing.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import psutil
from pydantic import BaseModel, ValidationError

from owlrec.errors import WorkspaceError
from owlrec.storage import Storage

LEASE_S = 120.0
_HEARTBEATS = 4  # in one lease: three may fail before a claim is lost
_TRIES = 5


class Claim(BaseModel):
    """The content of a claim file."""

    run: str  # one run of a stage, with all its workers
    host: str
    pid: int
    born: float  # when the process started: pids are used again
    expires: float  # seconds since 1970
    failures: int = 0  # workers that died over the shard in this run, of themselves and not because a machine went

    recorded: bool = False  # whether the holder's own death is among them

    def died(self, now: float) -> bool:
        """Whether the holder's process is gone though its machine is not: it may have died of the shard."""
        return not self.recorded and self.host == _host() and not self.alive(now)

    def alive(self, now: float) -> bool:
        """Whether the holder may still be working."""
        if now >= self.expires:
            return False
        return self.host != _host() or _process_lives(self.pid, self.born)


class Claims:
    """The claims of one process. `close` gives back what it still holds."""

    def __init__(self, storage: Storage, run: str, lease_s: float = LEASE_S) -> None:
        """run: names the run; its workers take over from each other at once, since Ray knows when one is dead."""
        self.storage, self.run, self.lease_s = storage, run, lease_s
        self._held: dict[str, tuple[Claim, str]] = {}  # by path, with the file's e_tag
        self._lock = threading.Lock()
        self._renewing = threading.Lock()  # a claim that is given back must not be renewed meanwhile
        self._closing = threading.Event()
        self._beating: threading.Thread | None = None

    def claim(self, path: str) -> Claim | None:
        """Takes what the path stands for, or None where another run is at it."""
        for _ in range(_TRIES):
            present, e_tag = _read(self.storage, path)
            failures = 0
            if present is not None:
                if present.run != self.run and present.alive(time.time()):
                    return None
                if present.run == self.run:
                    failures = present.failures + present.died(time.time())
            mine = self._claim(failures)
            if self._swap(path, mine, e_tag):
                if self._beating is None:
                    self._beating = threading.Thread(target=self._beat, name="claims-heartbeat", daemon=True)
                    self._beating.start()
                return mine
        return None

    def holds(self, path: str) -> bool:
        """Whether the claim is still this process's: a lease can be lost while a machine sleeps."""
        with self._lock:
            mine = self._held.get(path)
        return mine is not None and time.time() < mine[0].expires

    def release(self, path: str) -> None:
        """Gives a claim back."""
        with self._renewing:
            with self._lock:
                mine = self._held.pop(path, None)
            if mine is not None and _read(self.storage, path)[1] == mine[1]:
                self.storage.delete_file(path)

    def record_failure(self) -> None:
        """Notes on all that this process holds that its worker died over it. The claims stay, for the next to read."""
        with self._lock:
            held = dict(self._held)
        for path, (claim, e_tag) in held.items():
            self._swap(path, claim.model_copy(update={"failures": claim.failures + 1, "recorded": True}), e_tag)

    def close(self) -> None:
        """Gives everything back and stops the heartbeat."""
        self._closing.set()
        if self._beating is not None:
            self._beating.join(timeout=10)
        for path in list(self._held):
            self.release(path)

    def _claim(self, failures: int) -> Claim:
        return Claim(
            run=self.run,
            host=_host(),
            pid=os.getpid(),
            born=_born(),
            expires=time.time() + self.lease_s,
            failures=failures,
        )

    def _swap(self, path: str, claim: Claim, e_tag: str | None) -> bool:
        tag = self.storage.swap_bytes(path, claim.model_dump_json().encode(), e_tag)
        if tag is None:
            return False
        with self._lock:
            self._held[path] = claim, tag
        return True

    def _beat(self) -> None:
        while not self._closing.wait(self.lease_s / _HEARTBEATS):
            with self._lock:
                held = list(self._held)
            for path in held:
                with self._renewing:
                    self._renew(path)

    def _renew(self, path: str) -> None:
        with self._lock:
            mine = self._held.get(path)
        if mine is None:
            return
        claim, e_tag = mine
        try:
            kept = self._swap(path, claim.model_copy(update={"expires": time.time() + self.lease_s}), e_tag)
        except WorkspaceError:
            return  # a full disk or a lost connection: the next beat tries again
        with self._lock:
            if not kept and self._held.get(path) == mine:
                del self._held[path]


def unclaimed(storage: Storage, folder: str, names: Iterable[str], run: str) -> list[str]:
    """Those of `names` in a folder of claims that no other run than `run` is at. The folder is listed once, and only
    claims that exist are read: of 10^5 shards few are being worked on.
    """
    there = set(storage.entries(folder))
    now = time.time()
    free = []
    for name in names:
        claim = _read(storage, f"{folder}/{name}")[0] if name in there else None
        if claim is None or claim.run == run or not claim.alive(now):
            free.append(name)
    return free


def clear_claims(storage: Storage, folder: str, run: str) -> None:
    """Gives back what a run that is over still holds in a folder: its workers may have ended without a word."""
    for name in storage.entries(folder):
        path = f"{folder}/{name}"
        claim = _read(storage, path)[0]
        if claim is not None and claim.run == run:
            storage.delete_file(path)


@contextmanager
def claimed(storage: Storage, path: str, what: str) -> Iterator[None]:
    """Holds a claim for the block. Raises WorkspaceError where somebody else holds it; `what` says what they do."""
    claims = Claims(storage, uuid.uuid4().hex[:12])
    try:
        if claims.claim(path) is None:
            holder = _read(storage, path)[0]
            who = f"process {holder.pid} on {holder.host.split()[0]}" if holder else "another process"
            raise WorkspaceError(
                f"{storage.root}: {what} is running already, in {who}. Wait for it, or end it and run this again; "
                f"a claim whose process is gone ends by itself within {LEASE_S:g} s."
            )
        yield
    finally:
        claims.close()


def _read(storage: Storage, path: str) -> tuple[Claim | None, str | None]:
    """A claim and its file's e_tag: (None, e_tag) of one that cannot be read, which holds nothing; (None, None) where
    there is none.
    """
    if storage.entry(path) is None:
        return None, None
    try:
        data, e_tag = storage.read_tagged(path)
    except WorkspaceError:
        return None, None  # given back in between
    try:
        return Claim.model_validate_json(data), e_tag
    except ValidationError:
        return None, e_tag


@lru_cache(maxsize=1)
def _host() -> str:
    """Names the machine and its process table: a container shares neither pids nor, usually, the name of its host."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {uuid.getnode():x} {namespace}"


def _born() -> float:
    return psutil.Process(os.getpid()).create_time()


def _process_lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
