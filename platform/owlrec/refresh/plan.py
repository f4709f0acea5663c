"""What a refresh will do: the log is read, the plan written down, users moved on, and the questions about some written.

The plan is made from the state before, the parent release, the files of the log, the config and the wording; the same
of all these are the same plan, so that one that was killed is found again by its folder.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from owlrec.encoding.encoder import EncoderConfig
from owlrec.errors import ReleaseError
from owlrec.generation import EngineConfig, token_counter
from owlrec.prompting.rows import Prompt, prompts_table
from owlrec.refresh.budget import Cut, budget_cut
from owlrec.refresh.config import RefreshConfig
from owlrec.refresh.drift import sum_vectors
from owlrec.refresh.events import Buckets, Log, LogFile, ReadEvents, event_groups
from owlrec.refresh.interests import InterestsStage, Resources, short_columns
from owlrec.refresh.partitions import UserState, as_of_after
from owlrec.refresh.prompt import refresh_prompt, refresh_system, wording_fingerprint
from owlrec.refresh.state import ROOT, RefreshPlan, ShardState, State, write_plan
from owlrec.releases.manifest import MANIFEST, ReleaseManifest, chain
from owlrec.releases.release import pointer_history
from owlrec.runner import Result, Stage, Work
from owlrec.scenario import Scenario
from owlrec.shards import Artifact, Card, Shard, needed_stage
from owlrec.sources.outcomes import Labels
from owlrec.storage import FileEntry, fingerprint
from owlrec.tombstones import read_tombstones
from owlrec.workspace import Workspace

# What the freezing of a partition needs once its answer is there.
PARTITIONS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("reason", pa.string()),  # length, age or drift
        ("drift", pa.float32()),
        ("vector_sum", pa.list_(pa.float32())),
        ("weight", pa.float32()),
    ]
)
_COUNTS = (
    *("events_read", "events_twice", "events_new", "users_with_news", "refused", "due", "calls"),
    *("frozen_by_length", "frozen_by_age", "frozen_by_drift"),
)
# Runs a stage over shards (see runner.run_stage) where that many rows are best done; what the work is called.
RunStage = Callable[[Stage, Mapping[Shard, str], int, str], Mapping[str, Card]]


@dataclass(frozen=True)
class Planner:
    """Makes the plan of the next refresh of a workspace, or goes on with one that was interrupted."""

    workspace: Workspace
    config: RefreshConfig
    scenario: Scenario
    engine: EngineConfig
    encoder: EncoderConfig
    run: RunStage

    @property
    def recipe(self) -> str:
        """Fingerprint of all settings that a plan follows from."""
        config = self.config.model_dump(exclude={"events", "partitions", "compact_after", "keep_releases"})
        return fingerprint(config, wording_fingerprint(self.config, self.scenario), self.encoder.identity)

    def read_log(self, base: State, now: int) -> RefreshPlan | None:
        """Reads what is new in the log and writes the plan down; None where there is nothing to do.

        now: ms since 1970, UTC. Raises SourceError where the log cannot be read, has no events at first, or has lost
        some; ReleaseError where there is no release to build on.
        """
        workspace, config = self.workspace, self.config
        parent = parent_release(workspace, base.release or None, self.encoder)
        prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
        admitted_by = fingerprint(prepared.fingerprint, config.unknown_users, config.unknown_items)
        log = Log.open(workspace, config, base.log)
        retried = base.retried_shards(admitted_by, now + round(1000 * config.max_future_s))
        if not log.unread and not retried:
            log.check_watermark(None, base.watermark, workspace.path(ROOT))
            return None
        fragments, rows = log.fragments()
        made_from = fingerprint(
            base.name,
            base.n_shards,
            parent.fingerprint,
            sorted(fragment.digest for fragment in fragments),
            admitted_by,
            self.recipe,
        )
        folder = f"{ROOT}/{made_from[:16]}/events"
        horizon = None if base.watermark is None else base.watermark - config.max_lateness_ms
        grouping = event_groups(fragments, base.n_shards)
        known = {f.path: base.log[n].rows for n, f in log.unread.items() if n in base.log}
        stage = ReadEvents(folder, grouping, known, horizon, base.n_shards, Labels.of_card(prepared))
        cards = self.run(stage, grouping.inputs(), sum(f.rows for f in fragments), "reading events")
        buckets = Buckets.of(folder, base.n_shards, cards.values())
        log.check_watermark(buckets.newest, base.watermark, workspace.path(ROOT))
        newest = buckets.newest_until(workspace, now + round(1000 * config.max_future_s))
        clock = max(newest or 0, base.watermark or 0)
        read = {
            name: LogFile(
                bytes=file.bytes, e_tag=file.e_tag, rows=rows[file.path], newest=buckets.newest_by_file.get(file.path)
            )
            for name, file in log.unread.items()
        }
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
            groups=[shard.number for shard in grouping.inputs()],
            admitted_by=admitted_by,
            log=log.kept | read,
        )
        write_plan(workspace, plan)
        return plan

    def move_users(self, plan: RefreshPlan, base: State) -> "Moved":
        """Takes the events in, and writes the questions about those whom the budget chooses."""
        workspace, resources = self.workspace, Resources(self.workspace, plan.parent)
        of_events = list(Artifact(workspace, plan.part("events")).cards().values())
        buckets = Buckets.of(plan.part("events"), plan.n_shards, of_events)
        inputs = {Shard("user", number): plan.fingerprint for number in plan.shards}
        rows = sum(base.shards[n].users for n in plan.shards if n in base.shards)
        stage = InterestsStage(plan, base, buckets, self.config, resources)
        cards = self.run(stage, inputs, rows + sum(card.rows_out for card in of_events), "moving users on")
        state = _state_after(plan, base, cards)
        cut = budget_cut(workspace, stage.folder, cards, plan.budget_calls)
        due = {Shard.of_name(name): int(card.counts["due"]) for name, card in cards.items() if card.counts["due"]}
        ask = PromptsStage(plan, state, cut, self.config, self.scenario, self.engine, resources)
        written = self.run(ask, dict.fromkeys(due, plan.fingerprint), sum(due.values()), "writing prompts")
        asked = {Shard.of_name(name): card for name, card in written.items() if card.rows_out}
        for shard, card in asked.items():
            state.shards[shard.number].waiting -= card.rows_out
        state.counts = _counts([*of_events, *cards.values(), *asked.values()])
        moved = {Shard.of_name(name): card.files for name, card in cards.items()}
        behaviors = {s: files[path] for s, files in moved.items() if (path := f"behaviors/{s.file()}") in files}
        return Moved(plan, state, {shard: card.files[shard.file()] for shard, card in asked.items()}, behaviors)


@dataclass(frozen=True)
class Moved:
    """What a plan's first stages made."""

    plan: RefreshPlan
    state: State  # with all new events in their users' short terms
    prompts: Mapping[Shard, FileEntry]  # by shard
    behaviors: Mapping[Shard, FileEntry]  # by shard with new events, where the parent release keeps behaviors


def _state_after(plan: RefreshPlan, base: State, cards: Mapping[str, Card]) -> State:
    """What is known before anybody is asked. cards: of InterestsStage."""
    shards = dict(base.shards)
    for name, card in cards.items():
        shard = Shard.of_name(name)
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
    )


def _counts(cards: Iterable[Card]) -> dict[str, int]:
    """What happened, for people: sums over the cards of all stages."""
    counts = dict.fromkeys(_COUNTS, 0)
    for card in cards:
        for name, n in card.counts.items():
            if name in _COUNTS or name.startswith("refused_"):
                counts[name] = counts.get(name, 0) + int(n)
    return counts | {"left_waiting": counts["due"] - counts["calls"]}


class PromptsStage(Stage):
    """Shards with candidates: the prompts of those who are asked about, and their partitions."""

    name = "prompts"

    def __init__(
        self,
        plan: RefreshPlan,
        state: State,
        cut: Cut,
        config: RefreshConfig,
        scenario: Scenario,
        engine: EngineConfig,
        resources: Resources,
    ) -> None:
        """state: with all new events."""
        self.folder, self.candidates = plan.part("prompts"), plan.part("interests")
        self.state, self.cut, self.config, self.encoder = state, cut, config, plan.encoder
        self.scenario, self.engine, self.resources = scenario, engine, resources
        self._count_tokens: Callable[[str], int] | None = None

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        due = workspace.read_parquet(f"{self.candidates}/due/{shard.file()}")
        chosen = read_tombstones(workspace).without(due.filter(pa.array(self.cut.admits(due))))
        if not chosen.num_rows:
            return Result({}, due.num_rows)
        users = {u.user_id: u for u in self.state.read_users(workspace, shard.number, self.encoder)}
        asked = [users[id_] for id_ in chosen["user_id"].to_pylist()]
        tables = {
            shard.file(): prompts_table(self._prompts(asked)),
            f"partitions/{shard.file()}": self._partitions(asked, chosen),
        }
        work.check()
        files = {path: workspace.write_parquet(work.artifact.path(path), table) for path, table in tables.items()}
        reasons = Counter(chosen["reason"].to_pylist())
        counts = {"calls": len(asked), **{f"frozen_by_{reason}": n for reason, n in reasons.items()}}
        return Result(files, due.num_rows, len(asked), counts=counts)

    def close(self) -> None:
        """See Stage.close."""
        self.resources.close()

    def _partitions(self, users: Sequence[UserState], due: pa.Table) -> pa.Table:
        sums, weights = sum_vectors(*short_columns(users), self.resources.item_vectors)
        columns = [due["user_id"], due["reason"], due["drift"], pa.array(list(sums), PARTITIONS.field(3).type), weights]
        return pa.table(columns, schema=PARTITIONS)

    def _prompts(self, users: Sequence[UserState]) -> Iterator[Prompt]:
        """What to ask about the short term of each of `users`, beside what the parent release says of them."""
        if self._count_tokens is None:  # a tokenizer takes seconds to load
            self._count_tokens = token_counter(self.engine)
        system, catalog = refresh_system(self.scenario), self.resources.catalog
        earlier = self.resources.release.store.own_knowledge("user", [u.user_id for u in users])
        for user, knowledge in zip(users, earlier, strict=True):
            titles = catalog.titles(np.array([b.item for b in user.short], dtype=np.int64))
            quoted = [(title, b.rating) for title, b in zip(titles, user.short, strict=True) if title]
            text, facts = refresh_prompt(
                self.scenario, knowledge.text if knowledge else "", quoted, self.config, self._count_tokens
            )
            as_of = max(as_of_after(user), knowledge.as_of if knowledge else 0)
            yield Prompt("user", user.user_id, as_of, system, text, facts)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_count_tokens": None}


# The release to build on


def parent_release(workspace: Workspace, after: str | None, encoder: EncoderConfig) -> ReleaseManifest:
    """The current release, to build on.

    The pointer's history decides: what a roll-back leaves behind is no longer in it. A release that came after the last
    refresh, a compaction or a whole new run, is built upon as it is. But what a roll-back took away must not come back
    by itself with the next refresh, and behaviors that only it had read would be lost if the next one went on from
    there.

    after: a release that it must be or come after; None for the first refresh. encoder: the recipe's.
    Raises ReleaseError where there is none, it or what it is read on top of is gone, it was rolled back, or its vectors
    are another encoder's.
    """
    history = pointer_history(workspace)
    if not history:
        raise ReleaseError(
            f"{workspace.path('releases')}: nothing was published yet, and a refresh builds on a whole run. "
            "Run `owlrec run` with the same recipe first."
        )
    current = history[-1]
    if not workspace.exists("releases", current, MANIFEST):
        raise ReleaseError(
            f"release {current}, which a refresh would build on, is gone from {workspace.path('releases')}. Make "
            "another one current (`owlrec releases` lists them, `owlrec rollback` goes back), or publish in full "
            "(`owlrec run --from publish`)."
        )
    if after is not None and after not in history:
        raise ReleaseError(
            f"the current release {current} does not come after {after}, which the refreshes go on from: it was "
            f"rolled back. Make that one current again (`owlrec rollback --to {after}`); or, to go on from {current}, "
            f"delete {workspace.path(ROOT)}: the refresh then reads the whole log again."
        )
    manifest = chain(workspace, current)[0]
    if manifest.encoder != encoder.model or manifest.encoder_identity not in ("", encoder.identity):
        raise ReleaseError(
            f"release {current} has the vectors of encoder '{manifest.encoder_identity or manifest.encoder}', but the "
            f"recipe's is '{encoder.identity}'. "
            "Put the encoder back, or run `encode` and `publish` with the new one first."
        )
    return manifest
