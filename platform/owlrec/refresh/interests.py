"""A shard of users moved on: their new events go into short terms, and the partitions of those due are candidates.

A worker holds the users of one shard, the items' titles and the parent release. Candidates are written with their
priorities, and the card counts those by bin, so that the budget is divided without bringing users together.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.refresh.behaviors import renewed_behaviors
from owlrec.refresh.budget import DUE, rank_digits
from owlrec.refresh.config import RefreshConfig
from owlrec.refresh.drift import Gather, drifts, priorities, sum_vectors
from owlrec.refresh.events import (
    EVENTS,
    REFUSED,
    Buckets,
    Events,
    admit,
    canonical,
    count_errors,
    dead_letters,
    new_refusals,
    part_future,
)
from owlrec.refresh.items import with_new_items
from owlrec.refresh.partitions import (
    Behavior,
    UserState,
    behaviors,
    bootstrap,
    due_at,
    known_keys,
    take_in,
    to_table,
    why_due,
)
from owlrec.refresh.prompt import RefreshPrompts
from owlrec.refresh.state import RefreshPlan, State
from owlrec.releases.release import Release, open_release
from owlrec.runner import Result, Stage, Work
from owlrec.schema import HISTORIES, INTERACTIONS, USERS
from owlrec.sources.catalog import ItemCatalog
from owlrec.sources.outcomes import taken
from owlrec.workspace import Workspace

_SCHEMAS = {"users": USERS, "interactions": INTERACTIONS, "histories": HISTORIES}


class Resources:
    """What all shards of a process share, loaded when it is first needed. Pickling leaves what was loaded behind."""

    def __init__(self, workspace: Workspace, plan: RefreshPlan) -> None:
        self.workspace, self.plan = workspace, plan

    def __reduce__(self) -> tuple[type["Resources"], tuple[Workspace, RefreshPlan]]:
        return Resources, (self.workspace, self.plan)

    @cached_property
    def catalog(self) -> ItemCatalog:
        """The titles of all items, those that the plan brings included."""
        return with_new_items(self.workspace, self.plan)

    @cached_property
    def release(self) -> Release:
        """The release that the plan builds on, open."""
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
    """Shards of users: their next states, candidates, and what of their events is refused."""

    name = "interests"

    def __init__(
        self,
        plan: RefreshPlan,
        base: State,
        buckets: Buckets,
        config: RefreshConfig,
        prompts: RefreshPrompts,
        resources: Resources,
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
        """The events that are new, those that may be taken in later, dead letters, and counts."""
        workspace, number = tables.workspace, tables.number
        before = self.base.read_deferred(workspace, number)
        new = self.buckets.read(workspace, number)
        earlier = Events.from_table(before)
        if self.base.watermark is not None:
            earlier = earlier.take(earlier.time >= self.base.watermark - self.plan.lateness_ms)
        events = canonical(Events.join([new, earlier]))
        twice = len(new) + len(earlier) - len(events)
        events, future = part_future(events, self.plan.now, self.config)
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
    """What the prepared tables know of users of a shard whom no refresh has met."""

    workspace: Workspace
    number: int

    def known_users(self, ids: np.ndarray) -> np.ndarray:
        """Those of `ids` that the users table holds, ascending."""
        return np.unique(self._rows("users", ids, ["user_id"])["user_id"].to_numpy())

    def interactions(self, ids: np.ndarray) -> Events:
        """All that the users `ids` took, by user."""
        rows = self._rows("interactions", ids, INTERACTIONS.names)
        rows = rows.filter(pa.array(taken(rows["rating"].to_numpy(), rows["label"].to_numpy())))
        events = Events.from_table(rows.select(EVENTS.names))
        return events.take(np.argsort(events.user, kind="stable"))

    def histories(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """What the LLM has read of the users `ids` (schema.HISTORIES), by user."""
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
    """All users of a shard with their new events, by id, ascending.

    users: those whom an earlier refresh has met. events: new ones of this shard, in canonical order. horizon: see
    partitions.take_in. liked_above: see drift.sum_vectors.
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
    """The partitions that are due (DUE), and when the next short term will be by its age alone (ms, None: never).

    A short term of which no item has a title is not due: there would be nothing to quote.
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
        ends = parted(user.short, titles[starts[row] : starts[row] + lengths[row]], prompts)
        if not ends:
            continue
        if reason := why_due(user, float(drift[row]), clock, config):
            worth = priorities(drift[row], lengths[row] - np.array([0, *ends[:-1]]))
            due += [(user.user_id, n, end, reason, drift[row], worth[n]) for n, end in enumerate(ends)]
        else:
            waits.append(due_at(user, config))
    columns = [pa.array([row[i] for row in due], f.type) for i, f in enumerate(DUE)]
    return pa.table(columns, schema=DUE), min((moment for moment in waits if moment is not None), default=None)


def parted(short: Sequence[Behavior], titles: Sequence[str], prompts: RefreshPrompts) -> list[int]:
    """Where the partitions of a short term end, each as long as a prompt may quote; none where no item has a title.

    titles: aligned with `short`, "" for none. A behavior without one belongs to the partition before it.
    """
    titled = [place for place, title in enumerate(titles) if title]
    ends = prompts.ends([(titles[place], short[place].rating) for place in titled])
    return [titled[end] if end < len(titled) else len(short) for end in ends]


def short_columns(users: Sequence[UserState]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, ratings (NaN: none) and lengths of the short terms, one after another."""
    flat = [b for user in users for b in user.short]
    return (
        np.array([b.item for b in flat], dtype=np.int64),
        np.array([np.nan if b.rating is None else b.rating for b in flat], dtype=np.float32),
        np.array([len(user.short) for user in users], dtype=np.int64),
    )


def _bootstrap(
    tables: PreparedShard, ids: np.ndarray, horizon: int | None, gather: Gather, liked_above: float
) -> dict[int, UserState]:
    """Users whom no refresh has met, by id."""
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
