"""What a refresh keeps: each user's interests (LIBER, arXiv 2411.14713) and the state of a workspace."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from owlrec.errors import WorkspaceError
from owlrec.generation import EngineConfig, token_counter
from owlrec.ids import BEHAVIOR, shard_of
from owlrec.prompting.frameworks import first_tokens, in_budget, quoted_behavior, scenario_words
from owlrec.prompting.prompts import EARLIER
from owlrec.refresh.events import REFUSED, Events, LogFile, RefreshConfig
from owlrec.releases.release import Release
from owlrec.scenario import Scenario
from owlrec.schema import BEHAVIORS
from owlrec.shards import Card, Shard, in_threads
from owlrec.storage import Pointer, fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, read_tombstones

# ----------------------------------------------------------------------------------------------------------- partitions
# One user's interests as in LIBER (arXiv 2411.14713): behaviors read by the LLM, and an unread short term.
#
# New behaviors gather in the short term. All of it freezes when it is long enough, old enough, or when it drifts from
# earlier behaviors: into one partition, or into several if it is longer than a prompt. Only then does the LLM read it,
# one partition after another. The clock is the newest event of the log, never the machine's, so the same events always
# freeze the same partitions. A failed answer loses nothing: the short term stays and is retried once it has grown by
# the size of a minimum partition, since the same prompt would fail again.


Reason = Literal["", "length", "age", "drift"]
FREEZE_DRIFT = 0.6  # cosine distance between unread and read behaviors; about that between two film genres
FREEZE_MIN_BEHAVIORS = 3  # fewer are chance, not drift
STATE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("text_as_of", pa.int64()),
        ("n_partitions", pa.int32()),
        ("held", pa.int32()),
        ("times", pa.list_(pa.int64())),  # of the short term, like items and ratings
        ("items", pa.list_(pa.int64())),
        ("ratings", pa.list_(pa.float32())),
        ("seen_times", pa.list_(pa.int64())),
        ("seen_items", pa.list_(pa.int64())),
        ("interest", pa.list_(pa.float32())),
    ]
)


class Behavior(NamedTuple):
    """One interaction; sorts by time, then by item."""

    time: int  # ms since 1970, UTC
    item: int
    rating: float | None

    @property
    def key(self) -> tuple[int, int]:
        """Key that distinguishes it from the user's other behaviors."""
        return self.time, self.item


def no_interest() -> np.ndarray:
    """Interest of a user without read behaviors."""
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class UserState:
    """Stored state of one user."""

    user_id: int
    text_as_of: int = 0  # ms: newest behavior that the LLM has read; 0 for none
    n_partitions: int = 0  # frozen and read so far
    held: int = 0  # length of the short term at its last failed answer; 0: no failure
    short: tuple[Behavior, ...] = ()  # unread, sorted
    # Keys of behaviors that left the short term and may still arrive again, sorted.
    seen: tuple[tuple[int, int], ...] = ()
    # Over all read items (drift.sum_vectors): float32 [2, d], [0, 0] for none.
    interest: np.ndarray = field(default_factory=no_interest, compare=False)


def bootstrap(user_id: int, as_of: int | None, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """State of a user that no refresh has seen: read up to `as_of` (None: not at all), with later behaviors unread.

    behaviors: all of the user's in the tables. horizon: see `take_in`.
    """
    behaviors = sorted(behaviors)
    unread = tuple(b for b in behaviors if as_of is None or b.time > as_of)
    seen = tuple(b.key for b in behaviors[: len(behaviors) - len(unread)])
    return UserState(user_id, text_as_of=as_of or 0, short=unread, seen=_within(seen, horizon))


def take_in(state: UserState, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """`state` with new behaviors in its short term; known ones are skipped.

    horizon: ms; older events will never be considered again, so their keys are dropped. None: keep all.
    """
    known = {b.key for b in state.short} | set(state.seen)
    new = {b.key: b for b in behaviors if b.key not in known}
    short = tuple(sorted([*state.short, *new.values()]))
    return replace(state, short=short, seen=_within(state.seen, horizon))


def due_reason(state: UserState, drift: float, clock: int, config: RefreshConfig) -> Reason:
    """Reason to freeze the short term now, "" if there is none.

    drift: see refresh.interests. clock: ms, the newest event of all users.
    """
    n = len(state.short)
    if n == 0 or (state.held and n < state.held + FREEZE_MIN_BEHAVIORS):
        return ""
    if n >= config.freeze_behaviors:
        return "length"
    if clock - state.short[0].time >= config.freeze_ms:
        return "age"
    return "drift" if n >= FREEZE_MIN_BEHAVIORS and drift >= FREEZE_DRIFT else ""


def due_at(state: UserState, config: RefreshConfig) -> int | None:
    """When the short term becomes old enough if nothing else happens (ms); None for never."""
    waits = state.held and len(state.short) < state.held + FREEZE_MIN_BEHAVIORS
    return None if waits or not state.short else state.short[0].time + config.freeze_ms


def next_as_of(behaviors: Iterable[Behavior], before: int) -> int:
    """as_of (ms) of a text that reads a partition after a text of `before`: the newest quoted behavior.

    It is always later than `before`, so no two texts of a user have the same moment: a partition of late behaviors, or
    the next one of the same moment, gets one millisecond more.
    """
    return max([before + 1, *(b.time for b in behaviors)])


def freeze(state: UserState, n: int, as_of: int, interest: np.ndarray, horizon: int | None) -> UserState:
    """State after the LLM has read the first `n` behaviors of the short term.

    as_of: of the new text. interest: of the items, as in UserState. horizon: see `take_in`.
    """
    return replace(
        state,
        text_as_of=as_of,
        n_partitions=state.n_partitions + 1,
        held=0,
        short=state.short[n:],
        seen=_within([*state.seen, *(b.key for b in state.short[:n])], horizon),
        interest=add_interest(state.interest, interest),
    )


def hold(state: UserState) -> UserState:
    """State after a failed answer about the short term."""
    return replace(state, held=len(state.short))


def add_interest(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two interests, either of which may be empty."""
    return one + other if one.shape == other.shape else (one if one.size else other)


def as_interest(values: np.ndarray) -> np.ndarray:
    """An interest from its flat form: float32 [2, d]."""
    return values.astype(np.float32).reshape(2, -1) if len(values) else no_interest()


def _within(keys: Sequence[tuple[int, int]], horizon: int | None) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(k for k in keys if horizon is None or k[0] >= horizon))


def behaviors(events: Events) -> list[Behavior]:
    """Events of one user as behaviors, in order."""
    ratings = [None if np.isnan(rating) else rating for rating in events.rating.tolist()]
    return list(map(Behavior, events.time.tolist(), events.item.tolist(), ratings))


def known_keys(users: Iterable[UserState]) -> Events:
    """All behaviors that the users' states know, without ratings."""
    keys = [(u.user_id, *key) for u in users for key in (*(b.key for b in u.short), *u.seen)]
    user, time, item = np.array(keys, dtype=np.int64).reshape(-1, 3).T
    return Events(user, item, np.full(len(user), np.nan, dtype=np.float32), time)


# As a table


def to_table(users: Sequence[UserState]) -> pa.Table:
    """A table of STATE, in the order of `users`."""
    columns = [
        [u.user_id for u in users],
        [u.text_as_of for u in users],
        [u.n_partitions for u in users],
        [u.held for u in users],
        [[b.time for b in u.short] for u in users],
        [[b.item for b in u.short] for u in users],
        [[b.rating for b in u.short] for u in users],
        [[time for time, _ in u.seen] for u in users],
        [[item for _, item in u.seen] for u in users],
        [u.interest.reshape(-1) for u in users],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, STATE, strict=True)], schema=STATE)


def from_table(table: pa.Table, *, interests: bool = True) -> list[UserState]:
    """Users from a table of STATE; without `interests`, nothing is known about their likes."""
    values, lengths = _flat(table, "interest")
    bounds = np.r_[0, np.cumsum(lengths)]
    users = []
    for row, fields in enumerate(table.drop_columns(["interest"]).to_pylist()):
        interest = as_interest(values[bounds[row] : bounds[row + 1]] if interests else values[:0])
        users.append(
            UserState(
                user_id=fields["user_id"],
                text_as_of=fields["text_as_of"],
                n_partitions=fields["n_partitions"],
                held=fields["held"],
                short=tuple(map(Behavior, fields["times"], fields["items"], fields["ratings"])),
                seen=tuple(zip(fields["seen_times"], fields["seen_items"], strict=True)),
                interest=interest,
            )
        )
    return users


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column's values, concatenated, and the lists' lengths."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy(zero_copy_only=False)


# ------------------------------------------------------------------------------------------------------------ behaviors
# Latest behaviors of users with new events for the next release: scores follow users' actions, whether or
# not their texts change.


def renewed_behaviors(users: Sequence[UserState], parent: Release) -> pa.Table:
    """Rows of these users (schema.BEHAVIORS): the parent release's and their unread behaviors,
    each once, by time and item, up to the release's limit. Empty if the release keeps none.

    The parent's row of a behavior takes precedence, because it has the label.
    """
    length = parent.manifest.history_length
    if not length or not users:
        return BEHAVIORS.empty_table()
    earlier = parent.store.behaviors([user.user_id for user in users])
    rows = [_last(user, before, length) for user, before in zip(users, earlier, strict=True)]
    columns = [pa.array([user.user_id for user in users], pa.int64())]
    for column, name in zip(list(BEHAVIORS)[1:], BEHAVIOR.names or (), strict=True):
        values = [row[name] for row in rows]
        lists = [pa.array(v, column.type.value_type, from_pandas=name == "rating") for v in values]
        offsets = pa.array(np.r_[0, np.cumsum([len(v) for v in values])].astype(np.int32))
        columns.append(pa.ListArray.from_arrays(offsets, pa.concat_arrays(lists)))
    return pa.table(columns, schema=BEHAVIORS)


def _last(user: UserState, before: np.ndarray | None, length: int) -> np.ndarray:
    known = np.zeros(0, dtype=BEHAVIOR) if before is None else before
    new = np.zeros(len(user.short), dtype=BEHAVIOR)
    for name in ("time", "item", "rating"):
        new[name] = np.array([getattr(b, name) for b in user.short], dtype=BEHAVIOR[name])  # None becomes NaN
    new["label"] = 1  # passed-over events are not read
    both = np.concatenate([known, new])
    kept = both[np.unique(both[["time", "item"]], return_index=True)[1]]  # the first of each, by time and item
    return kept[-length:]


# ---------------------------------------------------------------------------------------------------------------- state
# State of a workspace's refreshes, which survive being killed at any moment.
#
#     refresh/CURRENT             a Pointer: names the folder of the last refresh
#     refresh/items/              rows of items on top of the prepared table: see refresh.items
#     refresh/<fingerprint16>/    one refresh, named by the fingerprint of its inputs
#         events/ interests/ prompts/ settled/    artifacts with one card per finished shard; for items:
#         item-log/ items/
#         plan.json               its inputs, written after the log is read
#         cards/delta/            the release it built, before that becomes current
#         state.json              the state after it; written last, before the pointer moves
#
# A state names one file of users per shard. A shard without changes keeps its file from an earlier refresh, and the
# state also records for each shard whether any user waits for a call, or when the next one will, so the others need
# not be opened. A user without events is in no file. A repeated refresh finds its cards and
# continues from there; until the pointer moves, only releases have changed.


# --------------------------------------------------------------------------------------------------------------- prompt
# LIBER's cascading prompts (arXiv 2411.14713): the LLM's earlier text about a user, and the user's behaviors since
# then.
#
# From the paper: a long history is read one partition at a time, together with the text about earlier ones, so a
# prompt stays short for any length of history. Ours: the wording and the budgets. A partition is as long as the
# history of any other prompt; the earlier text is quoted as far as the engine's context allows, nearly always
# in full. It is quoted, because the quality gate ignores quotes when it looks for echoes, and it also starts the facts,
# so a fallback loses nothing. No profile is quoted: the earlier text covers it.


_SYSTEM = "You keep a brief summary of a user's preferences on {items}, with reasons."
_NEXT = (
    'Summary so far: "{earlier}"\n'
    "Since then the user {consumed}, oldest first: {behaviors}.\n"
    "Rewrite the summary: what still holds, what is new, and why."
)
_FIRST = (
    "The user {consumed} these {items}, oldest first: {behaviors}.\n"
    "Summarize the user's preferences on {items}, considering {factors}."
)
_CHAT_TOKENS = 64  # upper bound on a chat template's tokens

Behaviors = Sequence[tuple[str, float | None]]  # (title, rating), oldest first, all with a title


@dataclass(frozen=True)
class RefreshPrompts:
    """Prompts of a refresh: the wording, and the parts that fit the model."""

    scenario: Scenario
    engine: EngineConfig
    history_tokens: int  # for quoted behaviors: prompts.history_tokens
    answer_tokens: int  # sampling.max_tokens

    def __reduce__(self) -> tuple[type["RefreshPrompts"], tuple[Scenario, EngineConfig, int, int]]:
        return RefreshPrompts, (self.scenario, self.engine, self.history_tokens, self.answer_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that shapes a prompt besides its user."""
        budgets = (self.history_tokens, self.answer_tokens, self.engine.max_model_len)
        return fingerprint(*budgets, self.scenario, _SYSTEM, _NEXT, _FIRST)

    @cached_property
    def count_tokens(self) -> Callable[[str], int]:
        """Counts tokens like the engine. Cached, since most titles occur in many histories."""
        return lru_cache(maxsize=1 << 16)(token_counter(self.engine))

    @cached_property
    def system(self) -> str:
        """System turn shared by all prompts of a scenario."""
        return _SYSTEM.format(items=self.scenario.items)

    def ends(self, behaviors: Behaviors) -> list[int]:
        """Splits behaviors so that each partition fits a prompt; a longer behavior is its own partition."""
        return in_budget(self._quoted(behaviors), self.history_tokens, self.count_tokens)

    def after_text(self, earlier: str, behaviors: Behaviors) -> tuple[str, str]:
        """Prompt about one partition, and the same facts as separate sentences.

        earlier: the LLM's previous text about the user, "" for none.
        """
        text, facts, room = self.after_answer(behaviors)
        if earlier := first_tokens(earlier, room, self.count_tokens):
            return text.replace(EARLIER, earlier), facts.replace(EARLIER, earlier)
        behaved = "; ".join(self._quoted(behaviors))
        words = scenario_words(self.scenario, self.scenario.user_factors)
        return _FIRST.format(**words, behaviors=behaved), f"The user {self._facts(behaved)}"

    def after_answer(self, behaviors: Behaviors) -> tuple[str, str, int]:
        """The same with EARLIER in place of the earlier text, and the number of tokens that may replace it."""
        behaved = "; ".join(self._quoted(behaviors))
        words = scenario_words(self.scenario, self.scenario.user_factors)
        text = _NEXT.format(**words, earlier=EARLIER, behaviors=behaved)
        taken = self.count_tokens(self.system) + self.count_tokens(text) + self.answer_tokens + _CHAT_TOKENS
        facts = f"{EARLIER} Since then the user {self._facts(behaved)}"
        return text, facts, max(1, self.engine.max_model_len - taken)  # the engine reports a lack of space

    def _quoted(self, behaviors: Behaviors) -> list[str]:
        return [quoted_behavior(self.scenario, title, rating) for title, rating in behaviors]

    def _facts(self, behaved: str) -> str:
        return f"{self.scenario.consumed} these {self.scenario.items}: {behaved}."


# ---------------------------------------------------------------------------------------------------------------- state


REFRESH_FOLDER = "refresh"
CLAIM = "claims/refresh/CURRENT"
DELTA = Shard("delta", 0)
_Model = TypeVar("_Model", bound=BaseModel)


class ShardState(BaseModel):
    """One shard of users."""

    file: str = ""  # of users, relative to the workspace; "" without events
    users: int = 0
    encoder: str = ""  # encoder of the vectors in the interests
    waiting: int = 0  # users due for a call beyond the budget
    due_at: int | None = None  # ms: when the next user's short term will be old enough
    deferred: str = ""  # file of refused events that may still be accepted (events.REFUSED); "" for none
    retry_at: int | None = None  # ms: when the first of those from the future is due


class State(BaseModel):
    """State after a refresh."""

    name: str = ""  # of its folder; "" before the first refresh
    n_shards: int
    shards: dict[int, ShardState] = {}
    watermark: int | None = None  # ms: newest considered event
    release: str = ""  # current when the refresh ended
    admitted_by: str = ""  # fingerprint of the tables and rules that deferred events
    log: dict[str, LogFile] = {}
    item_log: dict[str, LogFile] = {}
    counts: dict[str, int] = {}  # of the refresh that wrote it

    @property
    def calls(self) -> int:
        """Number of user partitions in that refresh's prompts."""
        return self.counts.get("calls", 0)

    @property
    def item_calls(self) -> int:
        """Number of items in that refresh's prompts."""
        return self.counts.get("item_calls", 0)

    @property
    def prompts(self) -> str:
        """Folder of its prompts (schema.PROMPTS), by shard of users."""
        return f"{REFRESH_FOLDER}/{self.name}/prompts/user"

    @property
    def partitions(self) -> str:
        """Folder of the partitions it froze (plan.PARTITIONS), by shard of users."""
        return f"{REFRESH_FOLDER}/{self.name}/prompts/partitions/user"

    def split(self, n_shards: int) -> "State":
        """The same for more shards: each reads the file of the shard it was split from."""
        if n_shards == self.n_shards:
            return self
        shards = {n: s for n in range(n_shards) if (s := self.shards.get(n & (self.n_shards - 1))) is not None}
        return self.model_copy(update={"n_shards": n_shards, "shards": shards})

    def due_shards(self, clock: int) -> set[int]:
        """Shards with a waiting user, or one whose short term is old enough by `clock` (ms)."""
        return {n for n, s in self.shards.items() if s.waiting or (s.due_at is not None and s.due_at <= clock)}

    def retried_shards(self, admitted_by: str, until: int) -> set[int]:
        """Shards with deferred events that may be accepted now. until: ms, the latest moment that is not future."""
        return {
            n
            for n, s in self.shards.items()
            if s.deferred and (admitted_by != self.admitted_by or (s.retry_at is not None and s.retry_at <= until))
        }

    def read_users(self, workspace: Workspace, number: int, encoder: str) -> list[UserState]:
        """Users of a shard, ascending; none if it has no file.

        encoder: the current one. Interests from another encoder are dropped, because they are not comparable.
        """
        shard = self.shards.get(number)
        if shard is None or not shard.file:
            return []
        table = self._own(workspace, shard.file, number)
        return from_table(table, interests=shard.encoder == encoder)

    def read_deferred(self, workspace: Workspace, number: int) -> pa.Table:
        """Refused events of a shard that may still be accepted (events.REFUSED)."""
        shard = self.shards.get(number)
        if shard is None or not shard.deferred:
            return REFUSED.empty_table()
        return self._own(workspace, shard.deferred, number)

    def _own(self, workspace: Workspace, path: str, number: int) -> pa.Table:
        """A shard's rows of a file that it may share with others since a split; without forgotten users."""
        table = read_tombstones(workspace).without(workspace.read_parquet(path))
        return table.filter(pa.array(shard_of(table["user_id"].to_numpy(), self.n_shards) == number))


class RefreshPlan(BaseModel):
    """Inputs of one refresh. All its other decisions follow from these and the cards of its stages."""

    fingerprint: str
    base: str  # folder of the previous state; "" for the first refresh
    recipe: str  # fingerprint of config, wording and encoder
    parent: str  # base release
    encoder: str  # encoder of the parent's vectors
    now: int  # ms: later times are in the future
    clock: int  # ms: the newest event of the log up to now
    lateness_ms: int
    budget_calls: int | None
    n_shards: int
    shards: list[int]  # with new events, or with users who are or may be due
    item_shards: list[int]  # with rows in the item log, or items without an answer
    admitted_by: str
    log: dict[str, LogFile]
    item_log: dict[str, LogFile]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.fingerprint[:16]

    @property
    def folder(self) -> str:
        """Its folder, relative to the workspace."""
        return f"{REFRESH_FOLDER}/{self.name}"

    def part(self, artifact: str) -> str:
        """The folder of one of its artifacts, relative to the workspace."""
        return f"{self.folder}/{artifact}"

    @property
    def horizon(self) -> int:
        """ms: no later refresh considers older events."""
        return self.clock - self.lateness_ms


def pointer(workspace: Workspace) -> Pointer:
    """Pointer to the last refresh."""
    return Pointer(workspace, f"{REFRESH_FOLDER}/CURRENT")


def read_state(workspace: Workspace) -> State:
    """State after the last refresh, for the workspace's shards."""
    name = pointer(workspace).current
    n_shards = workspace.n_shards("user")
    return (
        _read(workspace, f"{REFRESH_FOLDER}/{name}/state.json", State).split(n_shards)
        if name
        else State(n_shards=n_shards)
    )


def write_state(workspace: Workspace, state: State, base: str) -> None:
    """Ends a refresh: writes its state, then moves the pointer. Raises PointerMoved if another refresh moved it."""
    workspace.write_json(f"{REFRESH_FOLDER}/{state.name}/state.json", state.model_dump(exclude_defaults=True))
    pointer(workspace).move(state.name, expected=base or None)


def write_plan(workspace: Workspace, plan: RefreshPlan) -> None:
    """Writes the inputs of a refresh."""
    workspace.write_json(f"{plan.folder}/plan.json", plan.model_dump())


def unfinished_plans(workspace: Workspace, base: str) -> list[RefreshPlan]:
    """Plans of unfinished refreshes that continue from a state."""
    names = [
        n for n in workspace.names(REFRESH_FOLDER) if n != base and workspace.exists(REFRESH_FOLDER, n, "plan.json")
    ]
    plans = [_read(workspace, f"{REFRESH_FOLDER}/{name}/plan.json", RefreshPlan) for name in names]
    return [plan for plan in plans if plan.base == base]


def sweep(workspace: Workspace, state: State) -> None:
    """Removes files of earlier refreshes, except for those named in the state, and dead letters."""
    needed = {file for shard in state.shards.values() for file in (shard.file, shard.deferred)}
    files: dict[str, list[str]] = {}
    for path in workspace.entries(REFRESH_FOLDER):
        name, below, _ = path.partition("/")
        if below and name != state.name and not path.startswith(f"{ITEM_UPDATES.rpartition('/')[2]}/"):
            files.setdefault(name, []).append(f"{REFRESH_FOLDER}/{path}")
    for name, paths in files.items():
        passed = [path for path in paths if path not in needed and "dead" not in path.split("/")]
        if len(passed) == len(paths):
            workspace.delete_dir(REFRESH_FOLDER, name)
            continue
        in_threads(workspace.delete_file, passed)


def delta_card(plan: RefreshPlan, outputs: dict[str, str], user_shards: Sequence[int]) -> Card:
    """Card of a built delta. outputs: the release, and the folders of its texts and vectors."""
    counts: dict[str, float | int | str] = {"user_shards": json.dumps(user_shards)}
    return Card(stage="publish", shard=DELTA.name, fingerprint=plan.fingerprint, outputs=outputs, counts=counts)


def dead_files(workspace: Workspace) -> list[str]:
    """Files of events refused by refreshes (schema.DEAD_LETTERS)."""
    return [f"{REFRESH_FOLDER}/{path}" for path in workspace.entries(REFRESH_FOLDER) if "dead" in path.split("/")]


def _read(workspace: Workspace, path: str, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(workspace.read_json(path))
    except ValidationError as error:
        raise WorkspaceError(
            f"{workspace.path(path)} was written by another version of owlrec ({error.error_count()} errors). "
            f"Delete {workspace.path(REFRESH_FOLDER)} to restart the refreshes: all events are read again, and "
            "no text is lost."
        ) from None
