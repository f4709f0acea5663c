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
from owlrec.prompting.frameworks import first_tokens, in_budget, quoted_behaviour, scenario_words
from owlrec.prompting.prompts import EARLIER
from owlrec.refresh.events import REFUSED, Events, LogFile, RefreshConfig
from owlrec.releases.release import Release
from owlrec.scenario import Scenario
from owlrec.schema import BEHAVIOR, BEHAVIORS, shard_of
from owlrec.shards import Card, Shard, in_threads
from owlrec.storage import Pointer, fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, read_tombstones

# ----------------------------------------------------------------------------------------------------------- partitions
# One user's interests as LIBER keeps them (arXiv 2411.14713): what the LLM has read, and a short term still unread.
#
# New behaviors gather in the short term. It is frozen, all of it, when it is long enough, old enough, or when it drifts
# from what was read before: into one partition, or into several where it is longer than a prompt. Only then the LLM
# reads it, one partition after another. The clock is the newest event of the log, never the machine's, so that the same
# events always freeze the same partitions. An answer that fails loses nothing: the short term stays, and is asked about
# again once it has grown by a smallest partition, since the same question would fail again.


Reason = Literal["", "length", "age", "drift"]
FREEZE_DRIFT = 0.6  # cosine distance between what is unread and what was read: films of two genres are about so far
FREEZE_MIN_BEHAVIORS = 3  # fewer are an accident, not a drift
STATE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("text_as_of", pa.int64()),
        ("n_partitions", pa.int32()),
        ("held", pa.int32()),
        ("times", pa.list_(pa.int64())),  # of the short term, as are items and ratings
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
        """What tells it from the user's other behaviors."""
        return self.time, self.item


def no_interest() -> np.ndarray:
    """Of a user of whom nothing was read."""
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class UserState:
    """What is remembered of one user."""

    user_id: int
    text_as_of: int = 0  # ms: the newest behavior that the LLM has read; 0 for none
    n_partitions: int = 0  # frozen and read so far
    held: int = 0  # behaviors in the short term when an answer about it failed; 0: none did
    short: tuple[Behavior, ...] = ()  # unread, sorted
    # Keys of behaviors that left the short term and might still arrive again, sorted.
    seen: tuple[tuple[int, int], ...] = ()
    # Of all items read (drift.sum_vectors): float32 [2, d], [0, 0] for none.
    interest: np.ndarray = field(default_factory=no_interest, compare=False)


def bootstrap(user_id: int, as_of: int | None, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """The state of a user whom no refresh has met: read up to `as_of` (None: not at all), the later behaviors unread.

    behaviors: all that the tables hold of the user. horizon: see `take_in`.
    """
    behaviors = sorted(behaviors)
    unread = tuple(b for b in behaviors if as_of is None or b.time > as_of)
    seen = tuple(b.key for b in behaviors[: len(behaviors) - len(unread)])
    return UserState(user_id, text_as_of=as_of or 0, short=unread, seen=_within(seen, horizon))


def take_in(state: UserState, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """`state` with new behaviors in its short term; those that it has seen are left out.

    horizon: ms; no older event will ever be considered again, so what was seen before it is forgotten. None: none was.
    """
    known = {b.key for b in state.short} | set(state.seen)
    new = {b.key: b for b in behaviors if b.key not in known}
    short = tuple(sorted([*state.short, *new.values()]))
    return replace(state, short=short, seen=_within(state.seen, horizon))


def why_due(state: UserState, drift: float, clock: int, config: RefreshConfig) -> Reason:
    """Why the short term is to be frozen now, "" where it is not.

    drift: see refresh.drift. clock: ms, the newest event of all users.
    """
    n = len(state.short)
    if n == 0 or (state.held and n < state.held + FREEZE_MIN_BEHAVIORS):
        return ""
    if n >= config.freeze_behaviours:
        return "length"
    if clock - state.short[0].time >= config.freeze_ms:
        return "age"
    return "drift" if n >= FREEZE_MIN_BEHAVIORS and drift >= FREEZE_DRIFT else ""


def due_at(state: UserState, config: RefreshConfig) -> int | None:
    """When the short term will be old enough if nothing else happens (ms); None where it never will."""
    waits = state.held and len(state.short) < state.held + FREEZE_MIN_BEHAVIORS
    return None if waits or not state.short else state.short[0].time + config.freeze_ms


def next_as_of(behaviors: Iterable[Behavior], before: int) -> int:
    """The as_of (ms) of a text that reads a partition after a text of `before`: the newest behavior that it quotes.

    Later than `before` in any case, so that no two texts of a user have one moment: a partition of late behaviors, or
    the next one of the same moment, comes a millisecond after.
    """
    return max([before + 1, *(b.time for b in behaviors)])


def freeze(state: UserState, n: int, as_of: int, interest: np.ndarray, horizon: int | None) -> UserState:
    """The state once the LLM has read the first `n` behaviors of the short term.

    as_of: of what it wrote. interest: of the items, as UserState has it. horizon: see `take_in`.
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
    """The state once an answer about the short term has failed."""
    return replace(state, held=len(state.short))


def add_interest(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two interests, either of which may be empty."""
    return one + other if one.shape == other.shape else (one if one.size else other)


def as_interest(values: np.ndarray) -> np.ndarray:
    """An interest that was written flat: float32 [2, d]."""
    return values.astype(np.float32).reshape(2, -1) if len(values) else no_interest()


def _within(keys: Sequence[tuple[int, int]], horizon: int | None) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(k for k in keys if horizon is None or k[0] >= horizon))


def behaviors(events: Events) -> list[Behavior]:
    """Events of one user as behaviors, in their order."""
    ratings = [None if np.isnan(rating) else rating for rating in events.rating.tolist()]
    return list(map(Behavior, events.time.tolist(), events.item.tolist(), ratings))


def known_keys(users: Iterable[UserState]) -> Events:
    """All behaviors that the users still know, without ratings."""
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
    """The users of a table of STATE; without `interests`, nothing is known of what they liked."""
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
    """A list column's values, one list after another, and the lists' lengths."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy(zero_copy_only=False)


# ------------------------------------------------------------------------------------------------------------ behaviors
# The last behaviors of users with new events, as the next release keeps them: scores follow what users did, whether or
# not their texts are renewed.


def renewed_behaviors(users: Sequence[UserState], parent: Release) -> pa.Table:
    """The rows of these users (schema.BEHAVIORS): what the parent release holds of them and their unread behaviors,
    each once, by time and item, as many as the release keeps. Empty where it keeps none.

    The parent's row of a behavior stays: it knows the label.
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
    new["label"] = 1  # events that were passed over are not read
    both = np.concatenate([known, new])
    kept = both[np.unique(both[["time", "item"]], return_index=True)[1]]  # the first of each, by time and item
    return kept[-length:]


# ---------------------------------------------------------------------------------------------------------------- state
# Where the refreshes of a workspace stand, and how one survives being killed at any moment.
#
#     refresh/CURRENT             a Pointer: names the folder of the last refresh
#     refresh/items/              rows of items that stand over the prepared table: see refresh.items
#     refresh/<fingerprint16>/    one refresh, named by what it was made from
#         events/ interests/ prompts/ settled/    artifacts with a card for each finished shard; of items:
#         item-log/ items/
#         plan.json               what it is made from, written once the log was read
#         cards/delta/            the release that it built, before that becomes current
#         state.json              what is known after it; written last, before the pointer moves
#
# A state names one file of users for each shard. A shard without news keeps its file from an earlier refresh, and the
# state also says of each shard whether anybody in it waits for a call, or when the next one will, so that the others
# need not be opened. A user whom no event has reached stands in no file. A refresh that is run again finds its cards
# and goes on from there; until the pointer has moved, nothing else has changed but releases.


# --------------------------------------------------------------------------------------------------------------- prompt
# LIBER's cascading prompts (arXiv 2411.14713): what the LLM wrote of a user before, and what the user did since.
#
# From the paper: a long history is read one partition at a time, each beside the text of those before it, so that a
# prompt stays short however long the history is. Ours: the wording and the budgets. A partition is as long as the
# history of any other prompt; the earlier text is quoted as far as the engine's context allows, which is nearly always
# whole. It stands in quotes, because the quality gate counts nothing quoted as an echo, and it opens the facts too, so
# that a fallback forgets nothing. No profile is quoted: the earlier text speaks of it.


_SYSTEM = "You keep a brief summary of a user's preferences on {items}, with reasons."
_NEXT = (
    'Summary so far: "{earlier}"\n'
    "Since then the user {consumed}, oldest first: {behaviors}.\n"
    "Rewrite the summary: what still holds, what is new, and why."
)
_FIRST = (
    "The user {consumed} these {items}, oldest first: {behaviors}.\n"
    "Summarise the user's preferences on {items}, considering {factors}."
)
_CHAT_TOKENS = 64  # what a chat template adds, and more

Behaviors = Sequence[tuple[str, float | None]]  # (title, rating), oldest first, all with a title


@dataclass(frozen=True)
class RefreshPrompts:
    """How a refresh asks: the wording, and what of it fits the model."""

    scenario: Scenario
    engine: EngineConfig
    history_tokens: int  # of the behaviors that a prompt quotes: prompts.history_tokens
    answer_tokens: int  # sampling.max_tokens

    def __reduce__(self) -> tuple[type["RefreshPrompts"], tuple[Scenario, EngineConfig, int, int]]:
        return RefreshPrompts, (self.scenario, self.engine, self.history_tokens, self.answer_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that shapes a prompt besides its user."""
        budgets = (self.history_tokens, self.answer_tokens, self.engine.max_model_len)
        return fingerprint(*budgets, self.scenario, _SYSTEM, _NEXT, _FIRST)

    @cached_property
    def count_tokens(self) -> Callable[[str], int]:
        """As the engine would. Remembers, since most titles stand in many histories."""
        return lru_cache(maxsize=1 << 16)(token_counter(self.engine))

    @cached_property
    def system(self) -> str:
        """The system turn that all prompts of a scenario share."""
        return _SYSTEM.format(items=self.scenario.items)

    def ends(self, behaviors: Behaviors) -> list[int]:
        """Where to part behaviors so that each partition fits a prompt; a longer one is a partition of its own."""
        return in_budget(self._quoted(behaviors), self.history_tokens, self.count_tokens)

    def after_text(self, earlier: str, behaviors: Behaviors) -> tuple[str, str]:
        """The prompt about one partition, and the same facts as sentences of their own.

        earlier: what the LLM wrote of the user before, "" for nothing.
        """
        text, facts, room = self.after_answer(behaviors)
        if earlier := first_tokens(earlier, room, self.count_tokens):
            return text.replace(EARLIER, earlier), facts.replace(EARLIER, earlier)
        behaved = "; ".join(self._quoted(behaviors))
        words = scenario_words(self.scenario, self.scenario.user_factors)
        return _FIRST.format(**words, behaviors=behaved), f"The user {self._facts(behaved)}"

    def after_answer(self, behaviors: Behaviors) -> tuple[str, str, int]:
        """The same with EARLIER in the place of the earlier text, and how many tokens may take it."""
        behaved = "; ".join(self._quoted(behaviors))
        words = scenario_words(self.scenario, self.scenario.user_factors)
        text = _NEXT.format(**words, earlier=EARLIER, behaviors=behaved)
        taken = self.count_tokens(self.system) + self.count_tokens(text) + self.answer_tokens + _CHAT_TOKENS
        facts = f"{EARLIER} Since then the user {self._facts(behaved)}"
        return text, facts, max(1, self.engine.max_model_len - taken)  # too little is the engine's error to tell

    def _quoted(self, behaviors: Behaviors) -> list[str]:
        return [quoted_behaviour(self.scenario, title, rating) for title, rating in behaviors]

    def _facts(self, behaved: str) -> str:
        return f"{self.scenario.consumed} these {self.scenario.items}: {behaved}."


# ---------------------------------------------------------------------------------------------------------------- state


REFRESH_FOLDER = "refresh"
CLAIM = "claims/refresh/CURRENT"
DELTA = Shard("delta", 0)
_Model = TypeVar("_Model", bound=BaseModel)


class ShardState(BaseModel):
    """One shard of users."""

    file: str = ""  # of users, relative to the workspace; "" where no event has reached any
    users: int = 0
    encoder: str = ""  # whose vectors the interests were summed from
    waiting: int = 0  # users whose short term is to be frozen, but for whom the budget had no call
    due_at: int | None = None  # ms: when the next user's short term will be old enough
    deferred: str = ""  # the file of refused events that may yet be taken in (events.REFUSED); "" for none
    retry_at: int | None = None  # ms: when the first of those from the future will have come


class State(BaseModel):
    """What is known after a refresh."""

    name: str = ""  # of its folder; "" before the first refresh
    n_shards: int
    shards: dict[int, ShardState] = {}
    watermark: int | None = None  # ms: the newest event that was considered
    release: str = ""  # current when the refresh ended
    admitted_by: str = ""  # fingerprint of the tables and rules by which events were deferred
    log: dict[str, LogFile] = {}
    item_log: dict[str, LogFile] = {}
    counts: dict[str, int] = {}  # of the refresh that led here

    @property
    def calls(self) -> int:
        """How many partitions of users that refresh asked about."""
        return self.counts.get("calls", 0)

    @property
    def item_calls(self) -> int:
        """How many items it asked about."""
        return self.counts.get("item_calls", 0)

    @property
    def prompts(self) -> str:
        """The folder of its prompts (schema.PROMPTS), by shard of users."""
        return f"{REFRESH_FOLDER}/{self.name}/prompts/user"

    @property
    def partitions(self) -> str:
        """The folder of the partitions that it froze (plan.PARTITIONS), by shard of users."""
        return f"{REFRESH_FOLDER}/{self.name}/prompts/partitions/user"

    def split(self, n_shards: int) -> "State":
        """The same for more shards: each reads the file of the one that it was split from."""
        if n_shards == self.n_shards:
            return self
        shards = {n: s for n in range(n_shards) if (s := self.shards.get(n & (self.n_shards - 1))) is not None}
        return self.model_copy(update={"n_shards": n_shards, "shards": shards})

    def due_shards(self, clock: int) -> set[int]:
        """The shards in which somebody waits, or has an old enough short term by `clock` (ms)."""
        return {n for n, s in self.shards.items() if s.waiting or (s.due_at is not None and s.due_at <= clock)}

    def retried_shards(self, admitted_by: str, until: int) -> set[int]:
        """The shards with deferred events that may be taken in now. until: ms, the latest moment that is not future."""
        return {
            n
            for n, s in self.shards.items()
            if s.deferred and (admitted_by != self.admitted_by or (s.retry_at is not None and s.retry_at <= until))
        }

    def read_users(self, workspace: Workspace, number: int, encoder: str) -> list[UserState]:
        """The users of a shard, ascending; none where it has no file.

        encoder: what vectors come from now. Interests of another encoder's are left out: they cannot be compared.
        """
        shard = self.shards.get(number)
        if shard is None or not shard.file:
            return []
        table = self._own(workspace, shard.file, number)
        return from_table(table, interests=shard.encoder == encoder)

    def read_deferred(self, workspace: Workspace, number: int) -> pa.Table:
        """The events of a shard that were refused and may yet be taken in (events.REFUSED)."""
        shard = self.shards.get(number)
        if shard is None or not shard.deferred:
            return REFUSED.empty_table()
        return self._own(workspace, shard.deferred, number)

    def _own(self, workspace: Workspace, path: str, number: int) -> pa.Table:
        """A shard's rows of a file that it may share with others since it was split; nobody who is forgotten."""
        table = read_tombstones(workspace).without(workspace.read_parquet(path))
        return table.filter(pa.array(shard_of(table["user_id"].to_numpy(), self.n_shards) == number))


class RefreshPlan(BaseModel):
    """What one refresh is made from. Everything else that it decides follows from this and the cards of its stages."""

    fingerprint: str
    base: str  # the folder of the state that it goes on from; "" for the first refresh
    recipe: str  # fingerprint of config, wording and encoder
    parent: str  # the release that it is planned on
    encoder: str  # whose vectors the parent has
    now: int  # ms: what is later is from the future
    clock: int  # ms: the newest event of the log up to now
    lateness_ms: int
    budget_calls: int | None
    n_shards: int
    shards: list[int]  # that have new events, or in which somebody is or may be due
    item_shards: list[int]  # that have rows in the item log, or items without an answer
    admitted_by: str
    log: dict[str, LogFile]
    item_log: dict[str, LogFile]

    @property
    def name(self) -> str:
        """Of its folder."""
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
        """ms: no later refresh considers an older event."""
        return self.clock - self.lateness_ms


def pointer(workspace: Workspace) -> Pointer:
    """What names the last refresh."""
    return Pointer(workspace, f"{REFRESH_FOLDER}/CURRENT")


def read_state(workspace: Workspace) -> State:
    """What is known after the last refresh, by the workspace's shards."""
    name = pointer(workspace).current
    n_shards = workspace.n_shards("user")
    return (
        _read(workspace, f"{REFRESH_FOLDER}/{name}/state.json", State).split(n_shards)
        if name
        else State(n_shards=n_shards)
    )


def write_state(workspace: Workspace, state: State, base: str) -> None:
    """Ends a refresh: writes its state, then moves the pointer. Raises PointerMoved where another refresh moved it."""
    workspace.write_json(f"{REFRESH_FOLDER}/{state.name}/state.json", state.model_dump(exclude_defaults=True))
    pointer(workspace).move(state.name, expected=base or None)


def write_plan(workspace: Workspace, plan: RefreshPlan) -> None:
    """Writes down what a refresh is made from."""
    workspace.write_json(f"{plan.folder}/plan.json", plan.model_dump())


def unfinished_plans(workspace: Workspace, base: str) -> list[RefreshPlan]:
    """The plans of refreshes that go on from a state and have not ended."""
    names = [
        n for n in workspace.names(REFRESH_FOLDER) if n != base and workspace.exists(REFRESH_FOLDER, n, "plan.json")
    ]
    plans = [_read(workspace, f"{REFRESH_FOLDER}/{name}/plan.json", RefreshPlan) for name in names]
    return [plan for plan in plans if plan.base == base]


def sweep(workspace: Workspace, state: State) -> None:
    """Removes what earlier refreshes left, but for the files that the state names, and dead letters."""
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
    """What says that a plan's delta was built. outputs: the release, and the folders of its texts and vectors."""
    counts: dict[str, float | int | str] = {"user_shards": json.dumps(user_shards)}
    return Card(stage="publish", shard=DELTA.name, fingerprint=plan.fingerprint, outputs=outputs, counts=counts)


def dead_files(workspace: Workspace) -> list[str]:
    """The files of the events that refreshes refused (schema.DEAD_LETTERS)."""
    return [f"{REFRESH_FOLDER}/{path}" for path in workspace.entries(REFRESH_FOLDER) if "dead" in path.split("/")]


def _read(workspace: Workspace, path: str, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(workspace.read_json(path))
    except ValidationError as error:
        raise WorkspaceError(
            f"{workspace.path(path)} was not written by this owlrec ({error.error_count()} mistakes). Delete "
            f"{workspace.path(REFRESH_FOLDER)} to begin the refreshes again: all events are read once more, no text is "
            "lost."
        ) from None
