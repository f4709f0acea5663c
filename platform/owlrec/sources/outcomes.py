"""Outcomes of interactions (taken, graded or passed over) and the label that models learn.

Logs have them in different columns. `rating` is a grade or a count; `label` is 0, 1 or a probability;
`event` names the event (impression, click, play, install, purchase). The recipe's label rule converts each to the
two columns that all stages read, `rating` (null: not graded) and `label`:

* rating_above: a graded item was taken; the label is 1 if the grade exceeds a value.
* column: the label is the column's own, or 1 for every event except an impression; without a grade, a label below 0.5
means passed over.
* positives_only: every row was taken; negatives are sampled. A rating is a count.

A passed-over item is never quoted to an LLM as taken, and has its own token in the histories of CTR models.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, PositiveInt, field_validator

from owlrec.config import Config
from owlrec.errors import SchemaError, did_you_mean
from owlrec.ids import EVENTS, hash_of, rows_of
from owlrec.shards import Card

OUTCOME_COLUMNS = ("rating", "label", "event")  # in a source's interactions; all optional
SPLIT = "split"  # optional column: a predefined split
WEIGHT = "weight"  # optional column: weight of its samples in training
SPLITS = ("train", "valid", "test")
POSITIVE = 0.5  # labels from here on mean taken, and the positive class
PASSED_OVER = "impression"
CARRIED = "carried/"  # prefix of interactions' columns that are features or labels, on their way through `prepare`
EVENT_CODE = "event"  # column of prepared interactions: place among EVENTS, from 1; 0 if unknown
Rule = Literal["rating_above", "column", "positives_only"]
# An impression was not passed over if its user acts on it within this time.
ANSWER_MS = 24 * 3_600_000
_ROUNDS = 20  # redraws of taken items, before the whole catalog is searched


class LabelConfig(Config):
    """Rules for positive interactions. See owlrec.sources.outcomes.

    rule: by default `column` for interactions with a column label or event, `rating_above` for those with a
    rating, otherwise `positives_only`. `{rating_above: 4}` is that rule with another value than the scenario's.
    negatives: of positives_only, samples of label 0 for each of label 1: drawn from all items alike, or, as
    `{popularity: 4}`, the more often the more popular they are.
    """

    rule: Rule | dict[Literal["rating_above"], float] | None = None
    negatives: PositiveInt | dict[Literal["uniform", "popularity"], PositiveInt] = 4

    @field_validator("rule", "negatives")
    @classmethod
    def _of_one(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError("must hold one `name: number`")
        return value

    @property
    def rating_above(self) -> float | None:
        """What a rating must exceed; None = the scenario's."""
        return self.rule["rating_above"] if isinstance(self.rule, dict) else None

    @property
    def rule_name(self) -> Rule | None:
        """`rule` without its value."""
        return "rating_above" if isinstance(self.rule, dict) else self.rule

    @property
    def drawn(self) -> tuple[Literal["uniform", "popularity"], int]:
        """How negatives are drawn, and how many."""
        if isinstance(self.negatives, dict):
            return next(iter(self.negatives.items()))
        return "uniform", self.negatives


class Labels(BaseModel, frozen=True):
    """A resolved label rule: a LabelConfig applied to a source."""

    rule: Rule
    rating_above: float
    negatives: int = 0  # 0 unless the rule is positives_only
    negatives_by: Literal["uniform", "popularity"] = "uniform"
    seed: int = 0  # of the sampling; no recipe sets it
    events: bool = False  # whether labels come from events
    tasks: tuple[str, ...] = ()  # further labels, columns of the interactions: in [0, 1], null if unknown

    @classmethod
    def of(cls, config: LabelConfig, columns: Collection[str], rating_above: float) -> "Labels":
        """The rule for interactions with these columns; rating_above: the scenario's.

        Raises SchemaError if the rule needs a missing column.
        """
        labeled = bool({"label", "event"} & set(columns))
        rule = config.rule_name or (
            "column" if labeled else "rating_above" if "rating" in columns else "positives_only"
        )
        if rule == "column" and not labeled:
            raise SchemaError(
                "labels.rule is column, but the interactions have neither a column label nor event. Map one "
                "under source.columns.interactions, or use another rule."
            )
        if rule == "rating_above" and "rating" not in columns:
            raise SchemaError(
                "labels.rule is rating_above, but the interactions have no column rating. Map one under "
                "source.columns.interactions, or use another rule."
            )
        how, negatives = config.drawn
        drawn = rule == "positives_only"
        return cls(
            rule=rule,
            rating_above=rating_above if config.rating_above is None else config.rating_above,
            negatives=negatives if drawn else 0,
            negatives_by=how if drawn else "uniform",
            events=rule == "column" and "label" not in columns,
        )

    @classmethod
    def from_card(cls, prepared: Card) -> "Labels":
        """The rule of the prepared tables. prepared: the card of the stage."""
        return cls.model_validate_json(str(prepared.counts["labels"]))

    @property
    def about(self) -> str:
        """The rule in a few words."""
        return {
            "rating_above": f"label 1 where rating > {self.rating_above:g}",
            "column": "label 1 for every event except impressions" if self.events else "labels as logged",
            "positives_only": f"label 1 as logged, plus {self.negatives} sampled negatives each ({self.negatives_by})",
        }[self.rule]


def with_outcomes(table: pa.Table, labels: Labels, name: str, first_row: int = 0) -> pa.Table:
    """Interactions with `rating` (null: not graded), `label`, `split` (null: not predefined), `weight` and, if the
    source has it, `event` (its code), replacing the source's columns.

    name, first_row: of the table, in errors. Raises SchemaError with the row for a label outside [0, 1] (also of a
    task), an unknown event or split, a null rating that the rule needs, or a weight that is negative or null.
    """
    rating = _ratings(table, labels, name, first_row)
    if labels.rule == "rating_above":
        label = (rating > labels.rating_above).astype(np.float32)
    elif labels.rule == "positives_only":
        label = np.ones(len(rating), dtype=np.float32)
    elif labels.events:
        _event_codes(table, name, first_row)  # refuses unknown ones
        label = _event_labels(table)
    else:
        label = _logged_labels(table, name, first_row)
    columns = {
        "rating": pa.array(rating, pa.float32(), from_pandas=True),
        "label": pa.array(label, pa.float32()),
        SPLIT: _splits(table, name, first_row),
        WEIGHT: pa.array(_weights(table, name, first_row)),
    }
    if EVENT_CODE in table.column_names:
        columns[EVENT_CODE] = _event_codes(table, name, first_row)
    for task in labels.tasks:
        columns[CARRIED + task] = _task_labels(table, task, name, first_row)
    kept = [column for column in table.column_names if column not in columns]
    table = table.select([column for column in kept if column not in outcome_columns(kept)])
    for column, values in columns.items():
        table = table.append_column(column, values)
    return table


def taken(rating: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Interactions that were taken, bool [n]; the others were passed over. rating: NaN if not graded."""
    return ~np.isnan(rating) | (label >= POSITIVE)


def was_taken(rating: float | None, label: float) -> bool:
    """The same for one interaction; rating: None if not graded."""
    return rating is not None or label >= POSITIVE


def answered(user: np.ndarray, item: np.ndarray, time: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Impressions (label 0) that their user acted on within ANSWER_MS, bool [n]: the later event has the outcome."""
    order = np.lexsort((label, time, item, user))
    user, item, time, label = user[order], item[order], time[order], label[order]
    n = len(user)
    # The next taken row of the same user and item; rows before it in this order are earlier.
    following = np.where(label > 0, np.arange(n), n)
    following = np.minimum.accumulate(following[::-1])[::-1] if n else following
    there = following < n
    at = np.minimum(following, n - 1)
    same = there & (user[at] == user) & (item[at] == item) & (time[at] - time <= ANSWER_MS) & (label == 0)
    result = np.zeros(n, dtype=bool)
    result[order] = same
    return result


def drawn_negatives(
    user: np.ndarray,
    time: np.ndarray,
    item: np.ndarray,
    labels: Labels,
    *,
    took: tuple[np.ndarray, np.ndarray],
    catalog: np.ndarray,
) -> np.ndarray:
    """Negative items: int64 [n, negatives], -1 if the user has taken every item.

    user, time, item: of the positives. took: (user, item) pairs that the users ever took. catalog: all item ids,
    ascending. By popularity, items are drawn from `took` with their frequency, which in a shard of users is a
    sample of all. Each draw is a hash of the positive
    and the seed, so a sample keeps its negatives when other data is added.
    """
    users, place = np.unique(took[0], return_inverse=True)
    places = np.unique(rows_of(catalog, took[1]) + place * len(catalog))
    user_keys = np.searchsorted(users, user) * len(catalog)
    source = np.sort(took[1]) if labels.negatives_by == "popularity" else catalog
    negatives = np.full((len(user), labels.negatives), -1, dtype=np.int64)
    for number in range(labels.negatives):
        missing = np.arange(len(user))
        for attempt in range(_ROUNDS):
            if not len(missing):
                break
            mixed = hash_of(labels.seed, number, attempt, user[missing], time[missing], item[missing])
            chosen = source[mixed % len(source)]
            key = rows_of(catalog, chosen) + user_keys[missing]
            twice = (negatives[missing, :number] == chosen[:, None]).any(axis=1) & (len(catalog) > 4 * labels.negatives)
            good = (rows_of(places, key) < 0) & ~twice
            negatives[missing[good], number] = chosen[good]
            missing = missing[~good]
        for row in missing.tolist():  # users who took nearly everything, or small catalogs
            left = np.setdiff1d(catalog, took[1][took[0] == user[row]])
            if len(left):
                at = hash_of(labels.seed, number, _ROUNDS, user[[row]], time[[row]], item[[row]])[0] % len(left)
                negatives[row, number] = left[at]
    return negatives


def _ratings(table: pa.Table, labels: Labels, name: str, first_row: int) -> np.ndarray:
    """float32 [n], NaN if missing."""
    if "rating" not in table.column_names:
        return np.full(table.num_rows, np.nan, dtype=np.float32)
    values = table["rating"].cast(pa.float32()).to_numpy().astype(np.float32)
    missing = np.isnan(values)
    if labels.rule == "rating_above" and missing.any():
        raise SchemaError(
            f"{name}, row {first_row + int(missing.argmax())}: rating is null ({int(missing.sum())} such "
            "rows). Drop the rows or add ratings; for interactions without ratings set labels.rule: "
            "positives_only."
        )
    return values


def _logged_labels(table: pa.Table, name: str, first_row: int) -> np.ndarray:
    advice = "Correct it, or map another column under source.columns.interactions."
    return _numbers(table, "label", name, first_row, 1.0, "lie in [0, 1]", advice)


def _event_codes(table: pa.Table, name: str, first_row: int) -> pa.Array:
    """Place of each event among EVENTS, from 1: uint8 [n]."""
    events = table["event"].cast(pa.string())
    place = pc.index_in(events, value_set=pa.array(EVENTS))
    if place.null_count:
        row = pc.index(pc.is_null(place), True).as_py()
        event = str(events[row].as_py())
        raise SchemaError(
            f"{name}, row {first_row + row}: the event is '{event}', but it must be one of {', '.join(EVENTS)}."
            f"{did_you_mean(event, EVENTS)} Rename it, or drop the row."
        )
    return pc.add(place, 1).cast(pa.uint8()).combine_chunks()


def _event_labels(table: pa.Table) -> np.ndarray:
    return pc.not_equal(table["event"].cast(pa.string()), PASSED_OVER).to_numpy().astype(np.float32)


def _task_labels(table: pa.Table, task: str, name: str, first_row: int) -> pa.Array:
    """A further label, float32 [n], null if unknown."""
    texts = table[CARRIED + task].combine_chunks()
    try:
        values = pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.float32())
        wrong = pc.fill_null(pc.invert(pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, 1))), False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        wrong = pc.invert(pc.match_substring_regex(texts, r"^([01](\.0*)?|0?\.\d+|)$"))
    if (row := pc.index(wrong, True).as_py()) >= 0:
        raise SchemaError(
            f"{name}, row {first_row + row}: the label {task} is '{texts[row].as_py()}', but it must lie in [0, 1], or "
            "be empty if it is unknown. Correct it, or remove it from ctr.tasks."
        )
    return values


def _splits(table: pa.Table, name: str, first_row: int) -> pa.Array:
    if SPLIT not in table.column_names:
        return pa.nulls(table.num_rows, pa.int8())
    values = table[SPLIT].cast(pa.string())
    place = pc.index_in(values, value_set=pa.array(SPLITS)).combine_chunks()
    if place.null_count:
        row = pc.index(pc.is_null(place), True).as_py()
        raise SchemaError(
            f"{name}, row {first_row + row}: the split is {values[row].as_py()!r}, but it must be one of "
            f"{', '.join(SPLITS)} ({place.null_count} such rows). Correct it, or map another column under "
            "source.columns.interactions."
        )
    return place.cast(pa.int8())


def _weights(table: pa.Table, name: str, first_row: int) -> np.ndarray:
    """float32 [n]."""
    if WEIGHT not in table.column_names:
        return np.ones(table.num_rows, dtype=np.float32)
    advice = "Correct it; without the column, every row has weight 1."
    largest = float(np.finfo(np.float32).max)
    return _numbers(table, WEIGHT, name, first_row, largest, "be a non-negative number", advice)


def _numbers(
    table: pa.Table, column: str, name: str, first_row: int, most: float, must: str, advice: str
) -> np.ndarray:
    """A column of numbers from 0 to `most`, float32 [n]. Raises SchemaError with the first invalid row."""
    values = table[column].cast(pa.float32()).to_numpy().astype(np.float32)
    wrong = ~((values >= 0) & (values <= most))
    if wrong.any():
        row = int(wrong.argmax())
        raise SchemaError(
            f"{name}, row {first_row + row}: the {column} is {table[column][row].as_py()}, but it must {must} "
            f"({int(wrong.sum())} such rows). {advice}"
        )
    return values


def outcome_columns(columns: Sequence[str]) -> list[str]:
    """A source's columns for outcomes, a predefined split, or a weight."""
    return [column for column in (*OUTCOME_COLUMNS, SPLIT, WEIGHT) if column in columns]
