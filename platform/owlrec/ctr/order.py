"""The order in which an epoch reads its rows: a function of seed and epoch, so that any position can be entered again.

Up to four million rows are shuffled at once. More are shuffled as a reader of memory-mapped files needs it: blocks of
neighbouring rows in random order, then the rows of a thousand blocks among each other, so that a batch's pages are few
and soon used again, and no rank holds a permutation of a billion numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WINDOW = 1 << 22  # rows that are shuffled among each other
BLOCK = 1 << 12  # rows that lie beside each other


def epoch_batches(
    n: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Tensor]:
    """int64 [b]: this rank's rows of each batch of an epoch, which all ranks together have `batch_size` of.

    The ranks take turns within a batch, so that together they see the batches that one alone would; where they do not
    divide it, it is smaller, and up to world_size - 1 rows of the epoch sit out.
    """
    size = max(1, batch_size // world_size) * world_size
    left = n - n % world_size
    waiting = torch.empty(0, dtype=torch.int64)
    for rows in shuffled_rows(n, seed, epoch):
        waiting = torch.cat([waiting, rows])[:left]
        ready = left if len(waiting) == left else len(waiting) // size * size
        for batch in waiting[:ready].split(size):
            if len(batch):
                yield batch[rank::world_size]
        waiting, left = waiting[ready:], left - ready


def shuffled_rows(n: int, seed: int, epoch: int, window: int = WINDOW, block: int = BLOCK) -> Iterator[Tensor]:
    """int64: the numbers below n, each once, in parts of at most `window` (a multiple of `block`)."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    if n <= window:
        yield torch.randperm(n, generator=generator)
        return
    for blocks in torch.randperm(-(-n // block), generator=generator).split(window // block):
        rows = (blocks.unsqueeze(1) * block + torch.arange(block)).flatten()
        rows = rows[rows < n]
        yield rows[torch.randperm(len(rows), generator=generator)]
