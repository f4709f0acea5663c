"""What keeps a workspace current: refreshes, twice as many shards, users who asked to be forgotten."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from owlrec.encoding.stage import EncodingJob
from owlrec.erasure.forgetting import Report
from owlrec.erasure.forgetting import forget as erase
from owlrec.errors import EngineError, OwlRecError, WorkspaceError
from owlrec.generation.job import GenerateStage, build_job, check_dead_share
from owlrec.ops.console import ShardWatch, note, progress, stage_header, warn
from owlrec.recipe import RayConfig, Recipe
from owlrec.refresh.apply import (
    Delta,
    Renewed,
    interrupted_plan,
    job_of_plan,
    published_delta,
    settle,
    tidy,
    too_many_dead,
    with_latest_pools,
)
from owlrec.refresh.plan import Moved, Planner
from owlrec.refresh.state import (
    CLAIM,
    REFRESH_FOLDER,
    RefreshPlan,
    RefreshPrompts,
    State,
    read_state,
    sweep,
    unfinished_plans,
    write_state,
)
from owlrec.releases.build import PART_IDS
from owlrec.releases.redis import RedisReleases
from owlrec.releases.release import pointer as release_pointer
from owlrec.runner import Pool, Result, Stage, Work, pending_shards, run_stage
from owlrec.runs.stages import PARTS_ON_RAY, PREPARED_HERE, ray_session, write_texts
from owlrec.schema import KINDS, Kind, shard_of
from owlrec.shards import Artifact, Card, Shard, claimed, finished_stage, in_threads, needed_stage
from owlrec.sources.splits import in_histories
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, shard_file, shards_for

# ------------------------------------------------------------------------------------------------------------- watching
# Refreshing again and again in one process: how it is asked to stop, and which errors it outlives.
#
# A wish to stop is honoured between the steps of a refresh, whose journal makes any of them a good place to end.


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
            note("stopped; the next refresh goes on from here")


def is_transient(error: OwlRecError) -> bool:
    """Whether the same refresh may well succeed a little later, with nobody's help.

    So may one whose engine is away or failed its rows, whose disk or network did not answer, or that met a file of the
    log in the middle of its writing. A recipe, a roll-back or a log that has lost events needs somebody to decide.
    """
    return isinstance(error, EngineError) or isinstance(error.__cause__, OSError | pa.ArrowInvalid)


# -------------------------------------------------------------------------------------------------------------- refresh
# Renews the behaviors of users with new events, and the texts of those who have moved on and of items that are new or
# changed: a delta release on top of the current one, for few and short calls.


HERE_ROWS = 300_000  # users or events that are read in this process, in some ten seconds


def run(
    recipe: Recipe, workspace: Workspace, *, now: int | None = None, signals: StopSignals | None = None
) -> list[State]:
    """Finishes what an interrupted refresh left, then takes in the log's new events; gives the state after each.

    now: ms since 1970, for tests. signals: where a wish to stop arrives; Stopped is then raised between two steps.
    Raises WorkspaceError where another refresh of the workspace is running.
    """
    stage_header("refresh", f"model {getattr(recipe.engine, 'model', recipe.engine.type)}")
    with claimed(workspace, CLAIM, "refresh"):
        refresh, done = Refresh(recipe, workspace, signals or StopSignals()), list[State]()
        base = read_state(workspace)
        if (plan := interrupted_plan(workspace, base.name, refresh.planner.recipe)) is not None:
            note("an interrupted refresh left its plan: that one first")
            done.append(refresh.carry_out(plan, base))
            base = done[-1]
        plan = refresh.planner.read_log(base, round(time.time() * 1000) if now is None else now)
        if plan is None:
            note("no new events, nothing to do")
            return done
        refresh.signals.check()
        return [*done, refresh.carry_out(plan, base)]


@dataclass
class Refresh:
    """The refreshes of a workspace by a recipe."""

    recipe: Recipe
    workspace: Workspace
    signals: StopSignals

    @property
    def planner(self) -> Planner:
        """What makes plans."""
        recipe = self.recipe
        tokens = recipe.prompts.history_tokens, recipe.sampling.max_tokens
        prompts = RefreshPrompts(recipe.domain, recipe.engine, *tokens)
        framework = recipe.prompts.framework
        return Planner(self.workspace, recipe.streaming, prompts, framework, recipe.encoder, self.run_stage)

    def carry_out(self, plan: RefreshPlan, base: State) -> State:
        """Takes items in, moves users on, asks, publishes and settles. A step that was done before finds its cards."""
        recipe, workspace = self.recipe, self.workspace
        moved = self.planner.move_on(plan, base)
        note(", ".join(f"{name} {n:,}" for name, n in moved.state.counts.items() if n))
        self.signals.check()
        renewed = Renewed(plan.parent)
        if moved.prompts or moved.behaviors:
            renewed = published_delta(workspace, plan) or self._renew(moved)
        state = settle(moved, renewed, recipe.encoder, self.run_stage)
        write_state(workspace, state, plan.base)
        sweep(workspace, state)
        users, items = state.counts["renewed"], state.counts["items_renewed"]
        failed = state.calls + state.item_calls - users - items
        note(f"texts of {users:,} partitions of users and of {items:,} items; {failed:,} answers failed")
        note(f"current: {renewed.release}")
        if said := tidy(workspace):
            note(said)
        return state

    def run_stage(self, stage: Stage, inputs: Mapping[Shard, str], rows: int, about: str) -> dict[str, Card]:
        """Runs a stage, in this process where it has few rows. See plan.RunStage."""
        pending, done = pending_shards(self.workspace, stage.folder, inputs)
        if not pending:
            return done
        pool = Pool(here=rows <= HERE_ROWS, max_workers=1 << 10, log_path=str(self.workspace.log_path("refresh")))
        shown = nullcontext(None) if pool.here else progress(about, len(pending), "shards")
        with self._session(pool.here), shown as advance:
            self.signals.arm()
            on_card = (lambda card: advance(1)) if advance else None
            return run_stage(self.workspace, stage, inputs, pool, on_card, done=done)

    def encode(self, job: EncodingJob) -> dict[str, Card]:
        """Runs the encoder where the recipe has it run."""
        pool = job.pool(str(self.workspace.log_path("encode")))
        with self._session(pool.here or not job.pending()), progress("encoding", None, "texts") as advance:
            return job.run(pool, lambda card: advance(int(card.counts["encoded"])))

    def _session(self, here: bool) -> AbstractContextManager[None]:
        return nullcontext() if here else ray_session(self.recipe.ray, self.workspace.log_path("ray"))

    def _renew(self, moved: Moved) -> Renewed:
        """Asks, and publishes answers and behaviors."""
        recipe, plan = self.recipe, moved.plan
        release_pointer(self.workspace).refuse_hold()  # before answers are paid for
        job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine, recipe.decoding, recipe.quality)
        job = job_of_plan(job, plan)
        texts = self._ask(moved, GenerateStage(job, recipe.engine, "refresh")) if moved.prompts else {}
        self.signals.check()
        if not moved.behaviors and not any(card.rows_out for card in texts.values()):
            return Renewed(plan.parent, job.folder)
        delta = Delta(
            self.workspace,
            moved,
            job,
            texts,
            recipe.engine,
            recipe.encoder,
            recipe.streaming.partitions,
            self.encode,
        )
        state = moved.state
        n_parts = shards_for(max(state.calls + state.item_calls, state.counts["users_with_news"]), PART_IDS)
        pool = Pool(here=n_parts < PARTS_ON_RAY, max_workers=n_parts)
        with self._session(pool.here):
            return delta.publish(n_parts, pool)

    def _ask(self, moved: Moved, stage: GenerateStage) -> Mapping[str, Card]:
        """Generates answers for the plan's prompts that are still pending."""
        recipe, workspace, job, config = self.recipe, self.workspace, stage.job, self.recipe.generate
        inputs = {shard: file.sha256 for shard, file in moved.prompts.items()}
        pending, done = pending_shards(workspace, job.folder, inputs)
        failed = too_many_dead(done.values(), config)
        again = [s for s in inputs if failed and s.name in done and done[s.name].rows_dead]
        cards: Mapping[str, Card] = done
        if pending or again:
            rows = {s.name: workspace.count_rows(job.input_file(s)) for s in pending}
            rows |= {s.name: done[s.name].rows_dead for s in again}
            drafting = replace(job, decoding=with_latest_pools(workspace, recipe.engine, recipe.decoding))
            stage = GenerateStage(drafting, recipe.engine, stage.name)
            with progress("renewing", sum(rows.values())) as advance:
                watch = ShardWatch(advance, workspace.log_path("shards"), rows)
                self.signals.arm()
                cards = write_texts(recipe, workspace, stage, inputs, rows, watch, done=done, again=again)
        if too_many_dead(cards.values(), config):
            check_dead_share(job.artifact(workspace), cards.values(), config)
        return cards


# -------------------------------------------------------------------------------------------------------------- reshard
# Twice as many shards: every file of a shard is split in two by the next bit of the hash. No model is asked.
#
# Both halves of every shard are first written aside, by the runner, while readers go on. Then they are put in place,
# file by file; workspace.json says the new numbers last. A plan in the workspace says what is being done, so that a run
# that was killed goes on where it was, whether it was still writing or already replacing.


_FOLDER = "reshard"
_NUMBERED = re.compile(r"(.*)/(\d{8,})(\.parquet|\.arrow)")
# Where artifacts with shards of users, items or cohorts lie. Releases and ingested fragments have other numbers; the
# state of refreshes, but for the items that they changed, is split as it is read.
_ROOTS = ("tables", "cohorts", "knowledge", "vectors", "soft-labels", ITEM_UPDATES)
_DEPTH = 3
_SLASH = "--"  # in the runner's kinds, which are names of folders
_KIND_OF: dict[str, Kind] = {"prompts": "cohort"}  # where an artifact's shards are not named by their kind


class Plan(BaseModel):
    """reshard/plan.json: what is being done."""

    shards: dict[Kind, int]  # how many there were
    work: list[str]  # names of the runner's shards: an artifact's folder, then one of its own shards

    @property
    def id(self) -> str:
        """The digest that all of its work is made from."""
        return fingerprint(self)


def double_shards(
    workspace: Workspace,
    kinds: Sequence[Kind] = (),
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> dict[Kind, int]:
    """Doubles the number of shards of some kinds (default: all); returns the new numbers.

    Raises WorkspaceError where nothing was prepared, another plan is unfinished, or `prepare` is running.
    """
    with claimed(workspace, "claims/prepare", "prepare or reshard"):
        plan = _unfinished(workspace, kinds) or _new_plan(workspace, kinds)
        doubled: dict[Kind, int] = {kind: 2 * n for kind, n in plan.shards.items()}
        if any(workspace.n_shards(kind) != n for kind, n in doubled.items()):  # else only tidying was left to do
            inputs = {Shard.of_name(name): plan.id for name in plan.work}
            run_stage(workspace, SplitShard(plan.shards), inputs, pool, on_card)
            run_stage(workspace, PlaceShard(plan.shards), inputs, pool, on_card)
            workspace.grow_shards(doubled)
        workspace.delete_file(f"{_FOLDER}/plan.json")  # before what it speaks of: what is left is in nobody's way
        workspace.delete_dir(_FOLDER)
        return doubled


def _unfinished(workspace: Workspace, kinds: Sequence[Kind]) -> Plan | None:
    path = f"{_FOLDER}/plan.json"
    if workspace.entry(path) is None:
        workspace.delete_dir(_FOLDER)
        return None
    plan = Plan.model_validate(workspace.read_json(path))
    if kinds and set(kinds) != set(plan.shards):
        raise WorkspaceError(
            f"{workspace.path(path)}: a reshard of {', '.join(plan.shards)} is not finished. Run it again first."
        )
    return plan


def _new_plan(workspace: Workspace, kinds: Sequence[Kind]) -> Plan:
    fixed = workspace.layout.shards
    chosen = {kind: workspace.n_shards(kind) for kind in kinds or [kind for kind in KINDS if kind in fixed]}
    if not chosen:
        workspace.n_shards("user")  # says that nothing was prepared
    names = []
    for root in _ROOTS:
        for folder in _artifacts(workspace, root, _DEPTH):
            shards = [Shard.of_name(name) for name in Artifact(workspace, folder).cards()]
            flat = folder.replace("/", _SLASH)
            names += [f"{flat}{_SLASH}{shard.name}" for shard in shards if _kind(shard.kind) in chosen]
    plan = Plan(shards=chosen, work=names)
    workspace.write_json(f"{_FOLDER}/plan.json", plan.model_dump())
    return plan


def _artifacts(workspace: Workspace, folder: str, depth: int) -> Iterator[str]:
    names = workspace.names(folder)
    if "cards" in names:
        yield folder
    elif depth:
        for name in names:
            if "." not in name:
                yield from _artifacts(workspace, f"{folder}/{name}", depth - 1)


def _kind(name: str) -> str:
    """The kind of the ids in an artifact's shards, such as user of knowledge-user."""
    return _KIND_OF.get(name, name.rpartition("-")[2])


def _of(shard: Shard) -> tuple[str, Shard]:
    """The artifact's folder and its own shard, of a shard of the runner's."""
    folder, _, kind = shard.kind.rpartition(_SLASH)
    return folder.replace(_SLASH, "/"), Shard(kind, shard.number)


@dataclass
class SplitShard(Stage):
    """Writes both halves of a card's files aside."""

    shards: dict[Kind, int]

    name = "split"
    folder = f"{_FOLDER}/split"

    def run(self, work: Work) -> Result:
        """See Stage."""
        folder, shard = _of(work.shard)
        kind = _kind(shard.kind)
        n = self.shards[kind]  # type: ignore[index]
        files: dict[str, FileEntry] = {}
        rows: dict[str, int] = {}
        card = Artifact(work.workspace, folder).card(shard)
        if card is None:
            raise WorkspaceError(f"{work.workspace.path(folder)}: shard {shard.name} has changed since. Run it again.")
        # Kept beside the halves: once they are put in place, the artifact's own card no longer holds.
        path = work.shard.file(".json")
        files[path] = work.workspace.write_bytes(f"{self.folder}/{path}", card.model_dump_json().encode())
        for path in card.files:
            if match := _NUMBERED.fullmatch(path):
                name, number, suffix = match[1], int(match[2]), match[3]
                table = _read(work.workspace, f"{folder}/{path}")
                key = "id" if "id" in table.column_names else f"{kind}_id"
                high = shard_of(table[key].to_numpy(), 2 * n) != number
                for half, kept in ((number, ~high), (number + n, high)):
                    part = table.filter(pa.array(kept))
                    if name == "samples":
                        part = _moved(work.workspace, number, part, half, 2 * n)
                    target = f"{folder}/{name}/{shard_file(half, suffix)}"
                    files[target] = _write(work.workspace, f"{self.folder}/{target}", part)
                    rows[target] = part.num_rows
        return Result(files, sum(rows.values()), sum(rows.values()), counts=rows)


def _moved(workspace: Workspace, number: int, samples: pa.Table, half: int, n_shards: int) -> pa.Table:
    """Samples whose histories stand where they do among the interactions of one half."""
    users = in_histories(workspace, number, ["user_id"])["user_id"].to_numpy()
    before = np.r_[0, np.cumsum(shard_of(users, n_shards) == half)].astype(np.int32)
    for column in ("history_start", "history_end"):
        place = samples.column_names.index(column)
        samples = samples.set_column(place, column, pa.array(before[samples[column].to_numpy()]))
    return samples


def _read(workspace: Workspace, path: str) -> pa.Table:
    return workspace.map_arrow(path) if path.endswith(".arrow") else workspace.read_parquet(path)


def _write(workspace: Workspace, path: str, table: pa.Table) -> FileEntry:
    if path.endswith(".arrow"):
        return workspace.write_arrow(path, table, table.schema)
    return workspace.write_parquet(path, table)


@dataclass
class PlaceShard(Stage):
    """Puts both halves where readers look for them, and writes their cards."""

    shards: dict[Kind, int]

    name = "place"
    folder = f"{_FOLDER}/place"

    def run(self, work: Work) -> Result:
        """See Stage."""
        workspace, (folder, shard) = work.workspace, _of(work.shard)
        split = Artifact(workspace, SplitShard.folder).card(work.shard)
        if split is None:
            raise WorkspaceError(f"{workspace.path(_FOLDER)} lacks halves of {work.shard.name}. Restore the workspace.")
        work.check()
        n = self.shards[_kind(shard.kind)]  # type: ignore[index]
        own_card = work.shard.file(".json")
        before = Card.model_validate(workspace.read_json(f"{SplitShard.folder}/{own_card}"))
        numbers = {path: int(Path(path).stem) for path in split.files if path != own_card}

        def put(path: str) -> FileEntry:
            return workspace.write_bytes(path, workspace.read_bytes(f"{SplitShard.folder}/{path}"))

        placed = dict(zip(numbers, in_threads(put, list(numbers)), strict=True))
        artifact = Artifact(workspace, folder)
        files = {path: entry for path, entry in before.files.items() if not _NUMBERED.fullmatch(path)}
        if {number % n for number in numbers.values()} != {shard.number}:  # of several shards, as those of tables are
            files |= {path.removeprefix(f"{folder}/"): entry for path, entry in placed.items()}
            artifact.finish(before.model_copy(update={"files": files}))
            return Result({}, split.rows_in, split.rows_in)
        # The card of the upper half first: until the lower one's is written, all of it can be done again.
        for half, kept in ((shard.number + n, {}), (shard.number, files)):
            own = {path.removeprefix(f"{folder}/"): path for path, number in numbers.items() if number == half}
            rows = {name: int(split.counts[path]) for name, path in own.items()}
            dead = sum(count for name, count in rows.items() if name.startswith("dead/"))
            out = next((count for name, count in rows.items() if not name.startswith("dead/")), 0)
            update = {
                "shard": Shard(shard.kind, half).name,
                "files": kept | {name: placed[path] for name, path in own.items()},
                "rows_in": out + dead,
                "rows_out": out,
                "rows_dead": dead,
                "counts": before.counts if half == shard.number else {},  # once, so that sums stay
            }
            artifact.finish(before.model_copy(update=update))
        return Result({}, split.rows_in, split.rows_in)


# --------------------------------------------------------------------------------------------------------------- upkeep
# Upkeep of a workspace: twice as many shards for a population that outgrew them, users who asked to be forgotten.


def reshard(recipe: Recipe, workspace: Workspace, kinds: Sequence[Kind] = ()) -> dict[Kind, int]:
    """Doubles the numbers of shards of some kinds (default: all); the new numbers.

    Raises WorkspaceError where a refresh is running or was interrupted, too: its answers
    lie in the shards that it was planned with.
    """
    stage_header("reshard", "twice as many shards")
    rows = int(needed_stage(workspace, "prepare", "the tables are not prepared").counts.get("interactions", 0))
    with claimed(workspace, CLAIM, "refresh"), progress("splitting shards", None) as advance:
        if unfinished_plans(workspace, read_state(workspace).name):
            raise WorkspaceError(
                f"{workspace.path(REFRESH_FOLDER)}: a refresh was interrupted. Run `owlrec refresh` first."
            )

        def doubled(pool: Pool) -> dict[Kind, int]:
            return double_shards(workspace, kinds, pool, lambda card: advance(card.rows_in))

        if rows <= PREPARED_HERE:
            return doubled(Pool())
        with ray_session(recipe.ray, workspace.log_path("ray")):
            return doubled(Pool(here=False, max_workers=1 << 10, log_path=str(workspace.log_path("reshard"))))


def forget(
    workspace: Workspace, raw_ids: list[str], *, redis: RedisReleases | None = None, drop_models: bool = False
) -> Report:
    """Forgets users, on the Ray cluster that a run would use where the tables are large. See owlrec.erasure."""
    stage_header("forget", f"{len(raw_ids):,} users")
    prepared = finished_stage(workspace, "prepare")
    here = prepared is None or int(prepared.counts.get("interactions", 0)) <= PREPARED_HERE
    log = workspace.log_path("forget")
    pool = Pool() if here else Pool(here=False, max_workers=1 << 10, log_path=str(log))
    session = nullcontext() if here else ray_session(RayConfig(), log)
    with session, progress("erasing rows", None, "rows") as advance:
        return erase(
            workspace,
            raw_ids,
            redis=redis,
            drop_models=drop_models,
            pool=pool,
            on_card=lambda card: advance(card.rows_in),
        )
