"""Shards and the cards that mark finished ones.

An artifact is a folder whose files are made shard by shard; a shard's card is written last, so "the card exists"
means "the shard is done, and these are its files". A card is valid only while its files have the size and e_tag
it records; contents are hashed again only if the e_tag differs (a copied workspace). For 10^5 shards nothing reads
10^5 cards: they are in folders of a thousand, and a finished thousand is gathered into one file, which a listing of
its folder confirms to be up to date.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import psutil
from pydantic import BaseModel, ValidationError

from owlrec.errors import WorkspaceError
from owlrec.storage import Entry, FileEntry, Storage
from owlrec.workspace import Workspace, shard_file

BLOCK = 1000  # cards per folder
GATHERED = 64  # minimum number of a folder's cards to gather them in one file
_READERS = 16  # threads: on an object store each mostly waits
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, order=True)
class Shard:
    """One shard of an artifact: the rows of a kind with the same hash number."""

    kind: str  # user, item, cohort, or another kind of shard
    number: int

    @property
    def name(self) -> str:
        """Such as user/00000012."""
        return f"{self.kind}/{self.number:08d}"

    def file(self, suffix: str = ".parquet") -> str:
        """Path of its file relative to the artifact, if it has only one file."""
        return f"{self.kind}/{shard_file(self.number, suffix)}"

    @classmethod
    def from_name(cls, name: str) -> "Shard":
        """The shard with a name."""
        kind, _, number = name.rpartition("/")
        return cls(kind, int(number))


class Card(BaseModel):
    """Record of a finished shard or a finished stage. rows_in == rows_out + rows_dead for rows of tables."""

    stage: str
    shard: str = ""  # its name; "" for a whole stage
    fingerprint: str  # of its inputs
    files: dict[str, FileEntry] = {}  # by path relative to the artifact
    rows_in: int = 0
    rows_out: int = 0
    rows_dead: int = 0
    counts: dict[str, float | int | str] = {}
    outputs: dict[str, str] = {}  # for a stage: output -> path relative to the workspace
    seconds: float = 0
    finished: float = 0  # seconds since 1970
    worker: str = ""


class Artifact:
    """A folder of shards with their cards."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        """folder: relative to the workspace."""
        self.workspace, self.folder = workspace, folder

    def path(self, *parts: str) -> str:
        """A path in the artifact, relative to the workspace."""
        return "/".join([self.folder, *parts])

    def card(self, shard: Shard) -> Card | None:
        """The shard's card, from any inputs, if its files are complete."""
        card = self._read(self._file(shard))
        if card is None:
            return None
        return self._whole(card, {path: self.workspace.entry(self.path(path)) for path in card.files})

    def cards(self, *kinds: str, trusting: bool = False) -> dict[str, Card]:
        """Cards of all shards (of some kinds) with complete files, by name, in order: each folder of a thousand
        is listed once, and read as one file if it was gathered.

        trusting: on an object store, which never has truncated files, files of gathered folders are not checked.
        The caller must then check at the end: see runner.run_stage.
        """
        chosen = [kind for kind in self.workspace.names(self.folder, "cards") if not kinds or kind in kinds]
        blocks = [f"{kind}/{name}" for kind in chosen for name in self.workspace.names(self.folder, "cards", kind)]
        cards: dict[str, Card] = {}
        trusted: set[str] = set()
        for block, gathered in in_threads(self._read_block, blocks):
            cards |= {card.shard: card for card in block}
            if gathered and trusting and not self.workspace.local:
                trusted |= {card.shard for card in block}
        listed = self._listed({path for name, card in cards.items() if name not in trusted for path in card.files})
        whole = (card if card.shard in trusted else self._whole(card, listed) for card in cards.values())
        return {card.shard: card for card in whole if card is not None}

    def _listed(self, paths: set[str]) -> dict[str, Entry]:
        """Size and e_tag of files of the artifact: one by one if there are few, otherwise by folder."""
        if len(paths) < BLOCK and not self.workspace.local:
            order = sorted(paths)
            entries = in_threads(lambda path: self.workspace.entry(self.path(path)), order)
            return {path: entry for path, entry in zip(order, entries, strict=True) if entry is not None}
        listed: dict[str, Entry] = {}
        folders = list({path.rpartition("/")[0] for path in paths if "/" in path})
        contents = in_threads(lambda folder: self.workspace.entries(self.path(folder)), folders)
        for folder, content in zip(folders, contents, strict=True):
            listed |= {f"{folder}/{path}": entry for path, entry in content.items()}
        for path in {path for path in paths if "/" not in path}:
            if (entry := self.workspace.entry(self.path(path))) is not None:
                listed[path] = entry
        return listed

    def finish(self, card: Card) -> None:
        """Writes a shard's card. Call it last: the listed files must exist by then."""
        _write_card(self.workspace, self._file(Shard.from_name(card.shard)), card)

    def forget(self, shard: Shard) -> None:
        """Removes a shard's card, because its files have changed or it has left the artifact."""
        self.workspace.delete_file(self._file(shard))

    def gather(self, made: Iterable[str]) -> None:
        """Gathers the cards of each folder with some of the shards `made` into one file."""
        for block in sorted({_block(Shard.from_name(name)) for name in made}):
            listed = self.workspace.entries(self.folder, "cards", block)
            if len(listed) < GATHERED:
                continue
            if {tag for tag, _ in self._read_gathered(block)} == {entry.e_tag for entry in listed.values()}:
                continue
            # Read again with their e_tags: another run may have written one since.
            read = in_threads(self.workspace.read_tagged, [self.path("cards", block, name) for name in listed])
            lines = [json.dumps({"e_tag": e_tag, "card": json.loads(data)}) for data, e_tag in read]
            self.workspace.write_bytes(self.path("gathered", f"{block}.jsonl"), "\n".join(lines).encode())

    def _file(self, shard: Shard) -> str:
        return self.path("cards", _block(shard), shard_file(shard.number, ".json"))

    def _read(self, path: str) -> Card | None:
        try:
            return Card.model_validate_json(self.workspace.read_bytes(path))
        except (WorkspaceError, ValidationError):  # missing or truncated
            return None

    def _read_block(self, block: str) -> tuple[list[Card], bool]:
        """Cards of a folder, and whether all of them are in its gathered file."""
        listed = self.workspace.entries(self.folder, "cards", block)
        gathered: dict[str, Card] = {}
        if len(listed) >= GATHERED:
            tags = {entry.e_tag: name for name, entry in listed.items()}
            gathered = {tags[tag]: card for tag, card in self._read_gathered(block) if tag in tags}
        cards = [gathered.get(name) or self._read(self.path("cards", block, name)) for name in listed]
        return [card for card in cards if card is not None], 0 < len(gathered) == len(listed)

    def _read_gathered(self, block: str) -> list[tuple[str, Card]]:
        path = self.path("gathered", f"{block}.jsonl")
        try:
            lines = [json.loads(line) for line in self.workspace.read_bytes(path).splitlines()]
            return [(line["e_tag"], Card.model_validate(line["card"])) for line in lines]
        except (WorkspaceError, ValidationError, ValueError, KeyError, TypeError):
            return []

    def _whole(self, card: Card, listed: Mapping[str, Entry | None]) -> Card | None:
        moved = {}
        for path, file in card.files.items():
            entry = listed.get(path)
            same = file.matches(entry)
            if same is None and self.workspace.digest(self.path(path)) == file.sha256:
                assert entry is not None
                moved[path] = file.model_copy(update={"e_tag": entry.e_tag})
            elif not same:
                return None
        if moved:
            card = card.model_copy(update={"files": card.files | moved})
            self.finish(card)
        return card


def _write_card(workspace: Workspace, path: str, card: Card) -> None:
    workspace.write_bytes(path, card.model_dump_json(exclude_defaults=True).encode())


def _block(shard: Shard) -> str:
    return f"{shard.kind}/{shard.number // BLOCK:05d}"


def in_threads(work: Callable[[_T], _R], values: Sequence[_T]) -> list[_R]:
    """Applies `work` to each value, in order, in several threads."""
    if len(values) < 2:
        return [work(value) for value in values]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(work, values))


# Stages


class Stopwatch:
    """Wall-clock seconds since its creation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


def finished_stage(workspace: Workspace, stage: str, expected: str | None = None) -> Card | None:
    """The card of `stage` if it has finished, with this fingerprint if one is given."""
    path = _stage_file(stage)
    if workspace.entry(path) is None:
        return None
    try:
        card = Card.model_validate_json(workspace.read_bytes(path))
    except ValidationError:
        return None
    return card if expected in (None, card.fingerprint) else None


def needed_stage(workspace: Workspace, stage: str, lacking: str) -> Card:
    """The card of `stage`. Raises WorkspaceError with the `lacking` output if it has not finished."""
    card = finished_stage(workspace, stage)
    if card is None:
        raise WorkspaceError(f"{workspace.root}: {lacking}. Run `{stage}` first, with the same recipe.")
    return card


def forget_stages(workspace: Workspace, stages: Iterable[str]) -> None:
    """Removes cards of stages. A starting stage removes its own card and those of later stages: an interrupted
    output must not count as finished, nor results of its earlier output as up to date.
    """
    for stage in stages:
        workspace.delete_file(_stage_file(stage))


def finish_stage(
    workspace: Workspace,
    stage: str,
    fingerprint: str,
    *,
    counts: Mapping[str, float | int | str] | None = None,
    outputs: Mapping[str, str] | None = None,
    seconds: float = 0,
) -> Card:
    """Records that a stage is done. Call it last: its listed outputs must exist by then."""
    card = Card(
        stage=stage,
        fingerprint=fingerprint,
        counts=dict(counts or {}),
        outputs=dict(outputs or {}),
        seconds=round(seconds, 3),
        finished=time.time(),
    )
    _write_card(workspace, _stage_file(stage), card)
    return card


def _stage_file(stage: str) -> str:
    return f"stages/{stage}.json"


# --------------------------------------------------------------------------------------------------------------- claims
# Claims on shards, for several jobs or workers in one workspace.
#
# A claim is a small file that only one process can create. It names its holder until a time that a heartbeat
# extends. It ends with its file, with its lease, or as soon as its process is known to be dead; then anybody may
# take it over by compare-and-swap. Shards are written atomically, so if two processes do the same shard by mistake (a
# stopped clock), they waste work but break nothing.


# Lease of a claim after its worker's last heartbeat, unless the worker is known to be dead: a process
# on the same host is looked up. A shorter lease would take shards from a busy machine.
LEASE_S = 120.0
_HEARTBEATS = 4  # per lease: three may fail before a claim is lost
_TRIES = 5


class Claim(BaseModel):
    """The content of a claim file."""

    run: str  # one run of a stage with all its workers
    host: str
    pid: int
    born: float  # start time of the process: pids are reused
    expires: float  # seconds since 1970
    failures: int = 0  # workers that died on the shard in this run, without the loss of a machine

    recorded: bool = False  # whether these include the holder's own death

    def died(self, now: float) -> bool:
        """Whether the holder's process is dead but its machine is not: the shard may have killed it."""
        return not self.recorded and self.host == _host() and not self.alive(now)

    def alive(self, now: float) -> bool:
        """Whether the holder may still be working."""
        if now >= self.expires:
            return False
        return self.host != _host() or _process_lives(self.pid, self.born)


class Claims:
    """The claims of one process. `close` releases those still held."""

    def __init__(self, storage: Storage, run: str, lease_s: float = LEASE_S) -> None:
        """run: names the run; its workers take over from each other at once, since Ray reports their deaths."""
        self.storage, self.run, self.lease_s = storage, run, lease_s
        self._held: dict[str, tuple[Claim, str]] = {}  # by path, with the file's e_tag
        self._lock = threading.Lock()
        self._renewing = threading.Lock()  # a claim must not be renewed while it is released
        self._closing = threading.Event()
        self._beating: threading.Thread | None = None

    def claim(self, path: str) -> Claim | None:
        """Claims the path, or returns None if another run holds it."""
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
        """Whether the claim still belongs to this process: a lease can expire while a machine sleeps."""
        with self._lock:
            mine = self._held.get(path)
        return mine is not None and time.time() < mine[0].expires

    def release(self, path: str) -> None:
        """Releases a claim."""
        with self._renewing:
            with self._lock:
                mine = self._held.pop(path, None)
            if mine is not None and _read(self.storage, path)[1] == mine[1]:
                self.storage.delete_file(path)

    def record_failure(self) -> None:
        """Records on all held claims that this worker died on them. The claims stay for the next worker."""
        with self._lock:
            held = dict(self._held)
        for path, (claim, e_tag) in held.items():
            self._swap(path, claim.model_copy(update={"failures": claim.failures + 1, "recorded": True}), e_tag)

    def close(self) -> None:
        """Releases all claims and stops the heartbeat."""
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
            return  # a full disk or a lost connection: the next heartbeat retries
        with self._lock:
            if not kept and self._held.get(path) == mine:
                del self._held[path]


def unclaimed(storage: Storage, folder: str, names: Iterable[str], run: str) -> list[str]:
    """Shards in a folder of claims that are not claimed by a run other than `run`. Lists the folder once and reads only
    existing claims: of 10^5 shards few are in progress.
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
    """Deletes the claims of a finished run and those of dead processes: of a run whose driver was killed, nobody else
    would. What another run holds stays. A claim is taken over before it is deleted, so two runs may clear at once.
    """
    claims = Claims(storage, run)
    for name in storage.entries(folder):
        claims.claim(f"{folder}/{name}")
    claims.close()


@contextmanager
def claimed(storage: Storage, path: str, what: str) -> Iterator[None]:
    """Holds a claim for the block. Raises WorkspaceError if another process holds it; `what` names its work."""
    claims = Claims(storage, uuid.uuid4().hex[:12])
    try:
        if claims.claim(path) is None:
            holder = _read(storage, path)[0]
            who = f"process {holder.pid} on {holder.host.split()[0]}" if holder else "another process"
            raise WorkspaceError(
                f"{storage.root}: {what} is already running in {who}. Wait for it, or stop it and run this "
                f"again; the claim of a dead process expires within {LEASE_S:g} s."
            )
        yield
    finally:
        claims.close()


def _read(storage: Storage, path: str) -> tuple[Claim | None, str | None]:
    """A claim and its file's e_tag: (None, e_tag) for an unreadable one, which counts as free; (None, None) for
    none.
    """
    if storage.entry(path) is None:
        return None, None
    try:
        data, e_tag = storage.read_tagged(path)
    except WorkspaceError:
        return None, None  # released in between
    try:
        return Claim.model_validate_json(data), e_tag
    except ValidationError:
        return None, e_tag


@lru_cache(maxsize=1)
def _host() -> str:
    """Identifies the machine and its process table: a container shares neither pids nor, usually, the host name."""
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
