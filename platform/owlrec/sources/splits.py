"""What later stages read of the tables: items' titles, a user's behaviors up to a moment, samples to train and test on.

A text is about a user as of a moment, its cut: it quotes the newest behaviors that the user took up to then, and no
sample from before the cut is trained on with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PositiveInt, field_validator

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ids import hash_of, last_rows, rows_of, run_starts
from owlrec.schema import BEHAVIORS, HISTORIES, INTERACTIONS, SAMPLE_ROWS, SAMPLES, conform
from owlrec.sources.outcomes import EVENT_CODE, POSITIVE, SPLITS, Labels, drawn_negatives, taken, with_outcomes
from owlrec.workspace import Workspace, read_tombstones

# -------------------------------------------------------------------------------------------------------------- catalog
# Titles by item id: an Arrow column behind a sorted id array.
#
# 10^7 titles take about 0.5 GB per process this way, and several times that in a Python dict.


class ItemCatalog:
    """Titles by item id."""

    def __init__(self, items: pa.Table) -> None:
        """items: a table with `item_id` and `title`, in any order; among several rows of an item, the last one wins."""
        ids = items["item_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        order = order[last_rows(ids[order])]
        self._ids = ids[order]
        self._titles = items["title"].combine_chunks().take(pa.array(order))

    @classmethod
    def load(cls, workspace: Workspace, more: Sequence[pa.Table] = ()) -> "ItemCatalog":
        """Reads the workspace's items table, without titles other than text. more: rows that override it."""
        parts = []
        for number in workspace.table_shards("items"):
            table = workspace.read_shard("items", number, ["item_id", "title"])
            if table.schema.field("title").type != pa.string():
                table = table.set_column(1, "title", pa.nulls(table.num_rows, pa.string()))
            parts.append(table)
        return cls(pa.concat_tables([*parts, *more]))

    @property
    def ids(self) -> np.ndarray:
        """All ids: int64 [n], ascending."""
        return self._ids

    def titles(self, ids: np.ndarray) -> list[str]:
        """Title of each id, in order; "" for an unknown id, a null title or invalid text.

        ids: int64 [n].
        """
        rows = rows_of(self._ids, ids)
        column = self._titles.take(pa.array(rows, mask=rows < 0))
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = [_text_or_none(value) for value in column]
        return [text or "" for text in texts]

    def draw(self, n: int, seed: int) -> list[int]:
        """At most `n` random items, always the same ones for a seed, in the order drawn."""
        chosen = np.random.default_rng(seed).permutation(len(self._ids))[:n]
        drawn: list[int] = self._ids[chosen].tolist()
        return drawn

    def find(self, words: str, limit: int) -> list[tuple[int, str]]:
        """Items whose title contains `words`, in any case: at most `limit` (id, title), by id."""
        rows = np.flatnonzero(pc.match_substring(self._titles, words, ignore_case=True).fill_null(False))[:limit]
        return list(zip(self._ids[rows].tolist(), self._titles.take(pa.array(rows)).to_pylist(), strict=True))


def _text_or_none(value: pa.Scalar) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


# --------------------------------------------------------------------------------------------------------------- splits
# Selects the behaviors that the LLM reads up to each cut, and the samples for training and testing.
#
# A text describes a user as of a moment, its cut: it quotes the newest behaviors that the user took up to then. `half`
# is KAR's (RecSys 2024): the first min((N+1)//2, 30); `now` ends with the newest; `every` cuts at each multiple of a
# period in which the user was active. One rule prevents leaks: a sample reads the newest text whose as_of is strictly
# earlier than the sample, else a learned default. So any behavior may be a sample, including passed-over items, which
# are never read as taken. Under KAR's protocol (`kar`) there is the half's text, and only later behaviors are samples.
#
# Everything except the two thresholds of the splits depends on one user, so a shard of users is built independently.


# Lists are gathered this many at a time: this bounds the index arrays, and Arrow's 32-bit list offsets cannot overflow.
_LISTS_PER_CHUNK = 1 << 20
SPLIT_SEED = 0  # of methods user and item. What varies between trials is ctr.seeds: compared runs share their splits
PASSED_QUOTED = 10  # maximum passed-over items that an LLM reads
_TAKEN_ALONE = {b"histories_of": b"taken"}  # metadata in the schema of stored interactions
_HISTORY_COLUMNS = {
    "history": "item_id",
    "history_ratings": "rating",
    "history_labels": "label",
    "history_events": EVENT_CODE,
}
_EDGES = 4096  # edges per round of the threshold search
_HOURS = {"h": 1, "d": 24, "w": 168}


class Every(Config):
    """Cuts at each multiple of a period since 1970, UTC."""

    every: str = Field(pattern=r"^[1-9][0-9]*[hdw]$")  # hours, days or weeks: 30d

    @property
    def period_ms(self) -> int:
        """The period in milliseconds."""
        return int(self.every[:-1]) * _HOURS[self.every[-1]] * 3_600_000


Cut = Literal["kar", "half", "now"] | Every


class SplitConfig(Config):
    """How behaviors become texts and samples: `user` keeps a user in one split, `item` an item (those of valid and test
    are cold), `time` trains on the past only, `column` reads each split from a column `split` of the
    interactions (train, valid or test).
    """

    # Moments at which the LLM writes about users. A sample reads the newest text that is earlier than itself; the
    # newest of all is published. kar: as half, and only what is later is a sample, as in the paper.
    cuts: tuple[Cut, ...] = Field(default=("half", "now"), min_length=1)
    method: Literal["user", "item", "time", "column"] = "user"
    ratios: tuple[PositiveInt, PositiveInt, PositiveInt] = (8, 1, 1)
    history_length: int = Field(default=10, ge=1)  # behaviors that a CTR model sees before each sample
    passed_over: bool = True  # whether these include passed-over items; false if users take few shown items
    llm_history: int = Field(default=30, ge=1)  # maximum behaviors that the LLM reads: 30 as in the papers

    @field_validator("cuts", mode="before")
    @classmethod
    def _one_cut(cls, cuts: Any) -> Any:
        return (cuts,) if isinstance(cuts, (str, dict, Every)) else cuts

    @field_validator("cuts")
    @classmethod
    def _distinct(cls, cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
        if len(set(cuts)) < len(cuts):
            raise ValueError("a cut is listed twice. List each once.")
        if {"kar", "half"} <= set(cuts):
            raise ValueError("kar cuts at the half already. Name one of the two.")
        return cuts


@dataclass(frozen=True)
class Behaviors:
    """Interactions of whole users by user, then by timestamp and item: seven aligned arrays [n]."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    time: np.ndarray  # int64, ms
    rating: np.ndarray  # float32, NaN if not graded
    label: np.ndarray  # float32
    split: np.ndarray  # int8: predefined split, -1 if there is none
    weight: np.ndarray  # float32: of its samples in training

    @classmethod
    def ordered(cls, interactions: pa.Table) -> "Behaviors":
        """From a table of schema.INTERACTIONS, in any order."""
        interactions = conform(interactions, INTERACTIONS, name="interactions")
        behaviors = cls.of(interactions)
        order = np.lexsort((behaviors.item, behaviors.time, behaviors.user))
        return cls(*(getattr(behaviors, field.name)[order] for field in fields(cls)))

    @classmethod
    def of(cls, interactions: pa.Table) -> "Behaviors":
        """From an ordered table of schema.INTERACTIONS."""
        names = ("user_id", "item_id", "timestamp", "rating", "label", "weight")
        user, item, time, rating, label, weight = (interactions[name].to_numpy() for name in names)
        split = interactions["split"].fill_null(-1).to_numpy()
        return cls(user, item, time, rating, label, split, weight)

    @property
    def taken(self) -> np.ndarray:
        """bool [n]; the others were passed over."""
        return taken(self.rating, self.label)


@dataclass(frozen=True)
class Texts:
    """Behaviors that the LLM reads: one row per text, by user, then by as_of. No two of a user have the same as_of."""

    user: np.ndarray  # int64 [n]: index of the user among those of the behaviors
    as_of: np.ndarray  # int64 [n], ms: the text's cutoff
    start: np.ndarray  # int64 [n]: start of its quotes, as a range of the taken rows
    end: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, behaviors: Behaviors, config: SplitConfig) -> "Texts":
        """Texts of each cut, for users who took something."""
        time, place = behaviors.time, _places(behaviors.user)
        took = np.flatnonzero(behaviors.taken)
        time, place = time[took], place[took]
        first = np.flatnonzero(np.diff(place, prepend=-1))  # first taken row of each user
        last = np.append(first[1:], len(took))[: len(first)] - 1
        user, as_of, end = [], [], []
        for cut in config.cuts:
            match cut:
                case "half" | "kar":
                    at = first + np.minimum((last - first + 2) // 2, config.llm_history) - 1
                    moment = time[at]
                case "now":
                    at, moment = last, time[last]
                case Every():
                    at, moment = _at_multiples(behaviors, time, place, last, cut.period_ms)
            user.append(place[at])
            as_of.append(moment)
            end.append(at + 1)
        users, moments, ends = (np.concatenate(arrays) for arrays in (user, as_of, end))
        order = np.lexsort((ends, moments, users))
        users, moments, ends = users[order], moments[order], ends[order]
        # Of two texts with one moment, the longer one stays.
        kept = np.append((users[1:] != users[:-1]) | (moments[1:] != moments[:-1]), True)[: len(users)]
        users, moments, ends = users[kept], moments[kept], ends[kept]
        start = np.maximum(first[np.searchsorted(place[first], users)], ends - config.llm_history)
        return cls(users, moments, start, ends)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def quoted(self) -> np.ndarray:
        """Behaviors quoted in any text, as indices of taken rows: int64, ascending."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        size = int(self.end.max()) + 1
        change = np.bincount(self.start, minlength=size) - np.bincount(self.end, minlength=size)
        return np.flatnonzero(np.cumsum(change))


def _at_multiples(
    behaviors: Behaviors, time: np.ndarray, place: np.ndarray, last: np.ndarray, period: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts of `every`: the last behavior taken before each, as indices of taken rows, and the cut's moment.

    A cut after the user's last behavior would equal `now`, so it is skipped.
    """
    cut = (time // period + 1) * period
    ends = np.append((cut[1:] != cut[:-1]) | (place[1:] != place[:-1]), True)[: len(cut)]
    at = np.flatnonzero(ends)
    until = np.maximum.reduceat(behaviors.time, np.flatnonzero(np.diff(_places(behaviors.user), prepend=-1)))
    at = at[until[place[at]] > cut[at]]
    return at, cut[at]


def _places(user: np.ndarray) -> np.ndarray:
    """Index of each row's user, from 0: int64 [n]. Users ascend."""
    return np.cumsum(np.diff(user, prepend=user[:1]) != 0)


@dataclass(frozen=True)
class Samples:
    """Rows of some behaviors that are samples, in order."""

    row: np.ndarray  # int64 [samples]
    label: np.ndarray  # float32 [samples]
    ties: int = 0  # behaviors excluded because they have the timestamp of the last one that the LLM reads

    @classmethod
    def of(cls, behaviors: Behaviors, config: SplitConfig) -> "Samples":
        """All of them or, under KAR's protocol, those after the half that the LLM reads."""
        if "kar" not in config.cuts:
            return cls(np.arange(len(behaviors.user)), behaviors.label)
        half, place = Texts.of(behaviors, config.model_copy(update={"cuts": ("half",)})), _places(behaviors.user)
        took = behaviors.taken
        read = np.zeros(len(took), dtype=bool)
        read[np.flatnonzero(took)[half.quoted]] = True
        last = np.full(int(place[-1]) + 1 if len(place) else 0, -1)
        last[half.user] = half.as_of
        later = behaviors.time > last[place]
        row = np.flatnonzero(~read & later)
        return cls(row, behaviors.label[row], int((took & ~read & ~later).sum()))


@dataclass(frozen=True)
class SplitValues:
    """Values that split some samples, distinct and ascending, with cumulative counts.

    The counts are cumulative, so a threshold is found in mapped files by reading few of their pages.
    """

    value: np.ndarray  # int64 [n]: a salted hash per user, or a timestamp
    weight: np.ndarray  # int64 [n]: the unit of the ratios: users or samples
    samples: np.ndarray  # int64 [n]
    positives: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, behaviors: Behaviors, samples: Samples, config: SplitConfig) -> "SplitValues":
        """Values of `samples`."""
        value = split_values(behaviors, samples.row, config)
        order = np.argsort(value, kind="stable")
        value = value[order]
        last = np.flatnonzero(np.diff(value, append=value[-1:] + 1))
        total, positives = last + 1, np.cumsum(samples.label[order] >= POSITIVE, dtype=np.int64)[last]
        users = np.arange(1, len(last) + 1)
        return cls(value[last], users if config.method == "user" else total, total, positives)

    def table(self) -> pa.Table:
        """Table for `from_table`."""
        return pa.table({name: getattr(self, name) for name in ("value", "weight", "samples", "positives")})

    @classmethod
    def from_table(cls, table: pa.Table) -> "SplitValues":
        """Reads the output of `table` without copying."""
        columns = (table[name] for name in ("value", "weight", "samples", "positives"))
        return cls(*(c.chunk(0).to_numpy() if c.num_chunks else np.zeros(0, dtype=np.int64) for c in columns))


def split_values(behaviors: Behaviors, rows: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Value that decides the split of the samples at some rows: their timestamp, their predefined split, or the salted
    hash of their user or item; int64 [n].
    """
    if config.method == "time":
        return behaviors.time[rows]
    if config.method == "column":
        return behaviors.split[rows].astype(np.int64)
    return id_values((behaviors.user if config.method == "user" else behaviors.item)[rows], config)


def id_values(ids: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Salted hash by which a split by user or item divides ids (int64 [n]), train first; int64 [n]."""
    return hash_of(SPLIT_SEED + 1, ids)


def split_thresholds(parts: Sequence[SplitValues], config: SplitConfig) -> np.ndarray:
    """The two values where valid and test begin, int64 [2], exact for any size of `parts`.

    Values, not positions, divide the splits, so equal timestamps are on the same side. Memory does not grow with
    the parts, which may be mapped: each round counts them at a few thousand edges and continues between two of them.
    """
    parts = [part for part in parts if len(part.value)]
    if config.method == "column":
        return np.array([1, 2])
    if not parts:
        return np.zeros(2, dtype=np.int64)
    total = sum(int(part.weight[-1]) for part in parts)
    bounds = [total * int(bound) // sum(config.ratios) for bound in np.cumsum(config.ratios)[:2]]
    return np.array([_value_at(rank, parts) for rank in bounds])


def _value_at(rank: int, parts: Sequence[SplitValues]) -> int:
    """Smallest value whose cumulative weight exceeds `rank`."""
    low, high = min(int(part.value[0]) for part in parts), max(int(part.value[-1]) for part in parts)
    while low < high:
        edges = np.arange(low, high, max(1, (high - low) // _EDGES))
        weight = sum(_up_to(part.weight, np.searchsorted(part.value, edges, side="right")) for part in parts)
        first = int(np.searchsorted(weight, rank, side="right"))  # the first edge with enough weight
        low, high = int(edges[first - 1]) + 1 if first else low, int(edges[first]) if first < len(edges) else high
    return low


def _up_to(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sum of the first `rows` rows, for each."""
    return np.where(rows > 0, sums[np.maximum(rows, 1) - 1], 0)


def split_counts(parts: Sequence[SplitValues], thresholds: np.ndarray) -> dict[str, int]:
    """samples_train, positives_train and so on."""
    counts = dict.fromkeys((f"{what}_{name}" for name in SPLITS for what in ("samples", "positives")), 0)
    for part in parts:
        if len(part.value):
            rows = np.r_[0, np.searchsorted(part.value, thresholds, side="left"), len(part.value)]
            for what in ("samples", "positives"):
                for name, count in zip(SPLITS, np.diff(_up_to(getattr(part, what), rows)), strict=True):
                    counts[f"{what}_{name}"] += int(count)
    return counts


def refuse_empty(counts: dict[str, int], config: SplitConfig) -> None:
    """Raises SchemaError if a split has no samples. counts: includes samples, users and samples_*."""
    empty = [name for name in SPLITS if counts[f"samples_{name}"] == 0]
    if empty:
        remedy = "use more users" if config.method == "user" else "use data from a longer period"
        raise SchemaError(
            f"interactions: {counts['samples']} samples of {counts['users'] - counts['users_without_samples']} "
            f"users leave the {' and '.join(empty)} split empty with split.method {config.method} and ratios "
            f"{':'.join(map(str, config.ratios))}. Change the ratios, {remedy}, or lower split.llm_history "
            f"({counts['ties_dropped']} samples have the timestamp of the last behavior that the LLM reads)."
        )


def refuse_one_label(counts: dict[str, int], labels: Labels) -> None:
    """Raises SchemaError if all labels of a split are the same. counts: includes samples_* and positives_*."""
    remedy = {
        "rating_above": "Set labels: {rule: {rating_above: X}} in the recipe, X within the range of your ratings.",
        "column": "Also log passed-over items, or set labels.rule: positives_only in the recipe.",
    }
    for name in SPLITS:
        if labels.rule in remedy and counts[f"positives_{name}"] in (0, counts[f"samples_{name}"]):
            raise SchemaError(
                f"samples: the {name} split has only one label under the rule '{labels.about}'. {remedy[labels.rule]}"
            )


def sample_rows(
    behaviors: Behaviors,
    samples: Samples,
    config: SplitConfig,
    thresholds: np.ndarray,
    labels: Labels,
    catalog: np.ndarray,
    own: pa.Table | None = None,
) -> pa.Table:
    """The samples table (schema.SAMPLE_ROWS) by user, timestamp and item; history_* are rows of `behaviors`, or of
    the taken ones if the split leaves out passed-over items.

    catalog: all item ids, ascending, from which negatives are sampled if the label rule needs them. own: further
    columns of the behaviors, which their samples get; a sampled negative has those of its positive, but label/<name> 0.
    """
    drawn_rows = np.zeros(0, dtype=bool)
    user, time, row = behaviors.user, behaviors.time, samples.row
    item, label = behaviors.item[row], samples.label
    if labels.negatives:
        took = behaviors.taken
        drawn = drawn_negatives(
            user[row], time[row], item, labels, took=(user[took], behaviors.item[took]), catalog=catalog
        )
        at, column = np.nonzero(drawn >= 0)
        row, item = np.concatenate([row, row[at]]), np.concatenate([item, drawn[at, column]])
        label = np.concatenate([label, np.zeros(len(at), dtype=np.float32)])
        drawn_rows = np.arange(len(row)) >= len(row) - len(at)
        order = np.lexsort((item, time[row], user[row]))
        row, item, label, drawn_rows = row[order], item[order], label[order], drawn_rows[order]
    end = run_starts(user, time)[row]  # behaviors of the sample's moment are not its past
    first = run_starts(user)[row]
    if not config.passed_over:
        seen = np.r_[0, np.cumsum(behaviors.taken)]
        first, end = seen[first], seen[end]
    start = np.maximum(first, end - config.history_length)
    split = np.searchsorted(thresholds, split_values(behaviors, row, config), side="right")
    columns = {
        "user_id": user[row],
        "item_id": item,
        "label": label.astype(np.float32),
        "timestamp": time[row],
        "split": pa.array(SPLITS).take(pa.array(split)),
        "history_start": start.astype(np.int32),
        "history_end": end.astype(np.int32),
        "weight": behaviors.weight[row],  # a sampled negative has its positive's weight
    }
    table = pa.table(columns, schema=SAMPLE_ROWS)
    for name in own.column_names if own is not None else ():
        values = own[name].take(pa.array(row))  # type: ignore[index]
        if name.startswith("label/") and drawn_rows.any():
            values = pc.if_else(pa.array(drawn_rows), pa.scalar(0, values.type), values)
        table = table.append_column(name, values)
    return table


def histories(behaviors: Behaviors, texts: Texts) -> pa.Table:
    """Behaviors that the LLM reads (schema.HISTORIES), by user and as_of; none for users who took nothing."""
    took = np.flatnonzero(behaviors.taken)
    starts = np.flatnonzero(np.diff(_places(behaviors.user), prepend=-1))
    columns = {
        "user_id": behaviors.user[starts[texts.user]],
        "as_of": texts.as_of,
        "items": _lists(behaviors.item[took], texts.start, texts.end),
        "ratings": _lists(behaviors.rating[took], texts.start, texts.end, nulls=True),
        "passed": _lists(*_passed_over(behaviors, texts)),
    }
    return pa.table(columns, schema=HISTORIES)


def _passed_over(behaviors: Behaviors, texts: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latest items that users passed over up to each text's as_of, as ranges of one array, without those they also took
    up to then.
    """
    place, took = _places(behaviors.user), behaviors.taken
    passed = np.flatnonzero(~took)
    if not len(passed) or not len(texts):
        none = np.zeros(len(texts), dtype=np.int64)
        return behaviors.item[:0], none, none
    items, code = np.unique(behaviors.item, return_inverse=True)
    key = place * len(items) + code
    taken, at = np.unique(key[took], return_index=True)  # first time that each user took each item
    known = rows_of(taken, key[passed])
    first_taken = np.where(known >= 0, behaviors.time[took][at[known]], np.iinfo(np.int64).max)
    place, time = place[passed], behaviors.time[passed]
    chosen, n = [np.zeros(0, dtype=np.int64)], 0
    start, end = np.zeros(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    nth = np.arange(len(texts)) - run_starts(texts.user)
    for round_ in range(int(nth.max()) + 1):  # one text of each user at a time
        text = np.flatnonzero(nth == round_)
        as_of = np.full(int(place[-1]) + 1, np.iinfo(np.int64).min)
        has = texts.user[text] < len(as_of)
        as_of[texts.user[text[has]]] = texts.as_of[text[has]]
        rows = np.flatnonzero((time <= as_of[place]) & (first_taken > as_of[place]))
        last = np.searchsorted(place[rows], texts.user[text], side="right")
        first = np.searchsorted(place[rows], texts.user[text])
        start[text], end[text] = n + np.maximum(first, last - PASSED_QUOTED), n + last
        chosen.append(passed[rows])
        n += len(rows)
    return behaviors.item[np.concatenate(chosen)], start, end


def read_samples(workspace: Workspace, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard's samples as schema.SAMPLES, or only some of its columns: histories are gathered on request.

    columns: may name history_events and the samples' further columns (see sample_rows), if there are any. Raises
    WorkspaceError if `prepare` has not run.
    """
    wanted = list(SAMPLES.names if columns is None else columns)
    stored = [name for name in wanted if name not in _HISTORY_COLUMNS]
    lists = _HISTORY_COLUMNS
    if not lists.keys() & set(wanted):
        return sample_places(workspace, number, stored).select(wanted)
    rows = sample_places(workspace, number, [*stored, "history_start", "history_end"])
    needed = [column for name, column in lists.items() if name in wanted]
    return with_histories(rows, in_histories(workspace, number, needed)).select(wanted)


def sample_places(workspace: Workspace, number: int, columns: Sequence[str]) -> pa.Table:
    """Columns of schema.SAMPLE_ROWS of a shard, without samples of forgotten users."""
    rows = workspace.read_shard("samples", number, list(dict.fromkeys(["user_id", *columns])))
    return read_tombstones(workspace).without(rows).select(list(columns))


def in_histories(workspace: Workspace, number: int, columns: Sequence[str]) -> pa.Table:
    """Interactions of a shard to which the histories of its samples refer."""
    table = workspace.read_shard("interactions", number, list(columns))
    if not _holds_taken_alone(table):
        return table
    table = workspace.read_shard("interactions", number, list({*columns, "rating", "label"}))
    return table.filter(_taken(table)).select(list(columns))


def for_histories(interactions: pa.Table, config: SplitConfig) -> pa.Table:
    """A shard of interactions in stored form: it records which of its rows histories refer to."""
    return interactions.replace_schema_metadata(None if config.passed_over else _TAKEN_ALONE)


def _holds_taken_alone(interactions: pa.Table) -> bool:
    return (interactions.schema.metadata or {}).get(b"histories_of") == b"taken"


def _taken(interactions: pa.Table) -> pa.Array:
    return pa.array(taken(interactions["rating"].to_numpy(), interactions["label"].to_numpy()))


def with_histories(rows: pa.Table, interactions: pa.Table) -> pa.Table:
    """Sample rows with their histories as lists.

    rows: schema.SAMPLE_ROWS, or some of its columns; interactions: of the same shard (see in_histories), item_id,
    rating or label.
    """
    start, end = (rows[name].to_numpy() for name in ("history_start", "history_end"))
    for name, column in _HISTORY_COLUMNS.items():
        if column in interactions.column_names:
            values = interactions[column].to_numpy()
            rows = rows.append_column(name, _lists(values, start, end, nulls=column == "rating"))
    return rows.drop_columns(["history_start", "history_end"])


@dataclass(frozen=True)
class SplitTables:
    """samples and histories as in `schema`; counts of rows, positives, and dropped rows."""

    samples: pa.Table
    histories: pa.Table
    counts: dict[str, int]


def build_samples(interactions: pa.Table, config: SplitConfig, labels: Labels) -> SplitTables:
    """Samples and LLM histories of interactions that fit in memory, as `prepare` makes them by shard.

    interactions: with the outcome columns, before the label rule. Both tables are ordered by user, samples
    then by timestamp and item. Raises SchemaError like with_outcomes, or if a split is empty.
    """
    interactions = with_outcomes(interactions, labels, "interactions")
    behaviors = Behaviors.ordered(interactions)
    samples = Samples.of(behaviors, config)
    values = [SplitValues.of(behaviors, samples, config)]
    thresholds = split_thresholds(values, config)
    texts = Texts.of(behaviors, config)
    counts = {**sample_counts(behaviors, samples, texts), **split_counts(values, thresholds)}
    refuse_empty(counts, config)
    rows = sample_rows(behaviors, samples, config, thresholds, labels, np.unique(behaviors.item))
    kept = slice(None) if config.passed_over else behaviors.taken
    names = {"item_id": behaviors.item, "rating": behaviors.rating, "label": behaviors.label}
    lists = pa.table({name: values[kept] for name, values in names.items()})
    read = histories(behaviors, texts)
    return SplitTables(with_histories(rows, lists).select(SAMPLES.names), read, counts)


def sample_counts(behaviors: Behaviors, samples: Samples, texts: Texts) -> dict[str, int]:
    """Counts about some users for the report; add them up over shards."""
    users = len(np.unique(behaviors.user))
    return {
        "interactions": len(behaviors.user),
        "users": users,
        "users_without_samples": users - len(np.unique(behaviors.user[samples.row])),
        "texts": len(texts),
        "read_by_llm": len(texts.quoted),
        "ties_dropped": samples.ties,
        "samples": len(samples.row),
    }


def last_behaviors(interactions: pa.Table, history_length: int) -> pa.Table:
    """History of each user for future scores (schema.BEHAVIORS): one row per user, ascending, with at most
    `history_length` behaviors, in the order of samples' histories.

    interactions: a shard in the form that `prepare` writes.
    """
    if _holds_taken_alone(interactions):
        interactions = interactions.filter(_taken(interactions))
    interactions = interactions.sort_by([(name, "ascending") for name in ("user_id", "timestamp", "item_id")])
    behaviors = Behaviors.ordered(interactions)
    has_events = EVENT_CODE in interactions.column_names
    events = interactions[EVENT_CODE].to_numpy() if has_events else np.zeros(len(interactions), dtype=np.uint8)
    ids, start = np.unique(behaviors.user, return_index=True)
    end = np.r_[start[1:], len(behaviors.user)]
    start = np.maximum(start, end - history_length)
    columns = {
        "id": ids,
        "times": _lists(behaviors.time, start, end),
        "items": _lists(behaviors.item, start, end),
        "ratings": _lists(behaviors.rating, start, end, nulls=True),
        "labels": _lists(behaviors.label, start, end),
        "events": _lists(events, start, end),
    }
    return pa.table(columns, schema=BEHAVIORS)


def _lists(values: np.ndarray, start: np.ndarray, end: np.ndarray, *, nulls: bool = False) -> pa.ChunkedArray:
    """A list column whose i-th list is values[start[i]:end[i]]. nulls: whether NaN stands for null."""

    def chunks() -> Iterator[pa.Array]:
        for first in range(0, len(start), _LISTS_PER_CHUNK):
            begin, length = start[first : first + _LISTS_PER_CHUNK], (end - start)[first : first + _LISTS_PER_CHUNK]
            offsets = np.r_[0, np.cumsum(length, dtype=np.int64)]
            index = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], length)
            yield pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[index], from_pandas=nulls))

    return pa.chunked_array(list(chunks()), type=pa.list_(pa.from_numpy_dtype(values.dtype)))
