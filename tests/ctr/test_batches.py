"""Batches assembled ahead: in the order of the steps, no further than asked for, errors raised where they belong."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from owlrec.ctr.batches import SplitBatches, SplitTensors, ahead, epoch_steps, scan_steps
from owlrec.ctr.experiment import Trial
from owlrec.ctr.features import Split


def waiting_threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_elements_come_in_order_and_the_thread_ends() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    assert list(ahead(iter([]), 3)) == []
    assert waiting_threads() == 0


def test_the_source_is_read_so_far_ahead_and_no_further() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            yield number

    with closing(ahead(source(), 3)) as numbers:
        assert next(numbers) == 0
        time.sleep(0.3)
        assert len(read) == 5  # one taken, three that wait, one in the thread's hand
    assert waiting_threads() == 0


def test_an_error_arrives_after_what_came_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    numbers = ahead(source(), 3)
    assert next(numbers) == 1
    with pytest.raises(ValueError, match="broken"):
        next(numbers)
    assert waiting_threads() == 0


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in vars(value).values() for t in tensors(part)] if hasattr(value, "__dataclass_fields__") else []


def test_batches_of_shards_are_those_of_the_whole(toy_world: Any) -> None:
    data = toy_world.data
    whole = data.features.splits["train"].whole()
    sizes = (700, 0, 900, 600)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    split = Split([whole.take(slice(a, a + n)) for a, n in zip(starts, sizes, strict=True)], sizes)
    tables = data.tables(Trial(backbone="din", arm="knowledge", seed=0))
    one, several = SplitBatches(Split.of(whole), tables, "cpu"), SplitBatches(split, tables, "cpu")
    for steps in (lambda s: epoch_steps(s, 64, 1, 1), lambda s: scan_steps(s, 650, 1700, 100)):
        pairs = list(zip(one.batches(steps((2200,))), several.batches(steps(sizes)), strict=True))
        assert len(pairs) > 10
        for (batch, targets), (other, other_targets) in pairs:
            assert torch.equal(targets.labels, other_targets.labels)
            both = list(zip(tensors(batch), tensors(other), strict=True))
            assert len(both) == 15
            assert all(torch.equal(a, b) for a, b in both)


def test_a_batch_names_each_item_once(toy_world: Any) -> None:
    samples = toy_world.data.features.splits["test"].whole()
    batch = SplitTensors(samples, None, "cpu").batch(torch.arange(0, 400, 3))
    assert batch.distinct is not None
    rows = batch.distinct.rows
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows[batch.distinct.target_rows], batch.items)
    assert torch.equal(rows[batch.distinct.history_rows], batch.history)
