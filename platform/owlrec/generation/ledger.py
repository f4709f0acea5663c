"""Who works on which shard, when several jobs or several engines share one output folder.

A shard is claimed by a small file that only one process can create and that names its holder until a moment that a
heartbeat moves on. A claim ends with its file, with its lease, or at once where its process is seen to be gone; then
anybody may take it over. Claims save work and nothing depends on them: shards are written whole and by rename, so two
that do the same shard by mistake (a stopped clock, an object store without put-if-absent) waste one shard's work.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache

import psutil
from pydantic import BaseModel, ValidationError

from owlrec.errors import WorkspaceError
from owlrec.generation.shards import Job, Shard
from owlrec.schema import KINDS
from owlrec.workspace import Workspace

LEDGER_VERSION = 1
LEASE_S = 120.0
_HEARTBEATS = 4  # in one lease: three may fail before a claim is lost
_TRIES = 5


class Claim(BaseModel):
    """The content of a claim file."""

    run: str  # one call of `generate`, with all its engines
    host: str
    pid: int
    born: float  # when the process started: pids are used again
    expires: float  # seconds since 1970
    failures: int = 0  # engines that died over the shard in this run, of themselves and not because a machine went
    nonce: str

    def alive(self, now: float) -> bool:
        """Whether the holder may still be working."""
        if now >= self.expires:
            return False
        return self.host != _host() or _process_lives(self.pid, self.born)


class JobFile(BaseModel):
    """job.json in a job's folder: whose files these are."""

    ledger_version: int
    fingerprint: str


def open_job(workspace: Workspace, job: Job) -> None:
    """Makes the job's folder, or checks that it is this job's.

    Raises WorkspaceError where it holds another job's files or was written by a newer OwlRec.
    """
    path = f"{job.folder}/job.json"
    where = workspace.path(job.folder)
    if not workspace.exists(path):
        strangers = [n for n in workspace.names(job.folder) if n not in KINDS]
        if strangers:
            raise WorkspaceError(
                f"{where} holds files of something else ({', '.join(strangers[:3])}) but no job.json. "
                f"Move them away, or name another workspace."
            )
        workspace.write_json(path, JobFile(ledger_version=LEDGER_VERSION, fingerprint=job.fingerprint).model_dump())
        return
    try:
        found = JobFile.model_validate(workspace.read_json(path))
    except ValidationError:
        raise WorkspaceError(f"{where}/job.json is no job file. Move the folder away and run again.") from None
    if found.ledger_version > LEDGER_VERSION:
        raise WorkspaceError(
            f"{where} has ledger version {found.ledger_version}, this OwlRec knows {LEDGER_VERSION}. "
            f"Upgrade OwlRec, or name another workspace."
        )
    if found.fingerprint != job.fingerprint:
        raise WorkspaceError(
            f"{where} holds the files of job {found.fingerprint[:16]}…{found.fingerprint[-4:]}, not of "
            f"{job.fingerprint[:16]}…{job.fingerprint[-4:]}. Name another workspace."
        )


def unclaimed(workspace: Workspace, job: Job, shards: Sequence[Shard], run: str) -> list[Shard]:
    """Those among `shards` that no other run than `run` is at. Folders are listed, and only claims that exist are read:
    of 10^5 shards few are being worked on.
    """
    folders = {shard.file(job, "claim").rpartition("/")[0] for shard in shards}
    there = {f"{folder}/{name}" for folder in folders for name in workspace.names(folder)}
    free = []
    for shard in shards:
        path = shard.file(job, "claim")
        claim = _read_claim(workspace, path) if path in there else None
        if claim is None or claim.run == run or not claim.alive(time.time()):
            free.append(shard)
    return free


class Ledger:
    """The claims of one process. `close` gives back what it still holds."""

    def __init__(self, workspace: Workspace, job: Job, run: str, lease_s: float = LEASE_S) -> None:
        """run: names the run; its engines take over from each other at once, since Ray knows when one is dead."""
        self.workspace, self.job, self.run, self.lease_s = workspace, job, run, lease_s
        self._held: dict[str, Claim] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._beating: threading.Thread | None = None

    def claim(self, shard: Shard) -> Claim | None:
        """Takes the shard, or None where another run is at it."""
        path = self._path(shard)
        failures = 0
        for _ in range(_TRIES):
            mine = self._claim(failures)
            if self.workspace.create_bytes(path, mine.model_dump_json().encode()):
                with self._lock:
                    self._held[path] = mine
                self._start_beating()
                return mine
            found = _read_claim(self.workspace, path)
            if found is None:
                continue
            if found.run != self.run and found.alive(time.time()):
                return None
            if found.run == self.run:
                failures = found.failures
            if not self._remove(path, found):
                return None
        return None

    def holds(self, shard: Shard) -> bool:
        """Whether the shard is still this process's: a lease can be lost while a machine sleeps."""
        with self._lock:
            return self._path(shard) in self._held

    def release(self, shard: Shard) -> None:
        """Gives a shard back, done or not."""
        path = self._path(shard)
        with self._lock:
            mine = self._held.pop(path, None)
        if mine is not None:
            self._remove(path, mine)

    def blame(self) -> None:
        """Notes on all that this process holds that its engine died over it. The claims stay, for the next to read."""
        with self._lock:
            for path, mine in self._held.items():
                failed = mine.model_copy(update={"failures": mine.failures + 1})
                self.workspace.write_bytes(path, failed.model_dump_json().encode())

    def close(self) -> None:
        """Gives everything back and stops the heartbeat."""
        self._closing.set()
        if self._beating is not None:
            self._beating.join(timeout=10)
        with self._lock:
            held, self._held = self._held, {}
        for path, mine in held.items():
            self._remove(path, mine)

    def _path(self, shard: Shard) -> str:
        return shard.file(self.job, "claim")

    def _claim(self, failures: int) -> Claim:
        return Claim(
            run=self.run,
            host=_host(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            expires=time.time() + self.lease_s,
            failures=failures,
            nonce=uuid.uuid4().hex,
        )

    def _remove(self, path: str, expected: Claim) -> bool:
        """Removes a claim file if it still is `expected`; on a local disk no other taker can slip in between."""
        if not self.workspace.local:
            found = _read_claim(self.workspace, path)
            if found is not None and found.nonce == expected.nonce:
                self.workspace.delete_file(path)
                return True
            return found is None
        target = self.workspace.path(path)
        aside = f"{target.rpartition('/')[0]}/.{uuid.uuid4().hex}.stale"
        try:
            os.rename(target, aside)
        except FileNotFoundError:
            return True
        try:
            with open(aside, "rb") as file:
                found = Claim.model_validate_json(file.read())
            if found.nonce == expected.nonce:
                return True
            os.link(aside, target)  # somebody was faster and this is their fresh claim: it goes back
            return False
        except (ValidationError, FileExistsError):
            return True
        finally:
            os.unlink(aside)

    def _start_beating(self) -> None:
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="ledger-heartbeat", daemon=True)
            self._beating.start()

    def _beat(self) -> None:
        while not self._closing.wait(self.lease_s / _HEARTBEATS):
            with self._lock:
                held = list(self._held.items())
            for path, mine in held:
                self._renew(path, mine)

    def _renew(self, path: str, mine: Claim) -> None:
        found = _read_claim(self.workspace, path)
        with self._lock:
            if path not in self._held:
                return
            if found is None or found.nonce != mine.nonce:
                del self._held[path]
                return
            renewed = mine.model_copy(update={"expires": time.time() + self.lease_s})
            try:
                self.workspace.write_bytes(path, renewed.model_dump_json().encode())
            except WorkspaceError:
                return  # a full disk or a lost connection: the next beat tries again
            self._held[path] = renewed


def _read_claim(workspace: Workspace, path: str) -> Claim | None:
    try:
        return Claim.model_validate_json(workspace.read_bytes(path))
    except WorkspaceError:
        return None  # nobody's, or given back in between
    except ValidationError:  # cut off by a full disk: an unreadable claim holds nothing
        workspace.delete_file(path)
        return None


@lru_cache(maxsize=1)
def _host() -> str:
    """Names the machine and its process table: a container shares neither pids nor, usually, the name of its host."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {uuid.getnode():x} {namespace}"


def _born(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _process_lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
