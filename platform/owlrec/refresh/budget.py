"""Whom a refresh asks about: calls go where drift times activity is greatest, ties to the smaller id.

The choice is a threshold over all shards' candidates, found without bringing them together: shards count theirs by the
first digits of their rank, and only the bin in which the budget ends is read, digit by digit, as a radix sort would.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from owlrec.shards import Card, Shard
from owlrec.workspace import Workspace

# A user whose short term is to be frozen.
DUE = pa.schema([("user_id", pa.int64()), ("reason", pa.string()), ("drift", pa.float32()), ("priority", pa.float64())])
_AT_ONCE = 1 << 20  # candidates that are sorted in memory


@dataclass(frozen=True)
class Cut:
    """The last of those who are asked about."""

    priority: float
    user_id: int

    def admits(self, due: pa.Table) -> np.ndarray:
        """Which rows of DUE are asked about: bool [n]."""
        priority, ids = due["priority"].to_numpy(), due["user_id"].to_numpy()
        return (priority > self.priority) | ((priority == self.priority) & (ids <= self.user_id))


EVERYONE = Cut(-1.0, 0)  # priorities are never negative
NOBODY = Cut(np.inf, 0)


def rank_digits(due: pa.Table) -> np.ndarray:
    """The rank of candidates (DUE) as eight digits of 16 bits: int64 [n, 8], smaller ones first.

    The bits of a float that is not negative ascend as it does: four digits of the priority, inverted, four of the id.
    """
    priority = np.abs(due["priority"].to_numpy())  # -0.0 is 0.0
    keys = [~priority.view(np.uint64), due["user_id"].to_numpy().view(np.uint64) ^ np.uint64(1 << 63)]
    digits = [key >> np.uint64(shift) & np.uint64(0xFFFF) for key in keys for shift in (48, 32, 16, 0)]
    return np.stack(digits, axis=1).astype(np.int64)


def budget_cut(workspace: Workspace, folder: str, cards: Mapping[str, Card], budget: int | None) -> Cut:
    """Where the budget (None: no end) ends among the candidates of all shards.

    folder, cards: of InterestsStage. Holds a million candidates at most, whatever their number.
    """
    if budget == 0:
        return NOBODY
    bins = {name: json.loads(str(card.counts["bins"])) for name, card in cards.items() if card.counts["due"]}
    counts: Counter[int] = Counter()
    for of_shard in bins.values():
        counts.update({int(digit): n for digit, n in of_shard.items()})
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
            holders = [Shard.of_name(name) for name, of_shard in bins.items() if str(digit) in of_shard]
            files = [f"{folder}/due/{shard.file()}" for shard in holders]
        tables = _with_prefix(workspace, files, prefix)
        if counts[digit] <= _AT_ONCE:
            return _last(pa.concat_tables(tables), left)
        counts = Counter()
        for table in tables:
            counts.update(rank_digits(table)[:, len(prefix)].tolist())


def _with_prefix(workspace: Workspace, files: list[str], prefix: list[int]) -> Iterator[pa.Table]:
    """The candidates whose rank begins so."""
    for file in files:
        due = workspace.read_parquet(file)
        yield due.filter(pa.array((rank_digits(due)[:, : len(prefix)] == prefix).all(axis=1)))


def _last(due: pa.Table, n: int) -> Cut:
    """The n-th candidate."""
    priority, ids = due["priority"].to_numpy(), due["user_id"].to_numpy()
    row = np.lexsort((ids, -priority))[n - 1]
    return Cut(float(priority[row]), int(ids[row]))
