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
from owlrec.schema import (
    BEHAVIORS,
    HISTORIES,
    INTERACTIONS,
    SAMPLE_ROWS,
    SAMPLES,
    conform,
    hash_of,
    last_rows,
    rows_of,
    run_starts,
)
from owlrec.sources.outcomes import POSITIVE, SPLITS, Labels, drawn_negatives, taken, with_outcomes
from owlrec.workspace import Workspace, read_tombstones

# -------------------------------------------------------------------------------------------------------------- catalog
# Titles by item id: an Arrow column behind a sorted id array.
#
# 10^7 titles take about 0.5 GB a process there, and several times that in a Python dict.


class ItemCatalog:
    """Titles by item id."""

    def __init__(self, items: pa.Table) -> None:
        """items: a table with `item_id` and `title`, in any order; of several rows of an item the last one counts."""
        ids = items["item_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        order = order[last_rows(ids[order])]
        self._ids = ids[order]
        self._titles = items["title"].combine_chunks().take(pa.array(order))

    @classmethod
    def load(cls, workspace: Workspace, more: Sequence[pa.Table] = ()) -> "ItemCatalog":
        """Reads the workspace's items table; titles other than text are left out. more: rows that stand over it."""
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
        """The title of each id, in order; "" for an unknown id, a null title or invalid text.

        ids: int64 [n].
        """
        rows = rows_of(self._ids, ids)
        found = self._titles.take(pa.array(rows, mask=rows < 0))
        try:
            texts = found.to_pylist()
        except UnicodeDecodeError:
            texts = [_text_or_none(value) for value in found]
        return [text or "" for text in texts]

    def draw(self, n: int, seed: int) -> list[int]:
        """At most `n` items, drawn at random and always the same ones for a seed, in the order drawn."""
        chosen = np.random.default_rng(seed).permutation(len(self._ids))[:n]
        found: list[int] = self._ids[chosen].tolist()
        return found

    def find(self, words: str, limit: int) -> list[tuple[int, str]]:
        """Items whose title holds `words`, whatever the case: at most `limit` (id, title), by id."""
        rows = np.flatnonzero(pc.match_substring(self._titles, words, ignore_case=True).fill_null(False))[:limit]
        return list(zip(self._ids[rows].tolist(), self._titles.take(pa.array(rows)).to_pylist(), strict=True))


def _text_or_none(value: pa.Scalar) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


# --------------------------------------------------------------------------------------------------------------- splits
# Which of a user's behaviors the LLM reads up to which moment, and which are samples to train and test on.
#
# A text is about a user as of a moment, its cut: it quotes the newest behaviors that the user took up to then. `half`
# is KAR's (RecSys 2024): the first min((N+1)//2, 30); `now` ends with the newest; `every` cuts at each multiple of a
# period that the user lived through. One rule keeps the future out: a sample reads the newest text whose as_of is
# strictly earlier than itself, else a learned default. So any behavior may be a sample, and what a user passed over is
# one, too, and never read as taken. Under KAR's protocol only what is later than the half is.
#
# Everything but the splits' two thresholds is a matter of one user, so a shard of users is built without the others.


# Lists are gathered this many at a time: it bounds the index arrays, and Arrow's 32-bit list offsets cannot overflow.
_LISTS_PER_CHUNK = 1 << 20
PASSED_QUOTED = 10  # of what a user passed over, an LLM reads so much at most
_TAKEN_ALONE = {b"histories_of": b"taken"}  # in the schema of stored interactions
_HISTORY_COLUMNS = {"history": "item_id", "history_ratings": "rating", "history_labels": "label"}
_EDGES = 4096  # of one round of the search for a threshold
_HOURS = {"h": 1, "d": 24, "w": 168}


class Every(Config):
    """Cuts at each multiple of a period since 1970, UTC."""

    every: str = Field(pattern=r"^[1-9][0-9]*[hdw]$")  # hours, days or weeks: 30d

    @property
    def period_ms(self) -> int:
        """The period in milliseconds."""
        return int(self.every[:-1]) * _HOURS[self.every[-1]] * 3_600_000


Cut = Literal["half", "now"] | Every


class SplitConfig(Config):
    """How behaviors become texts and samples: `user` keeps a user in one split, `item` an item (those of valid and test
    are cold), `time` trains on the past only, `column` reads the split of each from a column `split` of the
    interactions (train, valid or test).
    """

    # As of which moments the LLM writes about users. A sample reads the newest text that is earlier than itself; the
    # newest of all is published.
    cuts: tuple[Cut, ...] = Field(default=("half", "now"), min_length=1)
    kar_protocol: bool = False  # samples are only what is later than the half that the LLM reads, as in the paper
    method: Literal["user", "item", "time", "column"] = "user"
    ratios: tuple[PositiveInt, PositiveInt, PositiveInt] = (8, 1, 1)
    history_length: int = Field(default=10, ge=1)  # behaviors that a CTR model sees before a sample
    passed_over: bool = True  # whether these hold what was passed over; false where little of what is shown is taken
    llm_history: int = Field(default=30, ge=1)  # behaviors that the LLM reads at most: the papers' 30
    seed: int = Field(default=0, ge=0)  # methods user and item only

    @field_validator("cuts", mode="before")
    @classmethod
    def _one_cut(cls, cuts: Any) -> Any:
        return (cuts,) if isinstance(cuts, (str, dict, Every)) else cuts

    @field_validator("cuts")
    @classmethod
    def _distinct(cls, cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
        if len(set(cuts)) < len(cuts):
            raise ValueError("a cut is named twice. Name each once.")
        return cuts


@dataclass(frozen=True)
class Behaviors:
    """Interactions of whole users by user, then by timestamp and item: seven aligned arrays [n]."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    time: np.ndarray  # int64, ms
    rating: np.ndarray  # float32, NaN where not graded
    label: np.ndarray  # float32
    split: np.ndarray  # int8: a predefined one, -1 where there is none
    weight: np.ndarray  # float32: of its samples in training

    @classmethod
    def ordered(cls, interactions: pa.Table) -> "Behaviors":
        """Those of a table of schema.INTERACTIONS, in any order."""
        interactions = conform(interactions, INTERACTIONS, name="interactions")
        behaviors = cls.of(interactions)
        order = np.lexsort((behaviors.item, behaviors.time, behaviors.user))
        return cls(*(getattr(behaviors, field.name)[order] for field in fields(cls)))

    @classmethod
    def of(cls, interactions: pa.Table) -> "Behaviors":
        """Those of a table of schema.INTERACTIONS that is in order already."""
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
    """What the LLM reads of users: one row per text, by user, then by as_of. No two of a user have the same as_of."""

    user: np.ndarray  # int64 [n]: the place of the user among those of the behaviors
    as_of: np.ndarray  # int64 [n], ms: the text quotes nothing later
    start: np.ndarray  # int64 [n]: of what it quotes, as a range of the rows that were taken
    end: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, behaviors: Behaviors, config: SplitConfig) -> "Texts":
        """Those of each cut, of the users who took something."""
        time, place = behaviors.time, _places(behaviors.user)
        took = np.flatnonzero(behaviors.taken)
        time, place = time[took], place[took]
        first = np.flatnonzero(np.diff(place, prepend=-1))  # of each user's, among the rows that were taken
        last = np.append(first[1:], len(took))[: len(first)] - 1
        user, as_of, end = [], [], []
        for cut in config.cuts:
            match cut:
                case "half":
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
        # Of two texts of one moment the one that read more stays.
        kept = np.append((users[1:] != users[:-1]) | (moments[1:] != moments[:-1]), True)[: len(users)]
        users, moments, ends = users[kept], moments[kept], ends[kept]
        start = np.maximum(first[np.searchsorted(place[first], users)], ends - config.llm_history)
        return cls(users, moments, start, ends)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def quoted(self) -> np.ndarray:
        """The behaviors that some text quotes, among those that were taken: int64, ascending."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        size = int(self.end.max()) + 1
        change = np.bincount(self.start, minlength=size) - np.bincount(self.end, minlength=size)
        return np.flatnonzero(np.cumsum(change))


def _at_multiples(
    behaviors: Behaviors, time: np.ndarray, place: np.ndarray, last: np.ndarray, period: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cuts of `every`: the last behavior taken before each, among those that were taken, and the cut's moment.

    A cut after which the user was never seen again would say no more than `now`, so there is none.
    """
    cut = (time // period + 1) * period
    ends = np.append((cut[1:] != cut[:-1]) | (place[1:] != place[:-1]), True)[: len(cut)]
    at = np.flatnonzero(ends)
    until = np.maximum.reduceat(behaviors.time, np.flatnonzero(np.diff(_places(behaviors.user), prepend=-1)))
    at = at[until[place[at]] > cut[at]]
    return at, cut[at]


def _places(user: np.ndarray) -> np.ndarray:
    """Which user of these each row is of, from 0: int64 [n]. Users ascend."""
    return np.cumsum(np.diff(user, prepend=user[:1]) != 0)


@dataclass(frozen=True)
class Samples:
    """Which rows of some behaviors are samples, in their order."""

    row: np.ndarray  # int64 [samples]
    label: np.ndarray  # float32 [samples]
    ties: int = 0  # behaviors that are none because they have the timestamp of the last one that the LLM reads

    @classmethod
    def of(cls, behaviors: Behaviors, config: SplitConfig) -> "Samples":
        """All of them, or, under KAR's protocol, those later than the half that the LLM reads."""
        if not config.kar_protocol:
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
    """The values by which some samples are split, distinct and ascending, and how much lies up to each of them.

    Sums, so that a threshold is found in mapped files by touching few of their pages.
    """

    value: np.ndarray  # int64 [n]: a salted hash per user, or a timestamp
    weight: np.ndarray  # int64 [n]: what the ratios divide: users, or samples
    samples: np.ndarray  # int64 [n]
    positives: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, behaviors: Behaviors, samples: Samples, config: SplitConfig) -> "SplitValues":
        """Those of `samples`."""
        value = split_values(behaviors, samples.row, config)
        order = np.argsort(value, kind="stable")
        value = value[order]
        last = np.flatnonzero(np.diff(value, append=value[-1:] + 1))
        total, positives = last + 1, np.cumsum(samples.label[order] >= POSITIVE, dtype=np.int64)[last]
        users = np.arange(1, len(last) + 1)
        return cls(value[last], users if config.method == "user" else total, total, positives)

    def table(self) -> pa.Table:
        """As a table that `of_table` reads back."""
        return pa.table({name: getattr(self, name) for name in ("value", "weight", "samples", "positives")})

    @classmethod
    def of_table(cls, table: pa.Table) -> "SplitValues":
        """From what `table` gave, without copying."""
        columns = (table[name] for name in ("value", "weight", "samples", "positives"))
        return cls(*(c.chunk(0).to_numpy() if c.num_chunks else np.zeros(0, dtype=np.int64) for c in columns))


def split_values(behaviors: Behaviors, rows: np.ndarray, config: SplitConfig) -> np.ndarray:
    """What decides the split of the samples at some rows: their timestamp, their predefined split, or the salted hash
    of their user or item; int64 [n].
    """
    if config.method == "time":
        return behaviors.time[rows]
    if config.method == "column":
        return behaviors.split[rows].astype(np.int64)
    return id_values((behaviors.user if config.method == "user" else behaviors.item)[rows], config)


def id_values(ids: np.ndarray, config: SplitConfig) -> np.ndarray:
    """The salted hash by which a split by user or item divides ids (int64 [n]), train first; int64 [n]."""
    return hash_of(config.seed + 1, ids)


def split_thresholds(parts: Sequence[SplitValues], config: SplitConfig) -> np.ndarray:
    """The two values where valid and test begin, int64 [2], exact whatever the size of `parts`.

    Values, not positions, divide the splits, so that equal timestamps fall on the same side. Memory does not grow with
    the parts, which may be mapped: each round counts them at a few thousand edges and goes on between two of them.
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
    """The smallest value that, with all below it, weighs more than `rank`."""
    low, high = min(int(part.value[0]) for part in parts), max(int(part.value[-1]) for part in parts)
    while low < high:
        edges = np.arange(low, high, max(1, (high - low) // _EDGES))
        weight = sum(_up_to(part.weight, np.searchsorted(part.value, edges, side="right")) for part in parts)
        first = int(np.searchsorted(weight, rank, side="right"))  # the first edge that weighs enough
        low, high = int(edges[first - 1]) + 1 if first else low, int(edges[first]) if first < len(edges) else high
    return low


def _up_to(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of the first `rows` rows, for each."""
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
    """Raises SchemaError where a split holds no samples. counts: samples, users and samples_* among them."""
    empty = [name for name in SPLITS if counts[f"samples_{name}"] == 0]
    if empty:
        remedy = "use more users" if config.method == "user" else "use data over a longer time"
        raise SchemaError(
            f"interactions: {counts['samples']} samples of {counts['users'] - counts['users_without_samples']} users "
            f"leave the {' and '.join(empty)} split empty with split.method {config.method} and ratios "
            f"{':'.join(map(str, config.ratios))}. Change the ratios, {remedy}, or lower split.llm_history "
            f"({counts['ties_dropped']} samples had the timestamp of the last behavior that the LLM reads)."
        )


def refuse_one_label(counts: dict[str, int], labels: Labels) -> None:
    """Raises SchemaError where all labels of a split are the same. counts: samples_* and positives_* among them."""
    remedy = {
        "rating_above": "Set labels.rating_above in the recipe to a value that your ratings straddle.",
        "column": "Log what was passed over as well, or set labels.rule: positives_only in the recipe.",
    }
    for name in SPLITS:
        if labels.rule in remedy and counts[f"positives_{name}"] in (0, counts[f"samples_{name}"]):
            raise SchemaError(
                f"samples: all labels of the {name} split are the same under the rule '{labels.about}'. "
                f"{remedy[labels.rule]}"
            )


def sample_rows(
    behaviors: Behaviors,
    samples: Samples,
    config: SplitConfig,
    thresholds: np.ndarray,
    labels: Labels,
    catalog: np.ndarray,
) -> pa.Table:
    """The samples table (schema.SAMPLE_ROWS) by user, timestamp and item; history_* are rows of `behaviors`, or of
    those that were taken where the split leaves out what was passed over.

    catalog: all item ids, ascending, from which samples of label 0 are drawn where the label rule wants such.
    """
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
        order = np.lexsort((item, time[row], user[row]))
        row, item, label = row[order], item[order], label[order]
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
        "weight": behaviors.weight[row],  # a drawn sample's is that of what was taken
    }
    return pa.table(columns, schema=SAMPLE_ROWS)


def histories(behaviors: Behaviors, texts: Texts) -> pa.Table:
    """What the LLM reads (schema.HISTORIES), by user and as_of; of users who took nothing there is none."""
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
    """The last items that users passed over up to each text's as_of, as ranges of one array; what they took up to then
    as well is left out.
    """
    place, took = _places(behaviors.user), behaviors.taken
    passed = np.flatnonzero(~took)
    if not len(passed) or not len(texts):
        none = np.zeros(len(texts), dtype=np.int64)
        return behaviors.item[:0], none, none
    items, code = np.unique(behaviors.item, return_inverse=True)
    key = place * len(items) + code
    taken, at = np.unique(key[took], return_index=True)  # the first time that each user took each item
    known = rows_of(taken, key[passed])
    first_taken = np.where(known >= 0, behaviors.time[took][at[known]], np.iinfo(np.int64).max)
    place, time = place[passed], behaviors.time[passed]
    chosen, n = [np.zeros(0, dtype=np.int64)], 0
    start, end = np.zeros(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    nth = np.arange(len(texts)) - run_starts(texts.user)
    for of_each in range(int(nth.max()) + 1):  # one text of each user at a time
        text = np.flatnonzero(nth == of_each)
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
    """One shard's samples as schema.SAMPLES, or only these of its columns: histories are gathered where asked for.

    Raises WorkspaceError where `prepare` has not run.
    """
    wanted = list(SAMPLES.names if columns is None else columns)
    stored = [name for name in wanted if name in SAMPLE_ROWS.names]
    lists = _HISTORY_COLUMNS
    if not lists.keys() & set(wanted):
        return sample_places(workspace, number, stored).select(wanted)
    rows = sample_places(workspace, number, [*stored, "history_start", "history_end"])
    needed = [column for name, column in lists.items() if name in wanted]
    return with_histories(rows, in_histories(workspace, number, needed)).select(wanted)


def sample_places(workspace: Workspace, number: int, columns: Sequence[str]) -> pa.Table:
    """Columns of schema.SAMPLE_ROWS of a shard, without samples of users who are forgotten."""
    rows = workspace.read_shard("samples", number, list(dict.fromkeys(["user_id", *columns])))
    return read_tombstones(workspace).without(rows).select(list(columns))


def in_histories(workspace: Workspace, number: int, columns: Sequence[str]) -> pa.Table:
    """The interactions of a shard that the histories of its samples are ranges of."""
    table = workspace.read_shard("interactions", number, list(columns))
    if not _holds_taken_alone(table):
        return table
    table = workspace.read_shard("interactions", number, list({*columns, "rating", "label"}))
    return table.filter(_taken(table)).select(list(columns))


def for_histories(interactions: pa.Table, config: SplitConfig) -> pa.Table:
    """A shard of interactions as it is written: it says which of its rows histories are ranges of."""
    return interactions.replace_schema_metadata(None if config.passed_over else _TAKEN_ALONE)


def _holds_taken_alone(interactions: pa.Table) -> bool:
    return (interactions.schema.metadata or {}).get(b"histories_of") == b"taken"


def _taken(interactions: pa.Table) -> pa.Array:
    return pa.array(taken(interactions["rating"].to_numpy(), interactions["label"].to_numpy()))


def with_histories(rows: pa.Table, interactions: pa.Table) -> pa.Table:
    """Sample rows with their histories as lists.

    rows: as schema.SAMPLE_ROWS, or some of its columns; interactions: of the same shard (see in_histories), item_id,
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
    """samples and histories as in `schema`; counts of rows, positives, and what was dropped."""

    samples: pa.Table
    histories: pa.Table
    counts: dict[str, int]


def build_samples(interactions: pa.Table, config: SplitConfig, labels: Labels) -> SplitTables:
    """Samples and LLM histories of interactions that fit in memory, as `prepare` makes them by shard.

    interactions: with the columns that tell an outcome, before the label rule. Both tables are ordered by user, samples
    then by timestamp and item. Raises SchemaError as with_outcomes, or where a split ends up empty.
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
    """What the report says of some users; add up over shards."""
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
    """What a model reads of each user from now on (schema.BEHAVIORS): one row per user, ascending, with at most
    `history_length` behaviors, in the order of samples' histories.

    interactions: a shard of them, as `prepare` has written it.
    """
    if _holds_taken_alone(interactions):
        interactions = interactions.filter(_taken(interactions))
    behaviors = Behaviors.ordered(interactions)
    ids, start = np.unique(behaviors.user, return_index=True)
    end = np.r_[start[1:], len(behaviors.user)]
    start = np.maximum(start, end - history_length)
    columns = {
        "id": ids,
        "times": _lists(behaviors.time, start, end),
        "items": _lists(behaviors.item, start, end),
        "ratings": _lists(behaviors.rating, start, end, nulls=True),
        "labels": _lists(behaviors.label, start, end),
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
