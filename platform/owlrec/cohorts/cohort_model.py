"""What is known of cohorts: the profile that the LLM reads of each, and their folder in the workspace."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from owlrec.cohorts.clustering import ClusterConfig, Codebook, FactorSettings, items_and_likes
from owlrec.config import Config
from owlrec.errors import WorkspaceError
from owlrec.ids import Kind, rows_of, run_starts, stable_id
from owlrec.scenario import Scenario
from owlrec.schema import MEMBERSHIPS, newest
from owlrec.sources.splits import Cut, Every
from owlrec.storage import Pointer
from owlrec.workspace import Workspace

# ------------------------------------------------------------------------------------------------------------- profiles
# Input of a cohort's prompt: its most representative members, their shared titles and common attributes.
#
# The members nearest to the center represent the cohort; in an attribute group, those with the longest history. Each
# shard returns the best few per cohort, and the cohort's own shard merges them. A profile is kept across runs while
# members and titles have hardly changed, so the exact prompt stays the same and needs no new
# call.


# ----------------------------------------------------------------------------------------------------------- attributes
# Attribute groups: cohorts of users or items with too little history, by their table fields.
#
# A group is a combination of values: of profile fields for a user, of text fields for an item. Numbers such as ages
# are banded by tens. If too few rows share all values, the last field is dropped, and so on; the rest belong to the
# group of all.


Group = tuple[tuple[str, str], ...]  # (field, value), in the order of the fields

_BAND = 10
_MOST_GROUPS = 1 << 18


def values_of(row: Mapping[str, Any], fields: Sequence[str]) -> Group:
    """A row's values of `fields`: skips empty ones, takes the first value of a list, and bands numbers."""
    values = []
    for name in fields:
        value = row.get(name)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and str(value) != "":
            values.append((name, banded(str(value))))
    return tuple(values)


def banded(value: str) -> str:
    """ "23" as "20-29"; anything but a small whole number stays itself."""
    if value.isascii() and value.isdigit() and len(value) <= 4:
        low = int(value) // _BAND * _BAND
        return f"{low}-{low + _BAND - 1}"
    return value


def count_groups(rows: Iterable[Group]) -> Counter[Group]:
    """Number of rows in each group and in each of its prefixes."""
    counts: Counter[Group] = Counter()
    for group in rows:
        counts.update(group[:n] for n in range(1, len(group) + 1))
    return counts


def large_groups(shards: Iterable[Mapping[Group, int]], smallest: int) -> set[Group]:
    """Groups with at least `smallest` rows over all shards.

    Rare values may make millions of groups. Beyond 2^18 groups, the rarest so far are dropped, so only a group among
    those can be missed.
    """
    total: Counter[Group] = Counter()
    for counts in shards:
        total.update(counts)
        if len(total) > _MOST_GROUPS:
            total = Counter(dict(total.most_common(_MOST_GROUPS // 2)))
    return {group for group, n in total.items() if n >= smallest}


def choose_group(group: Group, large: Container[Group]) -> Group:
    """The longest prefix of `group` that is `large`, or () if none is."""
    return next((group[:n] for n in range(len(group), 0, -1) if group[:n] in large), ())


def group_name(group: Group) -> str:
    """Short form of the group for a cohort's name, "all" for ()."""
    return " ".join(f"{field}={value}" for field, value in group) or "all"


# ------------------------------------------------------------------------------------------------------------- profiles


PROFILES = pa.schema(
    [
        ("id", pa.int64()),  # stable_id(cohort): the id of its knowledge
        ("cohort", pa.string()),
        ("kind", pa.string()),  # of its members
        ("facet", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),  # members; an estimate if only a sample of the shards was read
        ("cut", pa.string()),  # cut of this text: see Moments
        ("as_of", pa.int64()),  # ms: latest behavior in the profile; 0 for items
        ("titles", pa.list_(pa.string())),  # liked, or disliked for that facet; for items, their own
        ("opposite", pa.list_(pa.string())),  # the other way round
        ("attributes", pa.list_(pa.string())),
        ("representatives", pa.list_(pa.int64())),
    ]
)
CANDIDATES = pa.schema(
    [
        ("cohort", pa.string()),
        ("cut", pa.string()),
        ("facet", pa.string()),
        ("source", pa.string()),
        ("rank", pa.float32()),  # ascending
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("chosen", pa.list_(pa.int64())),  # item ids of the facet
        ("opposite", pa.list_(pa.int64())),
        ("attributes", pa.list_(pa.string())),
    ]
)
MEMBERS = pa.schema(
    [
        ("cohort", pa.string()),
        ("members", pa.int64()),
        ("stayed", pa.int64()),  # members who were in this cohort before
    ]
)


NOW = "now"  # the cut after everything that is known
Moments = Mapping[str, int]  # cut -> ms: a text as of a cut quotes behaviors up to then
LATEST: Moments = {NOW: np.iinfo(np.int64).max}


def cut_moments(histories: pa.Table, cuts: Sequence[Cut]) -> dict[str, int]:
    """Moments of a recipe's cuts, for texts that many users share.

    A sample may read only earlier texts, so a text that quotes members up to yesterday is useless for
    the past. Here `half` is the moment by which half of the users have their own text. `now` is always included,
    for publication. histories: schema.HISTORIES of a sample of users.
    """
    as_of, moments = histories["as_of"].to_numpy(), {}
    first = as_of[np.unique(run_starts(histories["user_id"].to_numpy()))]
    for cut in cuts:
        if cut in ("half", "kar"):
            moments["half"] = int(np.quantile(first, 0.5, method="lower"))
        elif isinstance(cut, Every):
            for number in range(int(as_of.min()) // cut.period_ms + 1, -(-int(as_of.max()) // cut.period_ms)):
                moments[f"{cut.every} {number}"] = number * cut.period_ms
    return {**moments, **LATEST}


@dataclass(frozen=True)
class ProfileSettings:
    """How much of a cohort its prompt quotes, and how far it may change before it gets a new text. No recipe sets
    these.
    """

    representatives: int = 10
    titles: int = 15  # REKI quotes as many
    opposite: int = 5
    common_share: float = 0.5  # share of representatives that makes an attribute common
    # Share of changed members or titles below which a cohort's text still fits.
    settled_share: float = 0.3


def user_candidates(
    members: pa.Table, users: pa.Table, histories: pa.Table, scenario: Scenario, n: int, moments: Moments = LATEST
) -> pa.Table:
    """The best `n` representatives of each cohort and cut (CANDIDATES) within one shard of users.

    members: schema.COHORTS of the shard; users and histories: the shard's tables.
    """

    def up_to(table: pa.Table, key: str, moment: int) -> pa.Table:
        return newest(table.filter(pc.less_equal(table["as_of"], moment)), key)

    return pa.concat_tables(
        _users_at(up_to(members, "id", moment), users, up_to(histories, "user_id", moment), scenario, n, cut)
        for cut, moment in moments.items()
    )


def _users_at(
    members: pa.Table, users: pa.Table, histories: pa.Table, scenario: Scenario, n: int, cut: str
) -> pa.Table:
    ids = members["id"].to_numpy()
    items, mask = items_and_likes(histories, scenario.positive_above)
    starts = items.offsets.to_numpy() - items.offsets[0].as_py()
    liked = np.diff(np.r_[0, np.cumsum(mask)][starts])
    place = rows_of(histories["user_id"].to_numpy(), ids)
    length = np.where(place >= 0, liked[place], 0) if len(liked) else np.zeros(len(ids))
    best, rank = _best(members, length, n)
    as_of, flat = histories["as_of"].to_numpy(), items.flatten().to_numpy()
    rows = []
    for user, at in zip(_rows(users, "user_id", ids[best]), place[best].tolist(), strict=True):
        own = slice(starts[at], starts[at + 1]) if at >= 0 else slice(0)
        attributes = [f"{field} {value}" for field, value in values_of(user, scenario.profile_fields)]
        rows.append((int(as_of[at]) if at >= 0 else 0, flat[own][mask[own]], flat[own][~mask[own]], attributes))
    return _candidates(members, best, rank, rows, cut)


def item_candidates(members: pa.Table, items: pa.Table, scenario: Scenario, n: int) -> pa.Table:
    """Like user_candidates, for a shard of items, whose only cut is `now`."""
    ids = members["id"].to_numpy()
    best, rank = _best(members, np.ones(len(ids)), n)
    rows = [
        (0, ids[[at]], ids[:0], _attributes(item, scenario.text_fields))
        for item, at in zip(_rows(items, "item_id", ids[best]), best.tolist(), strict=True)
    ]
    return _candidates(members, best, rank, rows, NOW)


def best_candidates(tables: Sequence[pa.Table], n: int) -> pa.Table:
    """The best `n` candidates of each cohort and cut from several shards."""
    table = pa.concat_tables([CANDIDATES.empty_table(), *tables])
    rank, ids = table["rank"].to_numpy(), table["id"].to_numpy()
    texts = pa.chunked_array([pc.binary_join_element_wise(table["cohort"], table["cut"], "\n").combine_chunks()])
    return table.take(pa.array(_first(_codes(texts), rank, ids, n)))


def count_members(members: pa.Table, earlier: pa.Table | None) -> pa.Table:
    """Members per cohort (MEMBERS) within one shard. earlier: the shard's COHORTS of an earlier run."""
    stayed = pa.array(np.zeros(len(members), np.int64))
    if earlier is not None:
        keys = [
            pc.binary_join_element_wise(pc.cast(t["id"], pa.string()), t["cohort"], " ") for t in (members, earlier)
        ]
        stayed = pc.cast(pc.is_in(keys[0], pc.unique(keys[1])), pa.int64())
    ones = pa.array(np.ones(len(members), np.int64))
    return add_members([pa.table([members["cohort"], ones, stayed], schema=MEMBERS)])


def add_members(tables: Sequence[pa.Table]) -> pa.Table:
    """MEMBERS of several shards, summed."""
    table = pa.concat_tables([MEMBERS.empty_table(), *tables])
    total = table.group_by("cohort").aggregate([("members", "sum"), ("stayed", "sum")])
    return total.rename_columns(MEMBERS.names)


def build_profiles(
    best: pa.Table,
    sizes: Mapping[str, int],
    kind: Kind,
    titles: Callable[[np.ndarray], list[str]],
    settings: ProfileSettings,
) -> pa.Table:
    """Profiles (PROFILES) of the cohorts in best_candidates, by id and as_of. titles: by item id."""
    texts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in best.to_pylist():
        texts.setdefault((row["cohort"], row["cut"]), []).append(row)
    rows = [
        {
            "id": stable_id(name),
            "cohort": name,
            "kind": kind,
            "facet": members[0]["facet"],
            "source": members[0]["source"],
            "size": sizes.get(name, 0),
            "cut": cut,
            "as_of": max(m["as_of"] for m in members),
            "titles": _shared_titles((m["chosen"] for m in members), titles, settings.titles),
            "opposite": _shared_titles((m["opposite"] for m in members), titles, settings.opposite),
            "attributes": _common([m["attributes"] for m in members], settings.common_share),
            "representatives": sorted(m["id"] for m in members),
        }
        for (name, cut), members in texts.items()
    ]
    return pa.Table.from_pylist(sorted(rows, key=itemgetter("id", "as_of")), schema=PROFILES)


def distinct_texts(profiles: pa.Table, moments: Moments) -> pa.Table:
    """Profiles by id and as_of; among duplicates keeps the one of the later cut."""
    rows = sorted(profiles.to_pylist(), key=lambda row: moments.get(row["cut"], 0))
    distinct = {(row["id"], row["as_of"]): row for row in rows}
    return pa.Table.from_pylist([distinct[key] for key in sorted(distinct)], schema=PROFILES)


def keep_settled(
    new: pa.Table, previous: pa.Table, stayed: Mapping[str, int], settings: ProfileSettings
) -> tuple[pa.Table, int]:
    """`new` profiles, with the earlier ones of stable cohorts and cuts, and the number of those.

    stayed: how many of a cohort's members were in it before. A cohort is stable if at most `settled_share` of its
    members, then and now together, came or left, and the same holds for its titles.
    """
    before = {(row["cohort"], row["cut"]): row for row in previous.to_pylist()}
    rows, kept = [], 0
    for row in new.to_pylist():
        old = before.get((row["cohort"], row["cut"]))
        if old is not None:
            both = stayed.get(row["cohort"], 0)
            moved = max(
                _distance(both, old["size"] + row["size"] - both),
                _distance(len(set(row["titles"]) & set(old["titles"])), len(set(row["titles"]) | set(old["titles"]))),
            )
            if moved <= settings.settled_share:
                row, kept = {**old, "size": row["size"]}, kept + 1
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PROFILES), kept


def _distance(common: int, together: int) -> float:
    return 1 - common / together if together else 0.0


def _best(members: pa.Table, length: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the `n` best members of each cohort, with ranks: nearest to the center, or else with the longest
    history."""
    distance = members["distance"].to_numpy()  # NaN where null
    rank = np.where(np.isnan(distance), -length, distance)
    best = _first(_codes(members["cohort"]), rank, members["id"].to_numpy(), n)
    return best, rank[best]


def _first(keys: np.ndarray, rank: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """Rows of the `n` lowest ranks of each key, int64, key by key."""
    order = np.lexsort((ids, rank, keys))
    return order[np.arange(len(order)) - run_starts(keys[order]) < n]


def _codes(names: pa.ChunkedArray) -> np.ndarray:
    codes: np.ndarray = names.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return codes


def _candidates(
    members: pa.Table,
    best: np.ndarray,
    rank: np.ndarray,
    rows: Sequence[tuple[int, np.ndarray, np.ndarray, list[str]]],
    cut: str,
) -> pa.Table:
    """rows: as_of, liked and disliked items and attributes of each of the best."""
    chosen = members.take(pa.array(best))
    facets = chosen["facet"].to_pylist()
    swapped = [(b, a) if facet == "disliked" else (a, b) for facet, (_, a, b, _) in zip(facets, rows, strict=True)]
    columns = [
        chosen["cohort"],
        pa.repeat(pa.scalar(cut), len(chosen)),
        chosen["facet"],
        chosen["source"],
        pa.array(rank, pa.float32()),
        chosen["id"],
        pa.array([row[0] for row in rows], pa.int64()),
        *(pa.array([pair[i] for pair in swapped], pa.list_(pa.int64())) for i in (0, 1)),
        pa.array([row[3] for row in rows], pa.list_(pa.string())),
    ]
    return pa.table(columns, schema=CANDIDATES)


def _rows(table: pa.Table, key: str, ids: np.ndarray) -> list[dict[str, Any]]:
    """Row of each id, all null if missing; ids ascend in the table."""
    places = rows_of(table[key].to_numpy(), ids)
    return table.take(pa.array(places, mask=places < 0)).to_pylist()


def _shared_titles(items: Iterable[Sequence[int]], titles: Callable[[np.ndarray], list[str]], n: int) -> list[str]:
    """Titles that most representatives share; ties keep the order of first occurrence."""
    counts = Counter(item for chosen in items for item in dict.fromkeys(chosen))
    ids = np.array([item for item, _ in counts.most_common()], dtype=np.int64)
    return list(dict.fromkeys(title for title in titles(ids) if title))[:n]


def _common(attributes: Sequence[Sequence[str]], share: float) -> list[str]:
    counts = Counter(a for entity in attributes for a in set(entity))
    return sorted(a for a, n in counts.items() if n >= share * len(attributes))


def _attributes(row: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    values = ((field, row.get(field)) for field in fields)
    return [
        f"{field} {one}"
        for field, value in values
        for one in (value if isinstance(value, list) else [value])
        if one not in (None, "")
    ]


# ---------------------------------------------------------------------------------------------------------------- model
# The cohorts of a run on disk: item factors, codebooks, attribute groups, memberships and prompts.
#
# The folder in the workspace is cohorts/<fingerprint>/. The small part that assigns any user or item, even a new one,
# to cohorts is factors/, model.safetensors and model.json. <kind>/ has the memberships by shard; prompts/ and profiles/
# go by the cohort's own shard. cohorts/CURRENT points to the newest complete run.


# ---------------------------------------------------------------------------------------------------------- memberships
# Cohorts whose texts stand in for a user or item, in the form that releases and training need.
#
# A user's cohort by likes comes first, the one by dislikes second.


def memberships(cohorts: pa.Table, *, marked: bool = False) -> pa.Table:
    """The memberships in a table of cohorts (schema.COHORTS), in ascending order of kind, id and as_of.

    Columns of schema.MEMBERSHIPS, then as_of: the start of validity. marked: whether a cohort by dislikes
    is stored as its complement, as in a release (`by_facet`).
    """
    names = cohorts["cohort"].combine_chunks().dictionary_encode()
    number = np.array([stable_id(name) for name in names.dictionary.to_pylist()], dtype=np.int64)
    later = np.array([facet == "disliked" for facet in cohorts["facet"].to_pylist()], dtype=bool)
    ids, as_of = cohorts["id"].to_numpy(), cohorts["as_of"].to_numpy()
    kinds = np.array(cohorts["kind"].to_pylist(), dtype=str)
    order = np.lexsort((later, as_of, ids, kinds))
    marked_names = number[names.indices.to_numpy()][order] if len(order) else np.zeros(0, dtype=np.int64)
    if marked:
        marked_names = np.where(later[order], ~marked_names, marked_names)
    ids, as_of, kinds = ids[order], as_of[order], kinds[order]
    start = np.unique(run_starts(as_of, ids, kinds))
    lists = pa.ListArray.from_arrays(pa.array(np.r_[start, len(ids)], pa.int32()), pa.array(marked_names, pa.int64()))
    table = pa.table([pa.array(kinds[start], pa.string()), pa.array(ids[start]), lists], schema=MEMBERSHIPS)
    return table.append_column("as_of", pa.array(as_of[start]))


# ---------------------------------------------------------------------------------------------------------------- model


Book = Literal["user-liked", "user-disliked", "item"]
FACETS: dict[Book, tuple[Kind, str, str]] = {  # kind, vector column, facet
    "user-liked": ("user", "liked", "liked"),
    "user-disliked": ("user", "disliked", "disliked"),
    "item": ("item", "vector", ""),
}
POINTER = "cohorts/CURRENT"
FACTORS = "factors/00000000.arrow"


MeanSize = Annotated[int, Field(ge=2)]


class CohortsConfig(Config):
    """The recipe's `cohorts:` section."""

    # Of all cohorts, or {users: 40, items: 25}. None, also of a kind that is left out: by the population, see
    # ClusterConfig.
    mean_size: MeanSize | dict[Literal["users", "items"], MeanSize] | None = None

    def clusters(self, kind: Kind) -> ClusterConfig:
        """Settings of a kind's codebooks."""
        size = self.mean_size
        return ClusterConfig(
            mean_size=size.get("items" if kind == "item" else "users") if isinstance(size, dict) else size
        )


@dataclass(frozen=True)
class CohortSettings:
    """Settings outside the recipe. They shape cohorts and prompts, so they are part of the cohorts' fingerprint."""

    factors: FactorSettings = field(default_factory=FactorSettings)
    profiles: ProfileSettings = field(default_factory=ProfileSettings)
    seed: int = 0  # of k-means


@dataclass(frozen=True)
class CohortModel:
    """A codebook may be missing, for example if nobody disliked anything."""

    books: Mapping[Book, Codebook]
    groups: Mapping[Kind, Collection[Group]]  # by kind: the large enough attribute groups

    def names(self) -> list[str]:
        """All cohorts with possible members."""
        collaborative = [cohort_name(name, n) for name, book in self.books.items() for n in book.numbers.tolist()]
        attribute = [attribute_cohort_name(kind, g) for kind, groups in self.groups.items() for g in [*groups, ()]]
        return collaborative + attribute

    def save(self, workspace: Workspace, folder: str) -> None:
        """Writes the model into `folder`, the JSON last."""
        from safetensors.numpy import save  # here, since a lookup does not need it

        arrays: dict[str, np.ndarray] = {}
        for name, book in self.books.items():
            arrays |= {f"{name}.centroids": book.centroids, f"{name}.numbers": book.numbers}
            if book.cells is not None:
                arrays[f"{name}.cells"] = book.cells
        workspace.write_bytes(
            f"{folder}/model.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        )
        about = {
            "books": {name: book.next_number for name, book in self.books.items()},
            "groups": {kind: sorted(list(map(list, g)) for g in groups) for kind, groups in self.groups.items()},
        }
        workspace.write_json(f"{folder}/model.json", about)

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> "CohortModel":
        """Loads what `save` wrote. Raises WorkspaceError if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        about = workspace.read_json(f"{folder}/model.json")
        try:
            arrays = load(workspace.read_bytes(f"{folder}/model.safetensors"))
            return cls(
                {
                    n: Codebook(arrays[f"{n}.centroids"], arrays[f"{n}.numbers"], k, arrays.get(f"{n}.cells"))
                    for n, k in about["books"].items()
                },
                {kind: {tuple(map(tuple, g)) for g in groups} for kind, groups in about["groups"].items()},
            )
        except (SafetensorError, KeyError) as error:
            raise WorkspaceError(
                f"{workspace.path(folder)}: the cohort model is damaged ({error!r}). Delete the folder and run "
                "`cohorts` again."
            ) from None


def previous_folder(workspace: Workspace, folder: str) -> str | None:
    """The folder on which a run in `folder` builds; a repeated run builds on the same one."""
    history = Pointer(workspace, POINTER).history
    before = history[: history.index(folder)] if folder in history else history
    return next((f for f in reversed(before) if workspace.exists(f, "model.json")), None)


def read_profiles(workspace: Workspace, folder: str, shards: Collection[int] | None = None) -> pa.Table:
    """Profiles (PROFILES) of the cohorts in some shards; by default in all."""
    numbers = range(workspace.n_shards("cohort")) if shards is None else sorted(shards)
    return pa.concat_tables([workspace.read_parquet(f"{folder}/profiles/{n:08d}.parquet") for n in numbers])


def cohort_name(book: Book, number: int) -> str:
    """Name of a collaborative cohort."""
    return f"{book}-{number:06d}"


def attribute_cohort_name(kind: str, group: Group) -> str:
    """Name of an attribute group; () is everybody of the kind."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9=+]+', '-', group_name(group)).strip('-')}"
