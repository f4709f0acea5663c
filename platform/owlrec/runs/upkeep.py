"""What keeps a workspace current: refreshes, twice as many shards, users who asked to be forgotten."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from owlrec.encoding.stage import EncodingJob
from owlrec.erasure.forget import Report
from owlrec.erasure.forget import forget as erase
from owlrec.errors import EngineError, OwlRecError, WorkspaceError
from owlrec.generation.job import GenerateStage, build_job, check_dead_share
from owlrec.ids import KINDS, Kind, shard_of
from owlrec.ops.console import ShardWatch, note, progress, stage_header, warn
from owlrec.recipe import Recipe
from owlrec.refresh.apply import (
    Delta,
    Renewed,
    interrupted_plan,
    job_of_plan,
    published_delta,
    settle,
    tidy,
    too_many_dead,
)
from owlrec.refresh.plan import Moved, RefreshPlanner
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
from owlrec.releases.earlier_texts import ReleasedTexts
from owlrec.releases.redis import RedisReleases
from owlrec.releases.release import pointer as release_pointer
from owlrec.runner import Pool, Result, Stage, Work, pending_shards, run_stage
from owlrec.runs.stages import PARTS_ON_RAY, PREPARED_HERE, ray_session, write_texts
from owlrec.shards import Artifact, Card, Shard, claimed, finished_stage, in_threads, needed_stage
from owlrec.sources.splits import in_histories
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, shard_file, shards_for

# ------------------------------------------------------------------------------------------------------------- watching
# Repeated refreshes in one process: requests to stop, and errors that it survives.
#
# A request to stop is handled between the steps of a refresh, whose journal makes each a safe place to end.


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


# -------------------------------------------------------------------------------------------------------------- refresh
# Updates the behaviors of users with new events, and the texts of changed users and items, in a
# delta release on top of the current one, with few and short calls.


HERE_ROWS = 300_000  # up to this many users or events in this process, in about ten seconds


def run(
    recipe: Recipe, workspace: Workspace, *, now: int | None = None, signals: StopSignals | None = None
) -> list[State]:
    """Finishes an interrupted refresh, then reads the log's new events; yields the state after each.

    now: ms since 1970, for tests. signals: requests to stop; Stopped is then raised between two steps.
    Raises WorkspaceError if another refresh of the workspace is running.
    """
    stage_header("refresh", f"model {getattr(recipe.engine, 'model', recipe.engine.type)}")
    with claimed(workspace, CLAIM, "refresh"):
        refresh, done = Refresh(recipe, workspace, signals or StopSignals()), list[State]()
        base = read_state(workspace)
        if (plan := interrupted_plan(workspace, base.name, refresh.planner.recipe)) is not None:
            note("finishing the plan of an interrupted refresh first")
            done.append(refresh.carry_out(plan, base))
            base = done[-1]
        plan = refresh.planner.read_log(base, round(time.time() * 1000) if now is None else now)
        if plan is None:
            note("no new events")
            return done
        refresh.signals.check()
        return [*done, refresh.carry_out(plan, base)]


@dataclass
class Refresh:
    """Refreshes of a workspace with a recipe."""

    recipe: Recipe
    workspace: Workspace
    signals: StopSignals

    @property
    def planner(self) -> RefreshPlanner:
        """Planner of the refreshes."""
        recipe = self.recipe
        tokens = recipe.prompts.history_tokens, recipe.sampling.max_tokens
        prompts = RefreshPrompts(recipe.domain, recipe.engine, *tokens)
        framework = recipe.prompts.framework
        return RefreshPlanner(self.workspace, recipe.streaming, prompts, framework, recipe.encoder, self.run_stage)

    def carry_out(self, plan: RefreshPlan, base: State) -> State:
        """Reads items, updates users, generates, publishes and settles. Finished steps find their cards."""
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
        note(f"texts for {users:,} user partitions and {items:,} items; {failed:,} answers failed")
        note(f"current: {renewed.release}")
        if said := tidy(workspace):
            note(said)
        return state

    def run_stage(self, stage: Stage, inputs: Mapping[Shard, str], rows: int, about: str) -> dict[str, Card]:
        """Runs a stage, in this process if it has few rows. See plan.RunStage."""
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
        """Runs the encoder in the recipe's place."""
        pool = job.pool(str(self.workspace.log_path("encode")))
        with self._session(pool.here or not job.pending()), progress("encoding", None, "texts") as advance:
            return job.run(pool, lambda card: advance(int(card.counts["encoded"])))

    def _session(self, here: bool) -> AbstractContextManager[None]:
        return nullcontext() if here else ray_session(self.recipe.ray, self.workspace.log_path("ray"))

    def _renew(self, moved: Moved) -> Renewed:
        """Generates, and publishes answers and behaviors."""
        recipe, plan = self.recipe, moved.plan
        release_pointer(self.workspace).refuse_hold()  # before paying for answers
        job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine, recipe.decoding, recipe.quality)
        job = job_of_plan(job, plan)
        stage = GenerateStage(job, recipe.engine, "refresh", earlier_texts=ReleasedTexts)
        texts = self._ask(moved, stage) if moved.prompts else {}
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
            with progress("renewing", sum(rows.values())) as advance:
                watch = ShardWatch(advance, workspace.log_path("shards"), rows)
                self.signals.arm()
                cards = write_texts(recipe, workspace, stage, inputs, rows, watch, done=done, again=again)
        if too_many_dead(cards.values(), config):
            check_dead_share(job.artifact(workspace), cards.values(), config)
        return cards


# -------------------------------------------------------------------------------------------------------------- reshard
# Doubles the number of shards: splits every shard's file in two by the next bit of the hash, without LLM calls.
#
# The runner first writes both halves of every shard to a temporary folder, while readers continue. Then they are moved
# into place, file by file; workspace.json gets the new numbers last. A plan in the workspace records the work, so a
# killed run resumes, whether it was still writing or already replacing.


_FOLDER = "reshard"
_NUMBERED = re.compile(r"(.*)/(\d{8,})(\.parquet|\.arrow)")
# Folders with shards of users, items or cohorts. Releases and ingested fragments have other numbers; the
# state of refreshes, except for changed items, is split when it is read.
_ROOTS = ("tables", "cohorts", "knowledge", "vectors", "soft-labels", ITEM_UPDATES)
_DEPTH = 3
_SLASH = "--"  # replaces slashes in the runner's kinds, which are folder names
_KIND_OF: dict[str, Kind] = {"prompts": "cohort"}  # for artifacts whose shards are not named by their kind


class ReshardPlan(BaseModel):
    """reshard/plan.json: the work of a reshard."""

    shards: dict[Kind, int]  # old numbers
    work: list[str]  # names of the runner's shards: an artifact's folder, then one of its own shards

    @property
    def id(self) -> str:
        """Digest of the inputs of all its work."""
        return fingerprint(self)


def double_shards(
    workspace: Workspace,
    kinds: Sequence[Kind] = (),
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> dict[Kind, int]:
    """Doubles the number of shards of some kinds (default: all); returns the new numbers.

    Raises WorkspaceError if nothing was prepared, another plan is unfinished, or `prepare` is running.
    """
    with claimed(workspace, "claims/prepare", "prepare or reshard"):
        plan = _unfinished(workspace, kinds) or _new_plan(workspace, kinds)
        new_counts: dict[Kind, int] = {kind: 2 * n for kind, n in plan.shards.items()}
        if any(workspace.n_shards(kind) != n for kind, n in new_counts.items()):  # otherwise only cleanup was left
            inputs = {Shard.from_name(name): plan.id for name in plan.work}
            run_stage(workspace, SplitShard(plan.shards), inputs, pool, on_card)
            run_stage(workspace, PlaceShard(plan.shards), inputs, pool, on_card)
            workspace.grow_shards(new_counts)
        workspace.delete_file(f"{_FOLDER}/plan.json")  # before the files it names; leftovers are harmless
        workspace.delete_dir(_FOLDER)
        return new_counts


def _unfinished(workspace: Workspace, kinds: Sequence[Kind]) -> ReshardPlan | None:
    path = f"{_FOLDER}/plan.json"
    if workspace.entry(path) is None:
        workspace.delete_dir(_FOLDER)
        return None
    plan = ReshardPlan.model_validate(workspace.read_json(path))
    if kinds and set(kinds) != set(plan.shards):
        raise WorkspaceError(
            f"{workspace.path(path)}: a reshard of {', '.join(plan.shards)} is unfinished. Run it again first."
        )
    return plan


def _new_plan(workspace: Workspace, kinds: Sequence[Kind]) -> ReshardPlan:
    fixed = workspace.layout.shards
    chosen = {kind: workspace.n_shards(kind) for kind in kinds or [kind for kind in KINDS if kind in fixed]}
    if not chosen:
        workspace.n_shards("user")  # raises if nothing was prepared
    names = []
    for root in _ROOTS:
        for folder in _artifacts(workspace, root, _DEPTH):
            shards = [Shard.from_name(name) for name in Artifact(workspace, folder).cards()]
            flat = folder.replace("/", _SLASH)
            names += [f"{flat}{_SLASH}{shard.name}" for shard in shards if _kind(shard.kind) in chosen]
    plan = ReshardPlan(shards=chosen, work=names)
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
    """Kind of the ids in an artifact's shards, such as user for knowledge-user."""
    return _KIND_OF.get(name, name.rpartition("-")[2])


def _of(shard: Shard) -> tuple[str, Shard]:
    """The artifact's folder and its own shard, from the runner's shard."""
    folder, _, kind = shard.kind.rpartition(_SLASH)
    return folder.replace(_SLASH, "/"), Shard(kind, shard.number)


@dataclass
class SplitShard(Stage):
    """Writes both halves of a card's files to the temporary folder."""

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
            raise WorkspaceError(
                f"{work.workspace.path(folder)}: shard {shard.name} has changed since the reshard started. Run it "
                "again."
            )
        # Kept with the halves: once they are in place, the artifact's own card is no longer valid.
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
    """Samples whose histories point to the same interactions in one half."""
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
    """Moves both halves to their final place and writes their cards."""

    shards: dict[Kind, int]

    name = "place"
    folder = f"{_FOLDER}/place"

    def run(self, work: Work) -> Result:
        """See Stage."""
        workspace, (folder, shard) = work.workspace, _of(work.shard)
        split = Artifact(workspace, SplitShard.folder).card(work.shard)
        if split is None:
            raise WorkspaceError(
                f"{workspace.path(_FOLDER)} is missing halves of {work.shard.name}. Restore the workspace."
            )
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
        if {number % n for number in numbers.values()} != {shard.number}:  # cards of several shards, as for tables
            files |= {path.removeprefix(f"{folder}/"): entry for path, entry in placed.items()}
            artifact.finish(before.model_copy(update={"files": files}))
            return Result({}, split.rows_in, split.rows_in)
        # The card of the upper half first: until the lower one's is written, everything can be repeated.
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
                "counts": before.counts if half == shard.number else {},  # only once, so that sums stay correct
            }
            artifact.finish(before.model_copy(update=update))
        return Result({}, split.rows_in, split.rows_in)


# --------------------------------------------------------------------------------------------------------------- upkeep
# Upkeep of a workspace: doubling the shards for a larger population, and forgetting users.


def reshard(recipe: Recipe, workspace: Workspace, kinds: Sequence[Kind] = ()) -> dict[Kind, int]:
    """Doubles the numbers of shards of some kinds (default: all); returns the new numbers.

    Errors: see owlrec.runs.upkeep. Also raises WorkspaceError if a refresh is running or was interrupted, because its
    answers are in the shards of its plan.
    """
    stage_header("reshard", "doubling the shards")
    rows = int(needed_stage(workspace, "prepare", "there are no prepared tables").counts.get("interactions", 0))
    with claimed(workspace, CLAIM, "refresh"), progress("splitting shards", None) as advance:
        if unfinished_plans(workspace, read_state(workspace).name):
            raise WorkspaceError(
                f"{workspace.path(REFRESH_FOLDER)}: a refresh was interrupted. Run `owlrec refresh` first."
            )

        def resharded(pool: Pool) -> dict[Kind, int]:
            return double_shards(workspace, kinds, pool, lambda card: advance(card.rows_in))

        if rows <= PREPARED_HERE:
            return resharded(Pool())
        with ray_session(recipe.ray, workspace.log_path("ray")):
            return resharded(Pool(here=False, max_workers=1 << 10, log_path=str(workspace.log_path("reshard"))))


def forget(
    workspace: Workspace, raw_ids: list[str], *, redis: RedisReleases | None = None, drop_models: bool = False
) -> Report:
    """Forgets users, on the run's Ray cluster if the tables are large. See owlrec.erasure."""
    stage_header("forget", f"{len(raw_ids):,} users")
    prepared = finished_stage(workspace, "prepare")
    here = prepared is None or int(prepared.counts.get("interactions", 0)) <= PREPARED_HERE
    log = workspace.log_path("forget")
    pool = Pool() if here else Pool(here=False, max_workers=1 << 10, log_path=str(log))
    session = nullcontext() if here else ray_session("local", log)
    with session, progress("erasing rows", None, "rows") as advance:
        return erase(
            workspace,
            raw_ids,
            redis=redis,
            drop_models=drop_models,
            pool=pool,
            on_card=lambda card: advance(card.rows_in),
        )
