"""The runner: runs the pending shards of a stage, in this process or on Ray Data's actor pools.

A stage makes one shard and does not handle Ray, claims, retries or progress; every stage of a run is one.
Names of shards flow through Ray Data, never rows: a shard is claimed, read, made and written inside one worker, so the
driver holds only cards, and a killed worker loses only the shards it had in flight.
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
# Metrics of a stage in the Ray cluster, which every node's agent exports to Prometheus.
#
# `ray_owlrec_stage_rows_total{stage="generate", worker="…"}` and the other counters grow shard by shard, as do the time
# since the worker's start and its cost, if the recipe has a price.


_COUNTS = {
    "rows": "Rows written",
    "dead_rows": "Rows sent to the dead letters",
    "shards": "Shards finished",
    "worker_seconds": "Time from the start of model loading to the worker's last shard",
    "cost": "Cost of that time, in the currency of the recipe's price_per_replica_hour",
}
_TAGS = ("stage", "worker")


class StageMetrics:
    """One worker's metrics; created inside a Ray worker."""

    def __init__(self, stage: str, worker: str, price_per_hour: float | None = None) -> None:
        """worker: distinguishes workers of a cluster. price_per_hour: per worker."""
        from ray.util.metrics import Counter, Gauge

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_stage_{name}", about, _TAGS) for name, about in _COUNTS.items()
        }
        self._counts = Counter("owlrec_stage_counts", "Other counts of shards: tokens, flags", (*_TAGS, "count"))
        self._in_flight = Gauge("owlrec_stage_shards_in_flight", "Shards started but not finished", _TAGS)
        self._tags = {"stage": stage, "worker": worker}
        self._price_per_s = (price_per_hour or 0.0) / 3600
        self._shards, self._counted = 0, time.monotonic()

    def begin(self) -> None:
        """Records the start of a shard."""
        self._shards += 1
        self._in_flight.set(self._shards, self._tags)

    def end(self) -> None:
        """Records the end of a started shard, finished or given up."""
        self._shards -= 1
        self._in_flight.set(self._shards, self._tags)

    def update(self, card: Card) -> None:
        """Adds a shard finished by this worker."""
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
_POLLED = 64  # shards checked per poll
_POLL_S = 5.0  # longest interval of polls for shards claimed by other runs
_FIRST_POLL_S = 0.25  # which doubles
_WORKERS_LOST = 3  # workers lost on one shard in one run, after which the run stops
_T = TypeVar("_T")
_ATTEMPTS = 3  # attempts at a shard with unexpected failures, such as a lost connection
_BLOCKS = 4096  # maximum tasks of one Ray Data job: each costs its driver a few kilobytes
_GC_THRESHOLD = (200_000, 20, 20)


class WorkerLost(OwlRecError):
    """The worker's process cannot continue, but another one may (a dead engine, a device out of memory)."""


class ShardTaken(OwlRecError):
    """Another run took over the shard during the work; nothing was written."""


@dataclass(frozen=True)
class Result:
    """Output of a stage for a shard: written files, and values for its card. See Card."""

    files: Mapping[str, FileEntry]  # by path relative to the artifact
    rows_in: int = 0
    rows_out: int = 0
    rows_dead: int = 0
    counts: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One shard, as passed to a stage."""

    artifact: Artifact
    shard: Shard
    earlier: Card | None  # an earlier run's card from other inputs, with complete files
    still_mine: Callable[[], bool]  # whether no other run took over the shard; checked before large writes

    @property
    def workspace(self) -> Workspace:
        """The artifact's workspace."""
        return self.artifact.workspace

    def check(self) -> None:
        """Raises ShardTaken if another run took over the shard. Call it before replacing files."""
        if not self.still_mine():
            raise ShardTaken(f"{self.artifact.folder}: shard {self.shard.name} has been taken over by another run")


class Stage(ABC):
    """Makes the shards of an artifact. Pickled to workers, so it holds settings, not loaded data."""

    name: str
    folder: str  # of the artifact, relative to the workspace

    def open(self, workspace: Workspace, worker: str) -> None:  # noqa: B027 - most stages load nothing
        """Loads shared data (a model, a catalog), once per worker. Raises OwlRecError if it cannot."""

    @abstractmethod
    def run(self, work: Work) -> Any:
        """Makes a shard and writes its files; returns a Result, or is a coroutine that does.

        Raises OwlRecError for errors that a user must fix, which stop the run; WorkerLost if only another process can
        continue.
        """

    def close(self) -> None:  # noqa: B027
        """Frees the data loaded by `open`."""


@dataclass(frozen=True)
class Pool:
    """Place and resources of a stage."""

    here: bool = True  # in this process, for work of seconds; False: on Ray Data's actors
    min_workers: int = 1
    max_workers: int = 1
    cpus: float = 1.0  # per worker
    gpus: float = 0.0
    in_flight: int = 1  # shards in flight per worker
    lease_s: float = LEASE_S
    price_per_hour: float | None = None  # per worker: a metric then shows the cost
    log_path: str | None = None  # log file of workers in a Ray cluster


@dataclass(frozen=True)
class _Run:
    """One call of run_stage, as seen by its workers."""

    workspace: Workspace
    stage: Stage
    pool: Pool
    name: str
    again: frozenset[str] = frozenset()  # shards to repeat even with an up-to-date card
    started: float = 0.0

    def is_done(self, card: Card | None, inputs: str) -> bool:
        """Whether this card completes its shard."""
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
    """Shards of an artifact that are not yet made from these inputs, and the cards of the others by name.

    inputs: a digest of each shard's inputs.
    """
    kinds, many = sorted({shard.kind for shard in inputs}), len(inputs) > BLOCK
    artifact = Artifact(workspace, folder)
    done = _done(artifact.cards(*kinds, trusting=many), inputs)
    if len(done) == len(inputs) and many:  # nothing else would check the files of gathered cards
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
    """Makes a stage's shards that are not yet made from these inputs; returns all cards by name.

    inputs: see pending_shards. on_card: called for each shard finished in this run or by another run.
    done: cards known to be up to date; otherwise they are looked up. again: shards to repeat even
    so; a stage that keeps finished rows then makes only the others.
    Raises OwlRecError if a shard or a worker fails for good; finished shards stay, and the same call continues from
    there. Ray must be initialized unless the pool is in this process.
    """
    pool = pool or Pool()
    run = _Run(workspace, stage, pool, uuid.uuid4().hex[:12], frozenset(s.name for s in again), time.time())
    present = pending_shards(workspace, stage.folder, inputs)[1] if done is None else done
    cards = {name: card for name, card in present.items() if name not in run.again}
    left = [shard for shard in inputs if shard.name not in cards]
    idle, pause, verified, new = 0, _FIRST_POLL_S, False, list[str]()

    def finish(card: Card) -> None:
        if card.shard not in cards:
            cards[card.shard] = card
            new.append(card.shard)
            if on_card:
                on_card(card)

    while left:
        # Workers start only for unclaimed shards: waiting for other runs' shards needs no workers.
        free = set(unclaimed(workspace, run.claims_folder, [s.name for s in left], run.name))
        mine = [s for s in left if s.name in free]
        if mine:
            make = _make_here if pool.here else _make_on_ray
            with closing(make(run, mine, inputs)) as made:
                for card in made:
                    finish(card)
            idle = idle + 1 if not any(s.name in cards for s in mine) else 0
            if idle == _IDLE_PASSES:
                where = f" See {pool.log_path}." if pool.log_path else ""
                raise EngineError(
                    f"{stage.name}: {len(mine)} shards failed to finish, the first is {mine[0].name}.{where}"
                )
        left = [s for s in left if s.name not in cards]
        if left:
            time.sleep(min(pool.lease_s / 4, pause))
            pause = min(2 * pause, _POLL_S)
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
    """One process's part in a run: the opened stage, and the claims of its shards."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.name = uuid.uuid4().hex[:8]
        self.claims = Claims(run.workspace, run.name, run.pool.lease_s)
        self.mistake: OwlRecError | None = None  # stops the run
        self._at_work: set[asyncio.Task[Any]] = set()
        try:
            run.stage.open(run.workspace, self.name)
        except OwlRecError as error:
            self.mistake = error

    async def make(self, shard: Shard, inputs: str) -> Card | None:
        """The shard's card, or None if another run has claimed it. Raises OwlRecError."""
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
            # The run stops: remaining requests of other shards in flight are not paid for.
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
            lost = True  # the claim stays with its count of failures for the next worker
            self.claims.record_failure()
            raise
        finally:
            if not lost:
                await asyncio.to_thread(self.claims.release, path)

    async def _claimed(self, shard: Shard, inputs: str, claim: Claim, path: str) -> Card:
        if claim.failures >= _WORKERS_LOST:
            raise EngineError(
                f"{self.run.stage.name}: {_WORKERS_LOST} workers died on shard {shard.name}. See "
                f"{self.run.pool.log_path or 'the log'}, fix the cause, and run the same command again."
            )
        artifact = self.run.artifact
        earlier = await asyncio.to_thread(artifact.card, shard)  # another run may have been faster
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
    """Calls again, up to three times in total, if a store fails temporarily.

    A full disk and other errors that a user must fix are raised at once. A caller that retries, too, does not retry
    the final error.
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
    # In a separate thread, since the caller's may already run a loop, as in a notebook.
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
            return stop  # raising here would end the loop and leave the caller waiting

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
    """A worker for Ray Data. User errors travel to the driver as a row: raised here, they would be buried
    under pages of Ray's tracebacks.
    """

    def __init__(self, run: _Run) -> None:
        if run.pool.log_path:
            redirect_output(run.pool.log_path)
        super().__init__(run)
        self.metrics = StageMetrics(run.stage.name, self.name, run.pool.price_per_hour)
        # A shard makes about ten objects per row, which live until it is written: searching them for cycles
        # as often as Python does by default takes an eighth of a worker's time.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLD)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[str]]]:
        for name, inputs in zip(batch["shard"], batch["inputs"], strict=True):
            row = {"card": "", "mistake": ""}
            self.metrics.begin()
            try:
                card = await self.make(Shard.from_name(str(name)), str(inputs))
                row["card"] = card.model_dump_json() if card else ""
                if card and card.worker == self.name:
                    self.metrics.update(card)
            except WorkerLost:
                # Only a new process reliably frees a device's memory; Ray starts one and assigns it this shard again.
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
    import ray  # here, since every recipe imports this module, and Ray takes a second

    pool = run.pool
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # A large model may take longer to load than the default half hour without a finished shard.
    context.execution_no_progress_timeout_s = 6 * 3600
    # On spot machines a worker may die while loading; by default the first such death ends the job.
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
            # Ray Data adds an actor if more tasks than 1.75 times its concurrency wait for one.
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
