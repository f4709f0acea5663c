"""The runner: does the pending shards of a stage, in this process or on Ray Data's actor pools.

A stage says how one shard is made and knows nothing of Ray, claims, retries or progress; every stage of a run is one.
Names of shards flow through Ray Data, never rows: a shard is claimed, read, made and written inside one worker, so the
driver holds nothing but cards, and a worker that is killed loses no more than the shards it had in flight.
"""

import asyncio
import gc
import inspect
import os
import threading
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from owlrec.errors import DiskFullError, EngineError, OwlRecError, WorkspaceError
from owlrec.machine import dataset_rows, redirect_output
from owlrec.shards import BLOCK, LEASE_S, Artifact, Card, Claim, Claims, Shard, clear_claims, in_threads, unclaimed
from owlrec.storage import FileEntry
from owlrec.workspace import Workspace

# -------------------------------------------------------------------------------------------------------- stage metrics
# A stage as metrics of the Ray cluster, which every node's agent exposes to Prometheus.
#
# `ray_owlrec_stage_rows_total{stage="generate", worker="…"}` and its kin grow shard by shard; so does the time since
# the worker began, and what that costs where the recipe names a price.


_COUNTS = {
    "rows": "Rows written",
    "dead_rows": "Rows sent to the dead letters",
    "shards": "Shards finished",
    "worker_seconds": "Time since the worker began to load its model, as of its last shard",
    "cost": "What that time costs, in the currency of the recipe's price_per_replica_hour",
}
_TAGS = ("stage", "worker")


class StageMetrics:
    """One worker's metrics; made inside a Ray worker."""

    def __init__(self, stage: str, worker: str, price_per_hour: float | None = None) -> None:
        """worker: tells workers of a cluster apart. price_per_hour: of one worker."""
        from ray.util.metrics import Counter, Gauge

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_stage_{name}", about, _TAGS) for name, about in _COUNTS.items()
        }
        self._counts = Counter("owlrec_stage_counts", "What else shards count: tokens, flags", (*_TAGS, "count"))
        self._in_flight = Gauge("owlrec_stage_shards_in_flight", "Shards begun and not finished", _TAGS)
        self._tags = {"stage": stage, "worker": worker}
        self._price_per_s = (price_per_hour or 0.0) / 3600
        self._shards, self._counted = 0, time.monotonic()

    def begin(self) -> None:
        """A shard is begun."""
        self._shards += 1
        self._in_flight.set(self._shards, self._tags)

    def end(self) -> None:
        """A shard that was begun is finished, or given up."""
        self._shards -= 1
        self._in_flight.set(self._shards, self._tags)

    def update(self, card: Card) -> None:
        """Adds a shard that this worker has finished."""
        now = time.monotonic()
        seconds, self._counted = now - self._counted, now
        values = {
            "worker_seconds": seconds,
            "cost": seconds * self._price_per_s,
            "rows": card.rows_out,
            "dead_rows": card.rows_dead,
            "shards": 1,
        }
        for name, value in values.items():
            if value:
                self._metrics[name].inc(value, self._tags)
        for count, number in card.counts.items():
            if isinstance(number, int | float) and number > 0:
                self._counts.inc(number, {**self._tags, "count": count})


# --------------------------------------------------------------------------------------------------------------- runner


_IDLE_PASSES = 3
_POLLED = 64  # of them, at one look
_POLL_S = 5.0  # between looks at the shards that other runs are at
_WORKERS_LOST = 3  # over one shard, in one run: then the run ends
_T = TypeVar("_T")
_ATTEMPTS = 3  # at a shard that fails for a reason nobody foresaw: a connection that was cut, say
_BLOCKS = 4096  # tasks of one Ray Data job at most: each costs its driver some kilobytes
_GC_THRESHOLD = (200_000, 20, 20)


class WorkerLost(OwlRecError):
    """The worker's process cannot go on, though another one may (a dead engine, a device out of memory)."""


class ShardTaken(OwlRecError):
    """Another run has taken the shard over while it was being worked on; nothing was written."""


@dataclass(frozen=True)
class Result:
    """What a stage made of a shard: files that are written already, and what to say of them. See Card."""

    files: Mapping[str, FileEntry]  # by path relative to the artifact
    rows_in: int = 0
    rows_out: int = 0
    rows_dead: int = 0
    counts: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One shard, as a stage gets it."""

    artifact: Artifact
    shard: Shard
    earlier: Card | None  # what an earlier run made of this shard from other inputs, its files whole
    still_mine: Callable[[], bool]  # whether no other run has taken the shard over; asked before much is written

    @property
    def workspace(self) -> Workspace:
        """The artifact's workspace."""
        return self.artifact.workspace

    def check(self) -> None:
        """Raises ShardTaken where another run has taken the shard over. Call it before files are replaced."""
        if not self.still_mine():
            raise ShardTaken(f"{self.artifact.folder}: shard {self.shard.name} was taken over by another run")


class Stage(ABC):
    """How the shards of an artifact are made. Pickled to workers, so it holds settings, not what they load."""

    name: str
    folder: str  # of the artifact, relative to the workspace

    def open(self, workspace: Workspace, worker: str) -> None:  # noqa: B027 - most stages load nothing
        """Loads what all shards need (a model, a catalog), once a worker. Raises OwlRecError where it cannot."""

    @abstractmethod
    def run(self, work: Work) -> Any:
        """Makes a shard and writes its files; returns a Result, or is a coroutine that does.

        Raises OwlRecError for what a user must fix, which ends the run; WorkerLost where only another process can go
        on.
        """

    def close(self) -> None:  # noqa: B027
        """Frees what `open` loaded."""


@dataclass(frozen=True)
class Pool:
    """Where and with what a stage runs."""

    here: bool = True  # in this process: for what takes seconds; False: on Ray Data's actors
    min_workers: int = 1
    max_workers: int = 1
    cpus: float = 1.0  # of one worker
    gpus: float = 0.0
    in_flight: int = 1  # shards in flight in a worker
    lease_s: float = LEASE_S
    price_per_hour: float | None = None  # of one worker: a metric then shows the cost
    log_path: str | None = None  # where workers of a Ray cluster write what they and their libraries have to say


@dataclass(frozen=True)
class _Run:
    """One call of run_stage, as its workers know it."""

    workspace: Workspace
    stage: Stage
    pool: Pool
    name: str
    again: frozenset[str] = frozenset()  # names of shards that are made again, though their card is up to date
    started: float = 0.0

    def is_done(self, card: Card | None, inputs: str) -> bool:
        """Whether this card ends the work on its shard."""
        if card is None or card.fingerprint != inputs:
            return False
        return card.shard not in self.again or card.finished >= self.started

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.workspace, self.stage.folder)

    @property
    def claims_folder(self) -> str:
        return f"claims/{self.stage.folder}"


def pending_shards(
    workspace: Workspace, folder: str, inputs: Mapping[Shard, str]
) -> tuple[list[Shard], dict[str, Card]]:
    """The shards of an artifact that are not made of these inputs yet, and the cards of the others by name.

    inputs: a digest of what each shard is made from.
    """
    kinds, many = sorted({shard.kind for shard in inputs}), len(inputs) > BLOCK
    artifact = Artifact(workspace, folder)
    done = _done(artifact.cards(*kinds, trusting=many), inputs)
    if len(done) == len(inputs) and many:  # nothing else would look at the files of what was gathered
        done = _done(artifact.cards(*kinds), inputs)
    return [shard for shard in inputs if shard.name not in done], done


def _done(cards: Mapping[str, Card], inputs: Mapping[Shard, str]) -> dict[str, Card]:
    return {s.name: c for s in inputs if (c := cards.get(s.name)) is not None and c.fingerprint == inputs[s]}


def run_stage(
    workspace: Workspace,
    stage: Stage,
    inputs: Mapping[Shard, str],
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
    *,
    done: Mapping[str, Card] | None = None,
    again: Collection[Shard] = (),
) -> dict[str, Card]:
    """Makes those of a stage's shards that are not made of these inputs yet; the cards of all, by name.

    inputs: see pending_shards. on_card: hears of each shard that is done in this run, or by another that has it.
    done: cards that are known to be up to date; without it they are looked for. again: shards to make once more even
    so; a stage that keeps finished rows then does the others.
    Raises OwlRecError where a shard or a worker cannot be helped; finished shards stay, and the same call goes on from
    there. Ray must be initialised unless the pool is here.
    """
    pool = pool or Pool()
    run = _Run(workspace, stage, pool, uuid.uuid4().hex[:12], frozenset(s.name for s in again), time.time())
    present = pending_shards(workspace, stage.folder, inputs)[1] if done is None else done
    cards = {name: card for name, card in present.items() if name not in run.again}
    left = [shard for shard in inputs if shard.name not in cards]
    idle, verified, new = 0, False, list[str]()

    def finish(card: Card) -> None:
        if card.shard not in cards:
            cards[card.shard] = card
            new.append(card.shard)
            if on_card:
                on_card(card)

    while left:
        # Workers start only for shards that nobody is at: what another run holds is waited for without them.
        free = set(unclaimed(workspace, run.claims_folder, [s.name for s in left], run.name))
        mine = [s for s in left if s.name in free]
        if mine:
            make = _make_here if pool.here else _make_on_ray
            with closing(make(run, mine, inputs)) as made:
                for card in made:
                    finish(card)
            idle = idle + 1 if not any(s.name in cards for s in mine) else 0
            if idle == _IDLE_PASSES:
                where = f" {pool.log_path} says why." if pool.log_path else ""
                raise EngineError(f"{stage.name}: {len(mine)} shards do not finish, first {mine[0].name}.{where}")
        left = [s for s in left if s.name not in cards]
        if left:
            time.sleep(min(pool.lease_s / 4, _POLL_S))
            looked_at = left[:_POLLED]
            for shard, theirs in zip(looked_at, in_threads(run.artifact.card, looked_at), strict=True):
                if theirs is not None and run.is_done(theirs, inputs[shard]):
                    finish(theirs)
            left = [s for s in left if s.name not in cards]
        if not left and len(inputs) > BLOCK and not workspace.local and not verified:
            verified = True
            whole = run.artifact.cards(*sorted({s.kind for s in inputs}))
            cards = {name: card for name, card in cards.items() if name in whole}
            left = [s for s in inputs if s.name not in cards]
    clear_claims(workspace, run.claims_folder, run.name)
    run.artifact.gather(new)
    return {shard.name: cards[shard.name] for shard in inputs}


class _Worker:
    """One process's part in a run: the stage, opened, and the claims of the shards it is at."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.name = uuid.uuid4().hex[:8]
        self.claims = Claims(run.workspace, run.name, run.pool.lease_s)
        self.mistake: OwlRecError | None = None  # that ends the run
        self._at_work: set[asyncio.Task[Any]] = set()
        try:
            run.stage.open(run.workspace, self.name)
        except OwlRecError as error:
            self.mistake = error

    async def make(self, shard: Shard, inputs: str) -> Card | None:
        """The shard's card, or None where another run is at it. Raises OwlRecError."""
        if self.mistake is not None:
            raise self.mistake
        task = asyncio.current_task()
        assert task is not None
        self._at_work.add(task)
        try:
            return await self._claim_and_make(shard, inputs)
        except WorkerLost:
            raise
        except OwlRecError as error:
            # The run ends with it: what the shards beside it would still ask for is not paid for.
            self.mistake = error
            for other in self._at_work - {task}:
                other.cancel()
            raise
        finally:
            self._at_work.discard(task)

    async def _claim_and_make(self, shard: Shard, inputs: str) -> Card | None:
        path = f"{self.run.claims_folder}/{shard.name}"
        claim = await asyncio.to_thread(self.claims.claim, path)
        if claim is None:
            return None
        lost = False
        try:
            return await self._claimed(shard, inputs, claim, path)
        except ShardTaken:
            return None
        except WorkerLost:
            lost = True  # the claim stays, with its count of failures, for the next worker to read
            self.claims.record_failure()
            raise
        finally:
            if not lost:
                await asyncio.to_thread(self.claims.release, path)

    async def _claimed(self, shard: Shard, inputs: str, claim: Claim, path: str) -> Card:
        if claim.failures >= _WORKERS_LOST:
            raise EngineError(
                f"{self.run.stage.name}: {_WORKERS_LOST} workers have ended over shard {shard.name}. "
                f"{self.run.pool.log_path or 'The log'} says why; run the same command again once it is fixed."
            )
        artifact = self.run.artifact
        earlier = await asyncio.to_thread(artifact.card, shard)  # another run may have come before
        if earlier is not None and self.run.is_done(earlier, inputs):
            return earlier
        started = time.perf_counter()
        result = await self._attempt(Work(artifact, shard, earlier, lambda: self.claims.holds(path)))
        card = Card(
            stage=self.run.stage.name,
            shard=shard.name,
            fingerprint=inputs,
            files=dict(result.files),
            rows_in=result.rows_in,
            rows_out=result.rows_out,
            rows_dead=result.rows_dead,
            counts=dict(result.counts),
            seconds=round(time.perf_counter() - started, 3),
            finished=time.time(),
            worker=self.name,
        )
        await asyncio.to_thread(artifact.finish, card)
        return card

    async def _attempt(self, work: Work) -> Result:
        if inspect.iscoroutinefunction(self.run.stage.run):
            return await patiently(lambda: self.run.stage.run(work))
        return await patiently(lambda: asyncio.to_thread(self.run.stage.run, work))

    def close(self) -> None:
        self.claims.close()
        self.run.stage.close()


async def patiently(call: Callable[[], Awaitable[_T]]) -> _T:
    """Calls again, up to three times in all, where a store refuses something for a moment.

    A full disk and what else a user must fix is raised at once. What is raised at last is not tried again by a caller
    that is patient, too.
    """
    for attempt in range(1, _ATTEMPTS):
        try:
            return await call()
        except WorkspaceError as error:
            if isinstance(error, DiskFullError) or error.__cause__ is None:
                raise
            traceback.print_exc()
        await asyncio.sleep(attempt)
    try:
        return await call()
    except WorkspaceError as error:
        raise error from None


def _make_here(run: _Run, shards: Sequence[Shard], inputs: Mapping[Shard, str]) -> Generator[Card, None, None]:
    worker = _Worker(run)
    # In a thread of its own, since the caller's may run a loop already: a notebook's, say.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"stage-{run.stage.name}", daemon=True)
    thread.start()
    tasks: set[Future[Card | BaseException | None]] = set()

    async def made(shard: Shard) -> Card | BaseException | None:
        try:
            return await worker.make(shard, inputs[shard])
        except asyncio.CancelledError:
            return worker.mistake
        except (KeyboardInterrupt, SystemExit) as stop:
            return stop  # raised here, it would end the loop and leave the caller waiting

    try:
        waiting = list(reversed(shards))
        while waiting or tasks:
            while waiting and len(tasks) < run.pool.in_flight:
                shard = waiting.pop()
                tasks.add(asyncio.run_coroutine_threadsafe(made(shard), loop))
            finished, tasks = wait(tasks, return_when=FIRST_COMPLETED)
            for task in finished:
                result = task.result()
                if isinstance(result, BaseException):
                    raise result
                if result is not None:
                    yield result
    finally:
        for task in tasks:
            task.cancel()
        wait(tasks)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        worker.close()


class _Actor(_Worker):
    """A worker as Ray Data calls it. What a user must fix travels to the driver as a row: raised here, it would arrive
    under pages of Ray's tracebacks.
    """

    def __init__(self, run: _Run) -> None:
        if run.pool.log_path:
            redirect_output(run.pool.log_path)
        super().__init__(run)
        self.metrics = StageMetrics(run.stage.name, self.name, run.pool.price_per_hour)
        # A shard makes some ten objects a row, all of which live until it is written: looking through them for cycles
        # as often as Python does by default takes an eighth of a worker's own time.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLD)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[str]]]:
        for name, inputs in zip(batch["shard"], batch["inputs"], strict=True):
            row = {"card": "", "mistake": ""}
            self.metrics.begin()
            try:
                card = await self.make(Shard.of_name(str(name)), str(inputs))
                row["card"] = card.model_dump_json() if card else ""
                if card and card.worker == self.name:
                    self.metrics.update(card)
            except WorkerLost:
                # Only a new process surely frees a device's memory; Ray starts one and hands it this shard again.
                traceback.print_exc()
                os._exit(1)
            except OwlRecError as error:
                row["mistake"] = str(error) or type(error).__name__
            except asyncio.CancelledError:
                if self.mistake is None:
                    raise
                row["mistake"] = str(self.mistake)
            finally:
                self.metrics.end()
            yield {name: [value] for name, value in row.items()}
            if row["mistake"]:
                return


def _make_on_ray(run: _Run, shards: Sequence[Shard], inputs: Mapping[Shard, str]) -> Generator[Card, None, None]:
    import ray  # here, since recipes load modules that import this one, and Ray takes a second

    pool = run.pool
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # A large model may load for longer than the default half hour without a finished shard.
    context.execution_no_progress_timeout_s = 6 * 3600
    # On spot machines a worker may well die while it loads; by default the first such death ends the job.
    context.max_consecutive_actor_init_deaths = 3
    rows = [{"shard": shard.name, "inputs": inputs[shard]} for shard in shards]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map_batches(
        _Actor,
        fn_constructor_args=(run,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min_workers, len(shards)),
            max_size=max(pool.min_workers, pool.max_workers),
            # Ray Data adds an actor where more tasks than 1.75 times what runs at once wait for one.
            max_tasks_in_flight_per_actor=2 * pool.in_flight,
            max_concurrent_calls_per_actor=pool.in_flight,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    mistake = ""
    with closing(dataset_rows(dataset)) as made:
        for row in made:
            mistake = row["mistake"]
            if mistake:
                break
            if row["card"]:
                yield Card.model_validate_json(row["card"])
    if mistake:
        raise EngineError(mistake)
