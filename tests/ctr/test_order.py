"""An epoch's order: every row once, equal work for all ranks, any position entered again."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.ctr import batches as order
from owlrec.ctr.batches import Step, epoch_steps, scan_steps


def rows_of(step: Step, sizes: tuple[int, ...]) -> list[int]:
    """The rows of a step, counted through all shards."""
    numbers = [sum(sizes[:shard]) + row for shard, a, b in step.window for row in range(a, b)]
    return [numbers[i] for i in step.rows.tolist()]


def epoch(sizes: tuple[int, ...], *rest: int) -> list[list[int]]:
    return [rows_of(step, sizes) for step in epoch_steps(sizes, *rest)]


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60)
def test_ranks_share_each_batch_without_overlap_and_in_equal_parts(n: int, batch_size: int, world: int) -> None:
    sizes = (n // 3, n - n // 3)
    shares = [epoch(sizes, batch_size, 5, 1, rank, world) for rank in range(world)]
    assert {tuple(map(len, share)) for share in shares} == {tuple(map(len, shares[0]))}
    dealt = [row for share in shares for batch in share for row in batch]
    assert len(set(dealt)) == len(dealt) == n - n % world
    if batch_size % world == 0:
        together = [sorted(row for share in shares for row in share[i]) for i in range(len(shares[0]))]
        alone = [sorted(batch) for batch in epoch(sizes, batch_size, 5, 1)]
        assert together[:-1] == alone[: len(together)][:-1]


def test_order_follows_from_seed_and_epoch_and_not_from_the_shards() -> None:
    first, again, next_epoch, other_seed = (
        epoch(sizes, 32, seed, number)
        for sizes, seed, number in (((100,), 1, 1), ((30, 0, 70), 1, 1), ((100,), 1, 2), ((100,), 2, 1))
    )
    assert first == again
    assert len({str(o) for o in (first, next_epoch, other_seed)}) == 3
    assert [len(b) for b in first] == [32, 32, 32, 4]


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(order, "WINDOW", 64)
    return 64


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(1, 20), st.integers(1, 3))
@settings(max_examples=60)
def test_of_more_rows_than_a_window_each_rank_has_shards_of_its_own(
    sizes: list[int], batch_size: int, world: int
) -> None:
    before, order.WINDOW = order.WINDOW, 64
    try:
        n, steps = sum(sizes), [list(epoch_steps(sizes, batch_size, 3, 2, rank, world)) for rank in range(world)]
    finally:
        order.WINDOW = before
    if n <= 64:
        return
    rows = [[row for step in rank_steps for row in rows_of(step, tuple(sizes))] for rank_steps in steps]
    assert [len(rank_steps) for rank_steps in rows] == [n // world] * world
    assert len({row for rank_steps in rows for row in rank_steps}) == n // world * world
    assert len({tuple(len(step.rows) for step in rank_steps) for rank_steps in steps}) == 1
    for rank, rank_steps in enumerate(rows):
        assert sorted(rank_steps) == list(range(rank * (n // world), (rank + 1) * (n // world)))
    for step in steps[0]:
        assert sum(b - a for _, a, b in step.window) <= 64
        assert len(step.rows) <= max(1, batch_size // world)


def test_shards_come_in_another_order_each_epoch_and_once_only(small_window: int) -> None:
    sizes = (20,) * 10
    epochs = [list(epoch_steps(sizes, 8, 3, number)) for number in (1, 2)]
    windows = [list(dict.fromkeys(step.window for step in steps)) for steps in epochs]
    assert [len(window) for window in windows[0]] == [4, 4, 4, 1]  # 20 + 20 + 20 + 4, 16 + 20 + 20 + 8, ...
    orders = [[shard for window in epoch_windows for shard, *_ in window] for epoch_windows in windows]
    assert [sorted(set(o)) for o in orders] == [list(range(10))] * 2
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert epochs[0][0].rows.tolist() != sorted(epochs[0][0].rows.tolist())


def test_a_position_in_the_epoch_can_be_entered_again(small_window: int) -> None:
    sizes = (50, 150)
    steps = list(epoch_steps(sizes, 30, 3, 1))
    assert [len(step.rows) for step in steps] == [30] * 6 + [20]
    for again, step in zip(islice(epoch_steps(sizes, 30, 3, 1), 4, None), steps[4:], strict=True):
        assert again.window == step.window
        assert torch.equal(again.rows, step.rows)


@pytest.mark.parametrize(("start", "end"), [(0, 200), (0, 0), (63, 65), (49, 199)])
def test_a_scan_takes_rows_in_their_order(small_window: int, start: int, end: int) -> None:
    sizes = (50, 0, 150)
    rows = [rows_of(step, sizes) for step in scan_steps(sizes, start, end, 30)]
    assert [row for step in rows for row in step] == list(range(start, end))
    assert all(len(step) <= 30 for step in rows)
