"""What became of an interaction: taken, graded or passed over, and the label that models learn.

Logs say it in different columns. `rating` is a grade, or how often somebody played; `label` is 0, 1 or a probability;
`event` names what happened (impression, click, play, install, purchase). The recipe's label rule turns each into the
two columns that all stages read, `rating` (null: not graded) and `label`:

* rating_above: who grades has taken; the label is 1 where the grade exceeds a value.
* column: the label is the column's own, or 1 for every event but an impression; below a half, without a grade, it was
  passed over.
* positives_only: every row was taken; samples of label 0 are drawn. A rating counts how often.

One that was passed over is never quoted to an LLM as taken, and has a token of its own in the histories of CTR models.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from owlrec.config import Config
from owlrec.errors import SchemaError, did_you_mean
from owlrec.schema import hash_of, rows_of
from owlrec.shards import Card

OUTCOME_COLUMNS = ("rating", "label", "event")  # of a source's interactions; any may be absent
SPLIT = "split"  # another one that may be there: a predefined split
WEIGHT = "weight"  # and another: how much its samples count in training
SPLITS = ("train", "valid", "test")
POSITIVE = 0.5  # a label from here on is that of something taken, and a positive where a class is wanted
PASSED_OVER = "impression"
EVENTS = (PASSED_OVER, "click", "play", "install", "purchase")
Rule = Literal["rating_above", "column", "positives_only"]
# An impression that its user acts on within so long was not passed over.
ANSWER_MS = 24 * 3_600_000
_ROUNDS = 20  # of drawing again what the user took; then the user's whole catalog is looked through


class LabelConfig(Config):
    """Which interactions are positive. See owlrec.sources.outcomes.

    rule: where it is not given, `column` for interactions with a column label or event, `rating_above` for those with a
    rating, else `positives_only`.
    """

    rule: Rule | None = None
    rating_above: float | None = None  # by default the scenario's
    negatives: int = Field(4, ge=1)  # positives_only: samples of label 0 for each of label 1
    negatives_by: Literal["uniform", "popularity"] = "uniform"


class Labels(BaseModel, frozen=True):
    """A label rule that is decided: what LabelConfig comes to for a source."""

    rule: Rule
    rating_above: float
    negatives: int = 0  # 0 unless the rule is positives_only
    negatives_by: Literal["uniform", "popularity"] = "uniform"
    seed: int = 0  # of the draw; no recipe sets it
    events: bool = False  # whether labels come from events

    @classmethod
    def of(cls, config: LabelConfig, columns: Collection[str], rating_above: float) -> "Labels":
        """The rule for interactions with these columns; rating_above: the scenario's.

        Raises SchemaError where the rule asks for a column that is not there.
        """
        labelled = bool({"label", "event"} & set(columns))
        rule = config.rule or ("column" if labelled else "rating_above" if "rating" in columns else "positives_only")
        if rule == "column" and not labelled:
            raise SchemaError(
                "labels.rule is column, but the interactions have neither a column label nor event. Map one under "
                "source.columns.interactions, or choose another rule."
            )
        if rule == "rating_above" and "rating" not in columns:
            raise SchemaError(
                "labels.rule is rating_above, but the interactions have no column rating. Map one under "
                "source.columns.interactions, or choose another rule."
            )
        drawn = rule == "positives_only"
        return cls(
            rule=rule,
            rating_above=rating_above if config.rating_above is None else config.rating_above,
            negatives=config.negatives if drawn else 0,
            negatives_by=config.negatives_by if drawn else "uniform",
            events=rule == "column" and "label" not in columns,
        )

    @classmethod
    def of_card(cls, prepared: Card) -> "Labels":
        """The rule that the tables were prepared by. prepared: the card of the stage."""
        return cls.model_validate_json(str(prepared.counts["labels"]))

    @property
    def about(self) -> str:
        """The rule in a few words."""
        return {
            "rating_above": f"label 1 where rating > {self.rating_above:g}",
            "column": "label 1 for every event but an impression" if self.events else "labels as logged",
            "positives_only": f"label 1 as logged, {self.negatives} of label 0 drawn for each ({self.negatives_by})",
        }[self.rule]


def with_outcomes(table: pa.Table, labels: Labels, name: str, first_row: int = 0) -> pa.Table:
    """Interactions with `rating` (null: not graded), `label`, `split` (null: not predefined) and `weight`, in place of
    the columns that the source has.

    name, first_row: of the table, in errors. Raises SchemaError naming the row of a label outside [0, 1], an event or a
    split of an unknown name, a rating that the rule needs and that is null, or a weight that is negative or none.
    """
    rating = _ratings(table, labels, name, first_row)
    if labels.rule == "rating_above":
        label = (rating > labels.rating_above).astype(np.float32)
    elif labels.rule == "positives_only":
        label = np.ones(len(rating), dtype=np.float32)
    elif labels.events:
        label = _event_labels(table, name, first_row)
    else:
        label = _logged_labels(table, name, first_row)
    columns = {
        "rating": pa.array(rating, pa.float32(), from_pandas=True),
        "label": pa.array(label, pa.float32()),
        SPLIT: _splits(table, name, first_row),
        WEIGHT: pa.array(_weights(table, name, first_row)),
    }
    table = table.drop_columns(outcome_columns(table.column_names))
    for column, values in columns.items():
        table = table.append_column(column, values)
    return table


def taken(rating: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which interactions were taken, bool [n]; the others were passed over. rating: NaN where not graded."""
    return ~np.isnan(rating) | (label >= POSITIVE)


def was_taken(rating: float | None, label: float) -> bool:
    """The same of one interaction; rating: None where not graded."""
    return rating is not None or label >= POSITIVE


def answered(user: np.ndarray, item: np.ndarray, time: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which impressions (label 0) their user acted on within ANSWER_MS, bool [n]: what happened tells the outcome."""
    order = np.lexsort((label, time, item, user))
    user, item, time, label = user[order], item[order], time[order], label[order]
    n = len(user)
    # The next row of something taken, of the same user and item: rows before it in this order are earlier.
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
    """Items that stand for what was not taken: int64 [n, negatives], -1 where the user has taken every item.

    user, time, item: of the positives. took: (user, item) of all that their users ever took. catalog: all item ids,
    ascending. By popularity, items are drawn from `took` as often as they stand there, which in a shard of users is a
    sample of all. A draw is a hash of the positive
    and the seed, so that a sample keeps its negatives whatever else is prepared with it.
    """
    users, place = np.unique(took[0], return_inverse=True)
    places = np.unique(rows_of(catalog, took[1]) + place * len(catalog))
    of_user = np.searchsorted(users, user) * len(catalog)
    source = np.sort(took[1]) if labels.negatives_by == "popularity" else catalog
    found = np.full((len(user), labels.negatives), -1, dtype=np.int64)
    for number in range(labels.negatives):
        missing = np.arange(len(user))
        for attempt in range(_ROUNDS):
            if not len(missing):
                break
            mixed = hash_of(labels.seed, number, attempt, user[missing], time[missing], item[missing])
            chosen = source[mixed % len(source)]
            key = rows_of(catalog, chosen) + of_user[missing]
            twice = (found[missing, :number] == chosen[:, None]).any(axis=1) & (len(catalog) > 4 * labels.negatives)
            good = (rows_of(places, key) < 0) & ~twice
            found[missing[good], number] = chosen[good]
            missing = missing[~good]
        for row in missing.tolist():  # of users who took nearly everything, or of few items
            left = np.setdiff1d(catalog, took[1][took[0] == user[row]])
            if len(left):
                at = hash_of(labels.seed, number, _ROUNDS, user[[row]], time[[row]], item[[row]])[0] % len(left)
                found[row, number] = left[at]
    return found


def _ratings(table: pa.Table, labels: Labels, name: str, first_row: int) -> np.ndarray:
    """float32 [n], NaN where there is none."""
    if "rating" not in table.column_names:
        return np.full(table.num_rows, np.nan, dtype=np.float32)
    values = table["rating"].cast(pa.float32()).to_numpy().astype(np.float32)
    missing = np.isnan(values)
    if labels.rule == "rating_above" and missing.any():
        raise SchemaError(
            f"{name}, row {first_row + int(missing.argmax())}: rating is null ({int(missing.sum())} such rows). "
            "Drop the rows or rate them; for interactions without grades set labels.rule: positives_only."
        )
    return values


def _logged_labels(table: pa.Table, name: str, first_row: int) -> np.ndarray:
    advice = "Correct it, or map another column under source.columns.interactions."
    return _numbers(table, "label", name, first_row, 1.0, "lie in [0, 1]", advice)


def _event_labels(table: pa.Table, name: str, first_row: int) -> np.ndarray:
    events = table["event"].cast(pa.string())
    known = pc.is_in(events, value_set=pa.array(EVENTS)).to_numpy()
    if not known.all():
        row = int((~known).argmax())
        event = str(events[row].as_py())
        raise SchemaError(
            f"{name}, row {first_row + row}: the event is '{event}', but it must be one of {', '.join(EVENTS)}."
            f"{did_you_mean(event, EVENTS)} Rename it, or drop the row."
        )
    return pc.not_equal(events, PASSED_OVER).to_numpy().astype(np.float32)


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
    advice = "Correct it; without the column every row weighs 1."
    largest = float(np.finfo(np.float32).max)
    return _numbers(table, WEIGHT, name, first_row, largest, "be a number that is not negative", advice)


def _numbers(
    table: pa.Table, column: str, name: str, first_row: int, most: float, must: str, advice: str
) -> np.ndarray:
    """A column of numbers from 0 to `most`, float32 [n]. Raises SchemaError naming the first row that has another."""
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
    """Those of a source's columns that tell an outcome, a predefined split, or a weight."""
    return [column for column in (*OUTCOME_COLUMNS, SPLIT, WEIGHT) if column in columns]
