"""Batches of a split, assembled by a thread ahead of the training step, in pinned memory for a GPU.

Assembling a batch (ranges of behaviors, distinct items and ids, vectors gathered from mapped shards) is work for the
CPU and reads from disk or from an object store; within the step it would leave a GPU idle. The thread takes steps
in order and uses no randomness, so it does not change results.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from owlrec.ctr.features import RESERVED, SampleFeatures, Segment, Split, liked
from owlrec.ctr.knowledge_tables import Cosines, Form, Strata, VectorTable, refuse_non_finite, similarity_features
from owlrec.ctr.model import Batch, BatchVectors, Codes, DistinctCodes, DistinctItems

# ---------------------------------------------------------------------------------------------------------------- order
# The order in which an epoch reads its rows is a function of seed and epoch, so training can resume at any position.
#
# Rows are read in windows, each held in memory. Up to four million training rows are one window: they are shuffled
# together, and the ranks take turns within each batch, so together they see the same batches as a single rank. With
# more rows, each rank has its own range, and so its own shards except the two at its ends. An epoch takes windows in
# random order and shuffles the rows within a window. Users are spread over shards by hash, so neighboring shards are a
# fair sample, and a node's cache reads each of its shards once per epoch.


WINDOW = 1 << 22  # rows that are shuffled together


@dataclass(frozen=True)
class Step:
    """Rows of one batch, as positions in a window. Steps of one window share its tuple of segments."""

    window: tuple[Segment, ...]
    rows: Tensor  # int64 [b]


def epoch_steps(
    sizes: Sequence[int], batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Step]:
    """This rank's steps of an epoch over shards of `sizes` rows; all ranks together have `batch_size` rows per step.

    All ranks have the same number of steps and rows. If the ranks do not divide a batch, it is smaller, and up to
    world_size - 1 rows of the epoch are skipped.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    n, rank_rows = sum(sizes), max(1, batch_size // world_size)
    if n <= WINDOW:
        window = tuple(segments(sizes, 0, n))
        kept = torch.randperm(n, generator=generator)[: n - n % world_size]
        for batch in kept.split(rank_rows * world_size):
            if len(batch):
                yield Step(window, batch[rank::world_size])
        return
    share = n // world_size
    mine = list(segments(sizes, rank * share, (rank + 1) * share))
    order = [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
    for window in _windows(order, max(rank_rows, WINDOW // rank_rows * rank_rows)):
        rows = torch.randperm(sum(b - a for _, a, b in window), generator=generator)
        for batch in rows.split(rank_rows):
            yield Step(window, batch)


def scan_steps(sizes: Sequence[int], start: int, end: int, rows_per_step: int) -> Iterator[Step]:
    """Rows from `start` up to `end`, in order."""
    for window in _windows(segments(sizes, start, end), max(rows_per_step, WINDOW // rows_per_step * rows_per_step)):
        for rows in torch.arange(sum(b - a for _, a, b in window)).split(rows_per_step):
            yield Step(window, rows)


def segments(sizes: Sequence[int], start: int, end: int) -> Iterator[Segment]:
    """Rows from `start` up to `end`, counted through all shards."""
    before = 0
    for shard, size in enumerate(sizes):
        a, b = max(start - before, 0), min(end - before, size)
        if a < b:
            yield shard, a, b
        before += size


def _windows(parts: Iterable[Segment], rows: int) -> Iterator[tuple[Segment, ...]]:
    """The same rows in windows of `rows`; the last one may be smaller."""
    window: list[Segment] = []
    room = rows
    for shard, start, end in parts:
        while start < end:
            taken = min(room, end - start)
            window.append((shard, start, start + taken))
            start, room = start + taken, room - taken
            if not room:
                yield tuple(window)
                window, room = [], rows
    if window:
        yield tuple(window)


# -------------------------------------------------------------------------------------------------------------- batches


_AHEAD = 3  # maximum of batches waiting for the step

T = TypeVar("T")


@dataclass(frozen=True)
class Tables:
    """Vectors and semantic ids that a trial reads, one table per source; all vectors have one dimension."""

    users: tuple[VectorTable, ...]
    items: tuple[VectorTable, ...]
    form: Form = "vectors"
    user_slots: tuple[int, ...] = ()  # tables of each source (`source_slots`); () = one each
    item_ids: np.ndarray | None = None  # ItemFeatures.ids, to find the items of histories

    @property
    def dim(self) -> int:
        """Components of a vector; 0 if no vectors are read."""
        return 0 if self.form == "codes" else (*self.users, *self.items)[0].dim

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """ModelSpec's user_slots and item_slots."""
        users, items = self.user_slots or (1,) * len(self.users), (1,) * len(self.items)
        return {"user_slots": users, "item_slots": items}

    @cached_property
    def cosines(self) -> tuple[Cosines, ...]:
        """Of each source of items."""
        return tuple(map(Cosines, self.items))

    def shuffled(self, seed: int, users: Strata | None = None, items: Strata | None = None) -> "Tables":
        """Each table with its vectors and codes assigned to the wrong ids (KnowledgeTable.shuffled), within strata."""
        return replace(
            self,
            users=tuple(table.shuffled(seed, users) for table in self.users),
            items=tuple(table.shuffled(seed, items) for table in self.items),
        )


class SplitTensors:
    """Samples in memory, and their batches on a device."""

    def __init__(self, samples: SampleFeatures, tables: Tables | None, device: str) -> None:
        self.samples, self.tables, self.device = samples, tables, device

    def batch(self, rows: Tensor) -> Batch:
        """rows: int64 [b], on the CPU: row numbers of the samples."""
        return on_device(self.assembled(rows), self.device)

    def assembled(self, rows: Tensor) -> Batch:
        """The batch in this process's memory, in the narrow storage types."""
        at, samples = rows.numpy(), self.samples
        history, ratings, events = samples.histories.matrices(at)
        items = samples.items[at]
        batch = Batch(
            torch.from_numpy(items),
            torch.from_numpy(history),
            torch.from_numpy(ratings),
            torch.from_numpy(samples.fields[at]),
            torch.from_numpy(samples.numbers[at]),
            events=None if events is None else torch.from_numpy(events),
        )
        tables = self.tables
        if tables is None:
            return replace(batch, distinct=DistinctItems.of(items, history))
        times = None if samples.times is None else samples.times[at]
        user, user_codes = _known(tables.users, samples.user_ids[at], times, tables.form)
        found, past = self._found(samples.item_ids[at], history, times)
        item, similarities, codes = None, None, None
        if tables.items and tables.form != "codes":
            item = _vectors(tables.items, found, samples.item_ids[at])
            group = liked(ratings)
            each = [
                similarity_features(cosines.of(rows, others), (rows >= 0)[:, None] & (others >= 0), group)
                for cosines, rows, others in zip(tables.cosines, found, past, strict=True)
            ]
            similarities = torch.from_numpy(np.concatenate(each, axis=1))
        if tables.items and tables.form != "vectors":
            places, coded = pd.factorize(np.concatenate([found[0], past[0].reshape(-1)]))
            codes = DistinctCodes(tables.items[0].codes_at(coded), places)
        distinct = DistinctItems.of(items, history, codes)
        return replace(batch, user=user, item=item, similarities=similarities, user_codes=user_codes, distinct=distinct)

    def _found(
        self, ids: np.ndarray, history: np.ndarray, times: np.ndarray | None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Per source of items, rows of the targets' knowledge, int64 [b], and of the behaviors', int64 [b, L]; both as
        known before the sample.
        """
        assert self.tables is not None
        if not self.tables.items:
            return [], []
        if self.tables.item_ids is None:
            raise ValueError("knowledge of items needs Tables.item_ids, the ids of ItemFeatures.")
        there = history >= RESERVED
        past_ids = self.tables.item_ids[history[there] - RESERVED]
        past_times = None if times is None else np.broadcast_to(times[:, None], history.shape)[there]
        found, past = [], []
        for table in self.tables.items:
            found.append(table.find(ids, times))
            rows = np.full(history.shape, -1, dtype=np.int64)
            rows[there] = table.find(past_ids, past_times)
            past.append(rows)
        return found, past


@dataclass(frozen=True)
class Targets:
    """Labels of a batch and the weights of its rows."""

    labels: Tensor  # float32 [b], in [0, 1]
    weights: Tensor | None = None  # float32 [b]; None: all the same
    others: Tensor | None = None  # float32 [b, t], further labels, NaN if unknown

    @classmethod
    def of(cls, samples: SampleFeatures, rows: Tensor) -> "Targets":
        """Targets of some rows (int64 [b])."""
        at = rows.numpy()
        arrays = (samples.labels, samples.weights, samples.others)
        return cls(*(None if array is None else torch.from_numpy(array[at]) for array in arrays))  # type: ignore[arg-type]

    def loss(self, logits: Tensor) -> Tensor:
        """The weighted log-loss, summed over the rows and divided by their number, so that ranks add up; of several
        labels the sum, without those that are unknown.

        logits: float32 [b], or [b, 1 + t].
        """
        if self.others is None:
            return F.binary_cross_entropy_with_logits(logits, self.labels, self.weights)
        labels = torch.cat([self.labels[:, None], self.others], dim=1)
        known = ~labels.isnan()
        each = F.binary_cross_entropy_with_logits(logits, torch.where(known, labels, 0.0), reduction="none") * known
        return (each.sum(1) if self.weights is None else each.sum(1) * self.weights).mean()


class SplitBatches:
    """A split with its knowledge, and its batches on a device for any sequence of steps."""

    def __init__(self, split: Split, tables: Tables | None, device: str) -> None:
        self.split, self.tables, self.device = split, tables, device
        self._held: tuple[tuple[Segment, ...], SplitTensors] | None = None

    def batches(self, steps: Iterable[Step]) -> Generator[tuple[Batch, Targets], None, None]:
        """Batch and targets of each step, on the device. Close it if you do not read it to the end."""
        pinned = torch.device(self.device).type == "cuda"

        def assembled() -> Iterator[tuple[Batch, Targets]]:
            if pinned:
                torch.cuda.set_device(self.device)  # for this thread: pinning would otherwise initialize a second GPU
            for step in steps:
                samples = self._window(step.window)
                made = samples.assembled(step.rows), Targets.of(samples.samples, step.rows)
                yield (_mapped(made[0], Tensor.pin_memory), _mapped(made[1], Tensor.pin_memory)) if pinned else made

        with closing(ahead(assembled(), _AHEAD)) as ready:
            for batch, targets in ready:
                yield on_device(batch, self.device), on_device(targets, self.device)

    def _window(self, window: tuple[Segment, ...]) -> SplitTensors:
        if self._held is None or self._held[0] != window:
            self._held = None  # two windows at once would be twice the memory
            self._held = window, SplitTensors(self.split.window(window), self.tables, "cpu")
        return self._held[1]


def ahead(source: Iterator[T], n: int) -> Generator[T, None, None]:
    """Elements of `source`, read by a thread up to `n` elements ahead; its exceptions are raised here.

    Closing it stops the thread.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=n)
    ended = threading.Event()

    def put(last: bool, value: Any) -> None:
        while not ended.is_set():
            try:
                return ready.put((last, value), timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for value in source:
                put(False, value)
                if ended.is_set():
                    return
            put(True, None)
        except BaseException as error:
            put(True, error)

    thread = threading.Thread(target=read, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            last, value = ready.get()
            if last:
                if value is not None:
                    raise value
                return
            yield value
    finally:
        ended.set()
        thread.join()


def on_device(value: T, device: str) -> T:
    """A batch or its targets on the device, in compute types. From pinned memory the copy overlaps with the
    step.
    """
    moved: T = _mapped(value, lambda tensor: _widened(tensor.to(device, non_blocking=True)))
    return moved


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int32:
        return tensor.long()
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with all its tensors converted, including nested dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value


def _known(
    tables: Sequence[VectorTable], ids: np.ndarray, times: np.ndarray | None, form: Form
) -> tuple[BatchVectors | None, Codes | None]:
    """Vectors and semantic ids of users, as the form requires, each distinct row once; None without tables.

    times: int64 [b], ms; reads an id's newest knowledge that is strictly earlier, or the newest of all if None.
    """
    if not tables:
        return None, None
    knowledge = None
    if form != "codes":
        knowledge = _vectors(tables, [table.find(ids, times) for table in tables], ids)
    if form == "vectors":
        return knowledge, None
    places, rows = pd.factorize(tables[0].find(ids, times))
    return knowledge, Codes(torch.from_numpy(tables[0].codes_at(rows)), torch.from_numpy(places.astype(np.int64)))


def _vectors(tables: Sequence[VectorTable], found_rows: Sequence[np.ndarray], ids: np.ndarray) -> BatchVectors:
    """Vectors of one side, each distinct combination of rows once. found_rows: int64 [b] per table, from `find`."""
    inverse, _ = pd.factorize(found_rows[0])  # by hashes: np.unique would sort
    for rows in found_rows[1:]:
        another, distinct = pd.factorize(rows)
        inverse, _ = pd.factorize(inverse.astype(np.int64) * max(1, len(distinct)) + another)
    first = np.zeros(inverse.max(initial=-1) + 1, dtype=np.int64)
    first[inverse[::-1]] = np.arange(len(ids))[::-1]  # first occurrence of each distinct combination
    distinct_rows = [rows[first] for rows in found_rows]
    vectors = np.stack([t.vectors_at(rows) for t, rows in zip(tables, distinct_rows, strict=True)], axis=1)
    refuse_non_finite(vectors, ids[first])
    mask = np.stack([rows >= 0 for rows in distinct_rows], axis=1)
    return BatchVectors(*(torch.from_numpy(array) for array in (vectors, mask, inverse.astype(np.int64))))
