"""Plans a refresh: reads the log, writes the plan, updates users, and writes prompts about some of them.

The plan follows from the previous state, the parent release, the files of the log, the config and the wording. The
same inputs give the same plan, so a killed one is found again by its folder.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.vectors import EncoderConfig
from owlrec.errors import ReleaseError
from owlrec.prompting.frameworks import FrameworkName
from owlrec.prompting.prompts import Prompt, prompts_table
from owlrec.refresh import state as partitions
from owlrec.refresh.events import FUTURE_MS, Buckets, Log, ReadEvents, RefreshConfig, event_groups
from owlrec.refresh.interests import Cut, InterestsStage, RefreshResources, budget_cut, short_columns, sum_vectors
from owlrec.refresh.items import ItemBuckets, ItemsStage, ReadItems, item_groups, unwritten_shards
from owlrec.refresh.state import (
    REFRESH_FOLDER,
    RefreshPlan,
    RefreshPrompts,
    ShardState,
    State,
    UserState,
    next_as_of,
    write_plan,
)
from owlrec.releases.format import MANIFEST, ReleaseManifest, chain
from owlrec.releases.release import pointer_history
from owlrec.runner import Result, Stage, Work
from owlrec.shards import Artifact, Card, Shard, needed_stage
from owlrec.sources.outcomes import Labels
from owlrec.sources.raw import Fragment
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import Workspace, read_tombstones

# Data needed to freeze a partition once its answer exists.
PARTITIONS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("as_of", pa.int64()),  # of its text
        ("length", pa.int32()),  # number of behaviors
        ("reason", pa.string()),  # length, age or drift
        ("drift", pa.float32()),
        ("interest", pa.list_(pa.float32())),  # drift.sum_vectors of them, flat
    ]
)
# A user's partitions are read one after another; more would occupy an engine for one user. The rest waits.
_MOST_PARTITIONS = 100
_COUNTS = (
    *("items_read", "items_new", "items_refused", "item_calls"),
    *("events_read", "events_twice", "events_new", "users_with_news", "refused", "due", "calls"),
    *("frozen_by_length", "frozen_by_age", "frozen_by_drift"),
)
# Runs a stage over shards (see runner.run_stage) in the best place for this many rows, with a name for the progress
# bar.
RunStage = Callable[[Stage, Mapping[Shard, str], int, str], Mapping[str, Card]]


@dataclass(frozen=True)
class RefreshPlanner:
    """Plans the next refresh of a workspace, or continues an interrupted one."""

    workspace: Workspace
    config: RefreshConfig
    prompts: RefreshPrompts
    framework: FrameworkName  # for prompts about items
    encoder: EncoderConfig
    run: RunStage

    @property
    def recipe(self) -> str:
        """Fingerprint of all settings that determine a plan."""
        config = self.config.model_dump(exclude={"events", "partitions"})
        constants = (FUTURE_MS, partitions.FREEZE_DRIFT, partitions.FREEZE_MIN_BEHAVIORS)
        return fingerprint(config, constants, self.prompts.fingerprint, self.framework, self.encoder.identity)

    def read_log(self, base: State, now: int) -> RefreshPlan | None:
        """Reads new data in the logs and writes the plan; None if there is nothing to do.

        now: ms since 1970, UTC. Raises SourceError if a log cannot be read, has no events at first, or has lost
        some; SchemaError if a file of the item log lacks a column; ReleaseError if there is no release to build
        on.
        """
        workspace, config = self.workspace, self.config
        parent = parent_release(workspace, base.release or None, self.encoder)
        prepared = needed_stage(workspace, "prepare", "there are no prepared tables")
        log = Log.events(workspace, config, base.log)
        items = Log.items(workspace, config, base.item_log)
        listed = {name: (file.bytes, file.e_tag) for name, file in items.files.items()}
        admitted_by = fingerprint(prepared.fingerprint, sorted(set(config.admit)), listed)
        retried = base.retried_shards(admitted_by, now + FUTURE_MS)
        restart = workspace.path(REFRESH_FOLDER)
        if not log.unread and not retried and not items.unread:
            if base.watermark is not None or not items.files:
                log.check_watermark(None, base.watermark, restart)
            return None
        (fragments, rows), (item_fragments, item_rows) = log.fragments(), items.fragments()
        made_from = fingerprint(
            base.name,
            base.n_shards,
            parent.fingerprint,
            sorted(fragment.digest for fragment in (*fragments, *item_fragments)),
            admitted_by,
            self.recipe,
        )
        folder = f"{REFRESH_FOLDER}/{made_from[:16]}"
        horizon = None if base.watermark is None else base.watermark - config.max_lateness_ms
        grouping = event_groups(fragments, base.n_shards)
        known = {f.path: base.log[n].rows for n, f in log.unread.items() if n in base.log}
        stage = ReadEvents(f"{folder}/events", grouping, known, horizon, base.n_shards, Labels.from_card(prepared))
        cards = self.run(stage, grouping.inputs(), sum(f.rows for f in fragments), "reading events")
        buckets = Buckets.of(f"{folder}/events", base.n_shards, cards.values())
        if log.unread or base.watermark is not None:
            log.check_watermark(buckets.newest, base.watermark, restart)
        item_shards = self._read_items(f"{folder}/item-log", items, item_fragments, base)
        newest = buckets.newest_until(workspace, now + FUTURE_MS)
        clock = max(newest or 0, base.watermark or 0)
        plan = RefreshPlan(
            fingerprint=made_from,
            base=base.name,
            recipe=self.recipe,
            parent=parent.name,
            encoder=self.encoder.model,
            now=now,
            clock=clock,
            lateness_ms=config.max_lateness_ms,
            budget_calls=config.budget_calls,
            n_shards=base.n_shards,
            shards=sorted({*buckets.shards(), *retried, *base.due_shards(clock)}),
            item_shards=item_shards,
            admitted_by=admitted_by,
            log=log.read(rows, buckets.newest_by_file),
            item_log=items.read(item_rows, {}),
        )
        write_plan(workspace, plan)
        return plan

    def _read_items(self, folder: str, log: Log, fragments: Sequence[Fragment], base: State) -> list[int]:
        """Reads the item log; returns the shards to check."""
        n_shards = self.workspace.n_shards("item")
        grouping = item_groups(fragments, n_shards)
        known = {f.path: base.item_log[n].rows for n, f in log.unread.items() if n in base.item_log}
        stage = ReadItems(folder, grouping, known, n_shards)
        self.run(stage, grouping.inputs(), sum(f.rows for f in fragments), "reading items")
        buckets = ItemBuckets.of(self.workspace, folder, n_shards)
        return sorted({*buckets.shards, *unwritten_shards(self.workspace)})

    def move_on(self, plan: RefreshPlan, base: State) -> "Moved":
        """Reads items and events, and writes the prompts within the budget."""
        workspace, resources = self.workspace, RefreshResources(self.workspace, plan)
        log_cards = list(Artifact(workspace, plan.part("item-log")).cards().values())
        log = ItemBuckets.of(workspace, plan.part("item-log"), workspace.n_shards("item"))
        items = ItemsStage(plan, log, self.prompts.scenario, self.framework, plan.now + FUTURE_MS)
        inputs = {Shard("item", number): plan.fingerprint for number in plan.item_shards}
        item_cards = self.run(items, inputs, sum(card.rows_out for card in log_cards), "reading items")
        event_cards = list(Artifact(workspace, plan.part("events")).cards().values())
        buckets = Buckets.of(plan.part("events"), plan.n_shards, event_cards)
        inputs = {Shard("user", number): plan.fingerprint for number in plan.shards}
        rows = sum(base.shards[n].users for n in plan.shards if n in base.shards)
        stage = InterestsStage(plan, base, buckets, self.config, self.prompts, resources)
        cards = self.run(stage, inputs, rows + sum(card.rows_out for card in event_cards), "updating users")
        state = _state_after(plan, base, cards)
        cut = budget_cut(workspace, stage.folder, cards, plan.budget_calls)
        due = {Shard.from_name(name): int(card.counts["due"]) for name, card in cards.items() if card.counts["due"]}
        ask = PromptsStage(plan, state, cut, self.prompts, resources)
        written = self.run(ask, dict.fromkeys(due, plan.fingerprint), sum(due.values()), "writing prompts")
        asked = {Shard.from_name(name): card for name, card in written.items() if card.rows_out}
        for shard, card in asked.items():
            state.shards[shard.number].waiting -= card.rows_out
        state.counts = _counts([*log_cards, *item_cards.values(), *event_cards, *cards.values(), *asked.values()])
        prompts = {shard: card.files[shard.file()] for shard, card in asked.items()}
        new_items = []
        for name, card in item_cards.items():
            shard = Shard.from_name(name)
            if file := card.files.get(f"prompts/{shard.file()}"):
                prompts[shard] = file
            if any(path.startswith(("rows/", "prompts/")) for path in card.files):
                new_items.append(shard)
        moved = {Shard.from_name(name): card.files for name, card in cards.items()}
        behaviors = {s: files[path] for s, files in moved.items() if (path := f"behaviors/{s.file()}") in files}
        return Moved(plan, state, prompts, behaviors, tuple(new_items))


@dataclass(frozen=True)
class Moved:
    """Output of a plan's first stages."""

    plan: RefreshPlan
    state: State  # with all new events in their users' short terms
    prompts: Mapping[Shard, FileEntry]  # by shard of users and items
    behaviors: Mapping[Shard, FileEntry]  # by shard with new events, if the parent release keeps behaviors
    new_items: tuple[Shard, ...]  # with accepted rows or prompts


def _state_after(plan: RefreshPlan, base: State, cards: Mapping[str, Card]) -> State:
    """State before any LLM call. cards: of InterestsStage."""
    shards = dict(base.shards)
    for name, card in cards.items():
        shard = Shard.from_name(name)
        before = base.shards.get(shard.number, ShardState())
        users, deferred = f"users/{shard.file()}", f"deferred/{shard.file()}"
        moved = users in card.files
        shards[shard.number] = ShardState(
            file=f"{plan.part('interests')}/{users}" if moved else before.file,
            users=int(card.counts["users"]),
            encoder=plan.encoder if moved else before.encoder,
            waiting=int(card.counts["due"]),
            due_at=card.counts.get("due_at"),
            deferred=f"{plan.part('interests')}/{deferred}" if deferred in card.files else "",
            retry_at=card.counts.get("retry_at"),
        )
    return State(
        name=plan.name,
        n_shards=plan.n_shards,
        shards=shards,
        watermark=plan.clock or None,
        release=plan.parent,
        admitted_by=plan.admitted_by,
        log=plan.log,
        item_log=plan.item_log,
    )


def _counts(cards: Iterable[Card]) -> dict[str, int]:
    """Counts for people: sums over the cards of all stages."""
    counts = dict.fromkeys(_COUNTS, 0)
    for card in cards:
        for name, n in card.counts.items():
            if name in _COUNTS or name.startswith("refused_"):
                counts[name] = counts.get(name, 0) + int(n)
    return counts | {"left_waiting": counts["due"] - counts["calls"]}


class PromptsStage(Stage):
    """Shards with candidates: writes prompts of the selected partitions, and data for freezing them."""

    name = "prompts"

    def __init__(
        self, plan: RefreshPlan, state: State, cut: Cut, prompts: RefreshPrompts, resources: RefreshResources
    ) -> None:
        """state: with all new events."""
        self.folder, self.candidates = plan.part("prompts"), plan.part("interests")
        self.state, self.cut, self.encoder = state, cut, plan.encoder
        self.prompts, self.resources = prompts, resources

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        due = workspace.read_parquet(f"{self.candidates}/due/{shard.file()}")
        first = pc.less(due["partition"], _MOST_PARTITIONS).to_numpy()
        chosen = read_tombstones(workspace).without(due.filter(pa.array(self.cut.admits(due) & first)))
        if not chosen.num_rows:
            return Result({}, due.num_rows)
        ids = set(chosen["user_id"].to_pylist())
        users = {u.user_id: u for u in self.state.read_users(workspace, shard.number, self.encoder) if u.user_id in ids}
        parts = list(_parts(chosen, users))
        prompts = self._prompts(parts)
        tables = {
            shard.file(): prompts_table(prompts),
            f"partitions/{shard.file()}": self._partitions(parts, [prompt.as_of for prompt in prompts], chosen),
        }
        work.check()
        files = {path: workspace.write_parquet(work.artifact.path(path), table) for path, table in tables.items()}
        reasons = Counter(chosen["reason"].to_pylist())
        counts = {"calls": len(parts), **{f"frozen_by_{reason}": n for reason, n in reasons.items()}}
        return Result(files, due.num_rows, len(parts), counts=counts)

    def close(self) -> None:
        """See Stage.close."""
        self.resources.close()

    def _partitions(self, parts: Sequence[UserState], moments: Sequence[int], due: pa.Table) -> pa.Table:
        items, ratings, lengths = short_columns(parts)
        liked_above = self.prompts.scenario.positive_above
        sums = sum_vectors(items, ratings, lengths, self.resources.item_vectors, liked_above)
        columns = [
            due["user_id"],
            moments,
            lengths,
            due["reason"],
            due["drift"],
            pa.array(list(sums.reshape(len(sums), -1)), PARTITIONS.field("interest").type),
        ]
        return pa.table(columns, schema=PARTITIONS)

    def _prompts(self, parts: Sequence[UserState]) -> list[Prompt]:
        """Prompts about each part, given the text of the parent release or the answer about the previous part."""
        store, catalog, prompts = self.resources.release.store, self.resources.catalog, list[Prompt]()
        texts = store.own_knowledge("user", [part.user_id for part in parts])
        for part, earlier in zip(parts, texts, strict=True):
            titles = catalog.titles(np.array([b.item for b in part.short], dtype=np.int64))
            quoted = [(title, b.rating) for title, b in zip(titles, part.short, strict=True) if title]
            if prompts and prompts[-1].id == part.user_id:
                before = prompts[-1].as_of
                text, facts, room = self.prompts.after_answer(quoted)
            else:
                before = max(part.text_as_of, earlier.as_of if earlier else 0)
                text, facts = self.prompts.after_text(earlier.text if earlier else "", quoted)
                room = 0
            as_of = next_as_of(part.short, before)
            prompts.append(Prompt("user", part.user_id, as_of, self.prompts.system, text, facts, room))
        return prompts


def _parts(due: pa.Table, users: Mapping[int, UserState]) -> Iterator[UserState]:
    """Per partition (a row of DUE) its user, with only the partition's behaviors as the short term."""
    start = 0
    for id_, partition, end in zip(*(due[name].to_pylist() for name in ("user_id", "partition", "end")), strict=True):
        start = start if partition else 0
        yield replace(users[id_], short=users[id_].short[start:end])
        start = end


# The release to build on


def parent_release(workspace: Workspace, after: str | None, encoder: EncoderConfig) -> ReleaseManifest:
    """The current release as the base.

    The pointer's history decides, because rolled-back releases are no longer in it. A release that came after the last
    refresh (a compaction or a whole new run) is a valid base. But a rolled-back release must not return
    by itself with the next refresh, and behaviors that only it had read would be lost if the next one continued from
    there.

    after: a release that the base must be or follow; None for the first refresh. encoder: the recipe's.
    Raises ReleaseError if there is none, if it or a parent is missing, if it was rolled back, or if its vectors
    come from another encoder.
    """
    history = pointer_history(workspace)
    if not history:
        raise ReleaseError(
            f"{workspace.path('releases')}: nothing has been published, and a refresh builds on a full run. "
            "Run `owlrec run` with the same recipe first."
        )
    current = history[-1]
    if not workspace.exists("releases", current, MANIFEST):
        raise ReleaseError(
            f"the refresh would build on release {current}, which is missing from "
            f"{workspace.path('releases')}. Make another one current (`owlrec release rollback`; `release "
            "list` shows them), or publish in full (`owlrec run --from publish`)."
        )
    if after is not None and after not in history:
        raise ReleaseError(
            f"the current release {current} is not newer than {after}, the base of the refreshes, which was "
            f"rolled back. Make {after} current again (`owlrec release rollback --to {after}`); or, to "
            f"continue from {current}, delete {workspace.path(REFRESH_FOLDER)}: the refresh then reads the "
            "whole log again."
        )
    manifest = chain(workspace, current)[0]
    if manifest.encoder != encoder.model or manifest.encoder_identity not in ("", encoder.identity):
        raise ReleaseError(
            f"release {current} has vectors of encoder '{manifest.encoder_identity or manifest.encoder}', but "
            f"the recipe uses '{encoder.identity}'. Restore the encoder, or run `encode` and `publish` with "
            "the new one first."
        )
    return manifest
