"""Updates a shard of users: new events go into short terms, and the partitions due become candidates.

A worker holds the users of one shard, the items' titles and the parent release. Candidates are written with their
priorities, and the card counts those by bin, so the budget is divided without gathering users.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.refresh.events import (
    EVENTS,
    REFUSED,
    Buckets,
    Events,
    RefreshConfig,
    admit,
    canonical,
    count_errors,
    dead_letters,
    new_refusals,
    split_future,
)
from owlrec.refresh.items import with_new_items
from owlrec.refresh.state import (
    Behavior,
    RefreshPlan,
    RefreshPrompts,
    State,
    UserState,
    behaviors,
    bootstrap,
    due_at,
    due_reason,
    known_keys,
    renewed_behaviors,
    take_in,
    to_table,
)
from owlrec.releases.release import Release, open_release
from owlrec.runner import Result, Stage, Work
from owlrec.schema import HISTORIES, INTERACTIONS, USERS
from owlrec.shards import Card, Shard
from owlrec.sources.outcomes import taken
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace

# --------------------------------------------------------------------------------------------------------------- budget
# Selection of a refresh's prompts: users with the highest drift times activity come first, ties by smaller id.
#
# A long backlog takes several calls, one per partition, each worth less than the previous one, because less is
# unread by then. So the budget may end in the middle of a backlog, and the rest waits.
#
# The selection is a threshold over all shards' candidates, found without gathering them: shards count theirs by
# the first digits of their rank, and only the bin with the threshold is read, digit by digit, as in a radix
# sort.


# A partition due to be frozen.
DUE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("partition", pa.int32()),  # number within the user, from 0
        ("end", pa.int32()),  # length of the short term read after it
        ("reason", pa.string()),
        ("drift", pa.float32()),
        ("priority", pa.float64()),
    ]
)
_AT_ONCE = 1 << 20  # candidates sorted in memory


@dataclass(frozen=True)
class Cut:
    """The last partition within the budget."""

    priority: float
    user_id: int
    partition: int

    def admits(self, due: pa.Table) -> np.ndarray:
        """Rows of DUE within the budget: bool [n]."""
        priority, ids, partition = (due[name].to_numpy() for name in ("priority", "user_id", "partition"))
        earlier = (ids < self.user_id) | ((ids == self.user_id) & (partition <= self.partition))
        return (priority > self.priority) | ((priority == self.priority) & earlier)


EVERYONE = Cut(-1.0, 0, 0)  # priorities are never negative
NOBODY = Cut(np.inf, 0, 0)


def rank_digits(due: pa.Table) -> np.ndarray:
    """Rank of candidates (DUE) as nine digits of 16 bits: int64 [n, 9], smaller ones first.

    The bits of a non-negative float ascend with its value: four digits of the priority, inverted, four of the id,
    one of the partition.
    """
    priority = np.abs(due["priority"].to_numpy())  # -0.0 is 0.0
    keys = [~priority.view(np.uint64), due["user_id"].to_numpy().view(np.uint64) ^ np.uint64(1 << 63)]
    digits = [key >> np.uint64(shift) & np.uint64(0xFFFF) for key in keys for shift in (48, 32, 16, 0)]
    return np.stack([*digits, due["partition"].to_numpy().astype(np.uint64)], axis=1).astype(np.int64)


def budget_cut(workspace: Workspace, folder: str, cards: Mapping[str, Card], budget: int | None) -> Cut:
    """The end of the budget (None: unlimited) among the candidates of all shards.

    folder, cards: of InterestsStage. Holds at most a million candidates, however many there are.
    """
    if budget == 0:
        return NOBODY
    bins = {name: json.loads(str(card.counts["bins"])) for name, card in cards.items() if card.counts["due"]}
    counts: Counter[int] = Counter()
    for shard_bins in bins.values():
        counts.update({int(digit): n for digit, n in shard_bins.items()})
    if budget is None or counts.total() <= budget:
        return EVERYONE
    prefix: list[int] = []
    files: list[str] = []
    left = budget
    while True:
        for digit in sorted(counts):
            if counts[digit] >= left:
                break
            left -= counts[digit]
        prefix.append(digit)
        if len(prefix) == 1:
            holders = [Shard.from_name(name) for name, shard_bins in bins.items() if str(digit) in shard_bins]
            files = [f"{folder}/due/{shard.file()}" for shard in holders]
        tables = _with_prefix(workspace, files, prefix)
        if counts[digit] <= _AT_ONCE:
            return _last(pa.concat_tables(tables), left)
        counts = Counter()
        for table in tables:
            counts.update(rank_digits(table)[:, len(prefix)].tolist())


def _with_prefix(workspace: Workspace, files: list[str], prefix: list[int]) -> Iterator[pa.Table]:
    """Candidates whose rank has this prefix."""
    for file in files:
        due = workspace.read_parquet(file)
        yield due.filter(pa.array((rank_digits(due)[:, : len(prefix)] == prefix).all(axis=1)))


def _last(due: pa.Table, n: int) -> Cut:
    """The n-th candidate."""
    priority, ids, partition = (due[name].to_numpy() for name in ("priority", "user_id", "partition"))
    row = np.lexsort((partition, ids, -priority))[n - 1]
    return Cut(float(priority[row]), int(ids[row]), int(partition[row]))


# ---------------------------------------------------------------------------------------------------------------- drift
# Drift: the distance of a user's unread behaviors from earlier ones, and the value of an LLM call.
#
# An interest is two sums of item vectors: of liked items, weighted by rating, and of items rated at or below
# the scenario's bound. In one sum they would cancel if a user likes and dislikes films of one kind. Drift is one
# minus the cosine between the interest of the short term and that of everything read, the larger value of the two
# sides. If neither side can be compared, because one interest has no vectors of it, everything is new (1.0): a user who
# comes to dislike former likes has drifted.


# Vectors of item ids int64 [n]: (float32 [n, d], mask bool [n]); KnowledgeStore.vectors of kind "item" is one.
Gather = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_UNKNOWN = 1.0


def sum_vectors(
    items: np.ndarray, ratings: np.ndarray, lengths: np.ndarray, gather: Gather, liked_above: float
) -> np.ndarray:
    """Interest of each list: float32 [m, 2, d], the weighted sum of liked items, then that of disliked items.

    items, ratings: int64 and float [n], all lists concatenated; lengths: int [m]. Liked items have a rating
    above `liked_above`, which is their weight, or none (NaN) and weight 1; disliked items have weight 1. An item
    without a finite vector has weight 0.
    """
    ids, place = np.unique(items, return_inverse=True)
    vectors, known = gather(ids)
    known = known & np.isfinite(vectors).all(axis=1)
    disliked = ratings <= liked_above  # False for NaN
    weights = np.where(np.isnan(ratings) | disliked, 1.0, np.maximum(ratings, 0.0)).astype(np.float32)
    weights *= known[place]
    sums = np.zeros((len(lengths), 2, vectors.shape[1]), dtype=np.float32)
    bounds = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    for row, (start, end) in enumerate(pairwise(bounds)):  # bounds memory
        used = start + np.flatnonzero(weights[start:end])
        for facet in (0, 1):
            mine = used[disliked[used] == bool(facet)]
            sums[row, facet] = (weights[mine, None] * vectors[place[mine]]).sum(axis=0)
    return sums


def drifts(unread: np.ndarray, read: np.ndarray) -> np.ndarray:
    """For each pair of interests, 1 - cosine of the side that differs more: float64 [n] in [0, 2].

    unread, read: float [n, 2, d]. A side with zero length in either is ignored; 1.0 if both are.
    """
    unread, read = unread.astype(np.float64), read.astype(np.float64)
    lengths = np.linalg.norm(unread, axis=2) * np.linalg.norm(read, axis=2)
    comparable = lengths > 0
    cosine = (unread * read).sum(axis=2) / np.where(comparable, lengths, 1.0)
    facet_drift = np.where(comparable, 1.0 - np.clip(cosine, -1.0, 1.0), -1.0)
    return np.where(comparable.any(axis=1), facet_drift.max(axis=1), _UNKNOWN)


def priorities(drift: np.ndarray, n_unread: np.ndarray) -> np.ndarray:
    """Value of a call per user: drift times activity, log(1 + unread behaviors)."""
    return drift * np.log1p(n_unread)


# ------------------------------------------------------------------------------------------------------------ interests


_SCHEMAS = {"users": USERS, "interactions": INTERACTIONS, "histories": HISTORIES}


class RefreshResources:
    """Resources shared by all shards of a process, loaded on first use. Pickling drops loaded ones."""

    def __init__(self, workspace: Workspace, plan: RefreshPlan) -> None:
        self.workspace, self.plan = workspace, plan

    def __reduce__(self) -> tuple[type["RefreshResources"], tuple[Workspace, RefreshPlan]]:
        return RefreshResources, (self.workspace, self.plan)

    @cached_property
    def catalog(self) -> ItemCatalog:
        """Titles of all items, including those of the plan."""
        return with_new_items(self.workspace, self.plan)

    @cached_property
    def release(self) -> Release:
        """The plan's base release, opened."""
        return open_release(self.workspace, self.plan.parent, verify=False)

    def item_vectors(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See drift.Gather."""
        return self.release.store.vectors("item", ids)

    def close(self) -> None:
        """Closes the release."""
        if "release" in self.__dict__:
            self.release.close()
            del self.__dict__["release"]


class InterestsStage(Stage):
    """Shards of users: their next states, candidates, and refused events."""

    name = "interests"

    def __init__(
        self,
        plan: RefreshPlan,
        base: State,
        buckets: Buckets,
        config: RefreshConfig,
        prompts: RefreshPrompts,
        resources: RefreshResources,
    ) -> None:
        self.folder = plan.part("interests")
        self.plan, self.base, self.buckets, self.config = plan, base, buckets, config
        self.prompts, self.resources = prompts, resources

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, plan, number = work.workspace, self.plan, work.shard.number
        users = {u.user_id: u for u in self.base.read_users(workspace, number, plan.encoder)}
        tables = PreparedShard(workspace, number)
        events, deferred, letters, counts = self._admitted(tables, users)
        files = {}
        work.check()

        def write(name: str, table: pa.Table) -> None:
            path = f"{name}/{work.shard.file()}"
            files[path] = workspace.write_parquet(work.artifact.path(path), table)

        if len(events):
            liked_above = self.prompts.scenario.positive_above
            users = advance(tables, users, events, plan.horizon, self.resources.item_vectors, liked_above)
            write("users", to_table(list(users.values())))
            with_news = [users[id_] for id_ in np.unique(events.user).tolist()]
            if (renewed := renewed_behaviors(with_news, self.resources.release)).num_rows:
                write("behaviors", renewed)
        moved, catalog = list(users.values()), self.resources.catalog
        due, next_due = assess(moved, plan.clock, self.config, self.prompts, catalog, self.resources.item_vectors)
        for name, table in (("deferred", deferred), ("dead", letters), ("due", due)):
            if table.num_rows:
                write(name, table)
        future = deferred.filter(pc.equal(deferred["error"], "FromTheFuture"))["timestamp"].to_pylist()
        counts |= {
            "users": len(users),
            "due": due.num_rows,
            "bins": json.dumps(Counter(rank_digits(due)[:, 0].tolist())),
            **({} if next_due is None else {"due_at": next_due}),
            **({"retry_at": min(future)} if future else {}),
        }
        return Result(files, rows_in=len(users), rows_out=len(users), counts=counts)

    def close(self) -> None:
        """See Stage.close."""
        self.resources.close()

    def _admitted(
        self, tables: "PreparedShard", users: Mapping[int, UserState]
    ) -> tuple[Events, pa.Table, pa.Table, dict[str, float | int | str]]:
        """New events, events that may be accepted later, dead letters, and counts."""
        workspace, number = tables.workspace, tables.number
        before = self.base.read_deferred(workspace, number)
        new = self.buckets.read(workspace, number)
        earlier = Events.from_table(before)
        if self.base.watermark is not None:
            earlier = earlier.take(earlier.time >= self.base.watermark - self.plan.lateness_ms)
        events = canonical(Events.join([new, earlier]))
        twice = len(new) + len(earlier) - len(events)
        events, future = split_future(events, self.plan.now)
        strangers = np.setdiff1d(events.user, list(users))
        acting = set(events.user.tolist())
        known = Events.join([known_keys(u for i, u in users.items() if i in acting), tables.interactions(strangers)])
        ids = np.union1d(np.array(list(users), dtype=np.int64), tables.known_users(strangers))
        events, refused = admit(events, known, ids, self.resources.catalog.ids, self.config)
        deferred = pa.concat_tables([REFUSED.empty_table(), future, refused])
        letters = dead_letters(new_refusals(deferred, before))
        counts: dict[str, float | int | str] = {
            "events_read": len(new),
            "events_twice": twice,
            "events_new": len(events),
            "users_with_news": len(np.unique(events.user)),
            **count_errors(letters),
        }
        return events, deferred, letters, counts


@dataclass(frozen=True)
class PreparedShard:
    """The prepared tables' data about a shard's users that no refresh has seen."""

    workspace: Workspace
    number: int

    def known_users(self, ids: np.ndarray) -> np.ndarray:
        """Those of `ids` in the users table, ascending."""
        return np.unique(self._rows("users", ids, ["user_id"])["user_id"].to_numpy())

    def interactions(self, ids: np.ndarray) -> Events:
        """All interactions of the users `ids`, by user."""
        rows = self._rows("interactions", ids, INTERACTIONS.names)
        rows = rows.filter(pa.array(taken(rows["rating"].to_numpy(), rows["label"].to_numpy())))
        events = Events.from_table(rows.select(EVENTS.names))
        return events.take(np.argsort(events.user, kind="stable"))

    def histories(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """Histories of the users `ids` that the LLM has read (schema.HISTORIES), by user."""
        rows = self._rows("histories", ids, ["user_id", "as_of", "items", "ratings"])
        return {row["user_id"]: row for row in rows.to_pylist()}

    def _rows(self, table: str, ids: np.ndarray, columns: list[str]) -> pa.Table:
        if not len(ids):
            return _SCHEMAS[table].empty_table().select(columns)
        rows = self.workspace.read_shard(table, self.number, columns)
        return rows.filter(pc.is_in(rows["user_id"], value_set=pa.array(ids, pa.int64())))


def advance(
    tables: PreparedShard,
    users: Mapping[int, UserState],
    events: Events,
    horizon: int | None,
    gather: Gather,
    liked_above: float,
) -> dict[int, UserState]:
    """All users of a shard with new events, by id, ascending.

    users: those seen by an earlier refresh. events: new ones of this shard, in canonical order. horizon: see
    state.take_in. liked_above: see drift.sum_vectors.
    """
    ids, starts = np.unique(events.user, return_index=True)
    moved = dict(users) | _bootstrap(tables, np.setdiff1d(ids, list(users)), horizon, gather, liked_above)
    bounds = [*starts.tolist(), len(events)]
    for id_, start, end in zip(ids.tolist(), bounds[:-1], bounds[1:], strict=True):
        moved[id_] = take_in(moved[id_], behaviors(events.take(np.arange(start, end))), horizon)
    return dict(sorted(moved.items()))


def assess(
    users: Sequence[UserState],
    clock: int,
    config: RefreshConfig,
    prompts: RefreshPrompts,
    catalog: ItemCatalog,
    gather: Gather,
) -> tuple[pa.Table, int | None]:
    """Partitions that are due (DUE), and when the next short term becomes due by age alone (ms, None: never).

    A short term without any item title is not due, since there is nothing to quote.
    """
    unread = [u for u in users if u.short]
    if not unread:
        return DUE.empty_table(), None
    items, ratings, lengths = short_columns(unread)
    sums = sum_vectors(items, ratings, lengths, gather, prompts.scenario.positive_above)
    read = np.zeros_like(sums)
    for row, user in enumerate(unread):
        if user.interest.shape == sums.shape[1:]:
            read[row] = user.interest
    drift = drifts(sums, read)
    titles, starts = catalog.titles(items), np.cumsum(lengths) - lengths
    due, waits = [], []
    for row, user in enumerate(unread):
        ends = question_ends(user.short, titles[starts[row] : starts[row] + lengths[row]], prompts)
        if not ends:
            continue
        if reason := due_reason(user, float(drift[row]), clock, config):
            ranked = priorities(drift[row], lengths[row] - np.array([0, *ends[:-1]]))
            due += [(user.user_id, n, end, reason, drift[row], ranked[n]) for n, end in enumerate(ends)]
        else:
            waits.append(due_at(user, config))
    columns = [pa.array([row[i] for row in due], f.type) for i, f in enumerate(DUE)]
    return pa.table(columns, schema=DUE), min((moment for moment in waits if moment is not None), default=None)


def question_ends(short: Sequence[Behavior], titles: Sequence[str], prompts: RefreshPrompts) -> list[int]:
    """Ends of a short term's partitions, each as long as a prompt may quote; none without any item title.

    titles: aligned with `short`, "" for none. A behavior without one belongs to the preceding partition.
    """
    titled = [place for place, title in enumerate(titles) if title]
    ends = prompts.ends([(titles[place], short[place].rating) for place in titled])
    return [titled[end] if end < len(titled) else len(short) for end in ends]


def short_columns(users: Sequence[UserState]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, ratings (NaN: none) and lengths of the short terms, concatenated."""
    flat = [b for user in users for b in user.short]
    return (
        np.array([b.item for b in flat], dtype=np.int64),
        np.array([np.nan if b.rating is None else b.rating for b in flat], dtype=np.float32),
        np.array([len(user.short) for user in users], dtype=np.int64),
    )


def _bootstrap(
    tables: PreparedShard, ids: np.ndarray, horizon: int | None, gather: Gather, liked_above: float
) -> dict[int, UserState]:
    """Users that no refresh has seen, by id."""
    if not len(ids):
        return {}
    done, histories = tables.interactions(ids), tables.histories(ids)
    nothing: dict[str, Any] = {"as_of": None, "items": [], "ratings": []}
    rows = [histories.get(id_, nothing) for id_ in ids.tolist()]
    items = np.array([i for row in rows for i in row["items"]], dtype=np.int64)
    graded = [row["ratings"] or [None] * len(row["items"]) for row in rows]
    ratings = np.array([r for given in graded for r in given], dtype=np.float32)  # None becomes NaN
    sums = sum_vectors(items, ratings, np.array([len(row["items"]) for row in rows]), gather, liked_above)
    users = {}
    for number, (id_, row) in enumerate(zip(ids.tolist(), rows, strict=True)):
        start, end = np.searchsorted(done.user, [id_, id_ + 1])
        user = bootstrap(id_, row["as_of"], behaviors(done.take(np.arange(start, end))), horizon)
        users[id_] = replace(user, interest=sums[number])
    return users
