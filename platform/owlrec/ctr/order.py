"""The order in which an epoch reads its rows: a function of seed and epoch, so that any position can be entered again.

Rows are read in windows, each held in memory. Up to four million training rows are one window: they are shuffled at
once, and the ranks take turns within each batch, so that together they see the batches that one alone would. Of more
rows each rank has a range of its own, hence shards of its own but for the two at its ends; an epoch takes them in
random order and shuffles the rows of a window among each other. Users are spread over shards by hash, so neighboring
shards are as good a draw as any, and a node's cache sees each of its shards once in an epoch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from owlrec.ctr.features import Segment

WINDOW = 1 << 22  # rows that are shuffled among each other


@dataclass(frozen=True)
class Step:
    """The rows of one batch, as positions in a window. Steps of one window share its tuple of segments."""

    window: tuple[Segment, ...]
    rows: Tensor  # int64 [b]


def epoch_steps(
    sizes: Sequence[int], batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Step]:
    """This rank's steps of an epoch over shards of `sizes` rows; all ranks together have `batch_size` rows in a step.

    All ranks have equally many steps and rows. Where the ranks do not divide a batch, it is smaller, and up to
    world_size - 1 rows of the epoch sit out.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    n, of_rank = sum(sizes), max(1, batch_size // world_size)
    if n <= WINDOW:
        window = tuple(segments(sizes, 0, n))
        kept = torch.randperm(n, generator=generator)[: n - n % world_size]
        for batch in kept.split(of_rank * world_size):
            if len(batch):
                yield Step(window, batch[rank::world_size])
        return
    share = n // world_size
    mine = list(segments(sizes, rank * share, (rank + 1) * share))
    order = [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
    for window in _windows(order, max(of_rank, WINDOW // of_rank * of_rank)):
        rows = torch.randperm(sum(b - a for _, a, b in window), generator=generator)
        for batch in rows.split(of_rank):
            yield Step(window, batch)


def scan_steps(sizes: Sequence[int], start: int, end: int, rows_per_step: int) -> Iterator[Step]:
    """The rows from `start` up to `end`, in their order."""
    for window in _windows(segments(sizes, start, end), max(rows_per_step, WINDOW // rows_per_step * rows_per_step)):
        for rows in torch.arange(sum(b - a for _, a, b in window)).split(rows_per_step):
            yield Step(window, rows)


def segments(sizes: Sequence[int], start: int, end: int) -> Iterator[Segment]:
    """The rows from `start` up to `end`, counted through all shards."""
    before = 0
    for shard, size in enumerate(sizes):
        a, b = max(start - before, 0), min(end - before, size)
        if a < b:
            yield shard, a, b
        before += size


def _windows(of: Iterable[Segment], rows: int) -> Iterator[tuple[Segment, ...]]:
    """The same rows in windows of `rows`, the last one smaller."""
    window: list[Segment] = []
    room = rows
    for shard, start, end in of:
        while start < end:
            taken = min(room, end - start)
            window.append((shard, start, start + taken))
            start, room = start + taken, room - taken
            if not room:
                yield tuple(window)
                window, room = [], rows
    if window:
        yield tuple(window)
