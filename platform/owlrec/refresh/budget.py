"""What a refresh asks: calls go where drift times activity is greatest, ties to the smaller id.

A long backlog takes several calls, one per partition, of which each is worth less than the one before: less is unread
by then. So the budget may end in the middle of a backlog, and the rest waits.

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

# A partition to freeze.
DUE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("partition", pa.int32()),  # which of the user's, from 0
        ("end", pa.int32()),  # how much of the short term is read once it is
        ("reason", pa.string()),
        ("drift", pa.float32()),
        ("priority", pa.float64()),
    ]
)
_AT_ONCE = 1 << 20  # candidates that are sorted in memory


@dataclass(frozen=True)
class Cut:
    """The last partition that is asked about."""

    priority: float
    user_id: int
    partition: int

    def admits(self, due: pa.Table) -> np.ndarray:
        """Which rows of DUE are asked about: bool [n]."""
        priority, ids, partition = (due[name].to_numpy() for name in ("priority", "user_id", "partition"))
        earlier = (ids < self.user_id) | ((ids == self.user_id) & (partition <= self.partition))
        return (priority > self.priority) | ((priority == self.priority) & earlier)


EVERYONE = Cut(-1.0, 0, 0)  # priorities are never negative
NOBODY = Cut(np.inf, 0, 0)


def rank_digits(due: pa.Table) -> np.ndarray:
    """The rank of candidates (DUE) as nine digits of 16 bits: int64 [n, 9], smaller ones first.

    The bits of a float that is not negative ascend as it does: four digits of the priority, inverted, four of the id,
    one of the partition.
    """
    priority = np.abs(due["priority"].to_numpy())  # -0.0 is 0.0
    keys = [~priority.view(np.uint64), due["user_id"].to_numpy().view(np.uint64) ^ np.uint64(1 << 63)]
    digits = [key >> np.uint64(shift) & np.uint64(0xFFFF) for key in keys for shift in (48, 32, 16, 0)]
    return np.stack([*digits, due["partition"].to_numpy().astype(np.uint64)], axis=1).astype(np.int64)


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
    priority, ids, partition = (due[name].to_numpy() for name in ("priority", "user_id", "partition"))
    row = np.lexsort((partition, ids, -priority))[n - 1]
    return Cut(float(priority[row]), int(ids[row]), int(partition[row]))
