"""An epoch's order: every row once, the same batches however many ranks share them, any position found again."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.ctr.order import epoch_batches, shuffled_rows


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60)
def test_ranks_share_each_batch_without_overlap_and_in_equal_parts(n: int, batch_size: int, world: int) -> None:
    shares = [[b.tolist() for b in epoch_batches(n, batch_size, 5, 1, rank, world)] for rank in range(world)]
    assert {tuple(map(len, share)) for share in shares} == {tuple(map(len, shares[0]))}
    dealt = [row for share in shares for batch in share for row in batch]
    assert len(set(dealt)) == len(dealt) == n - n % world
    if batch_size % world == 0:
        together = [sorted(row for share in shares for row in share[i]) for i in range(len(shares[0]))]
        alone = [sorted(b.tolist()) for b in epoch_batches(n, batch_size, 5, 1)]
        assert together[:-1] == alone[: len(together)][:-1]


def test_order_follows_from_seed_and_epoch() -> None:
    first, again, next_epoch, other_seed = (
        [b.tolist() for b in epoch_batches(100, 32, seed, epoch)] for seed, epoch in ((1, 1), (1, 1), (1, 2), (2, 1))
    )
    assert first == again
    assert len({str(o) for o in (first, next_epoch, other_seed)}) == 3
    assert [len(b) for b in first] == [32, 32, 32, 4]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 257])
def test_large_sets_are_shuffled_in_windows_of_blocks(n: int) -> None:
    parts = [part.tolist() for part in shuffled_rows(n, 3, 1, window=64, block=8)]
    assert sorted(row for part in parts for row in part) == list(range(n))
    assert all(len(part) <= 64 for part in parts)
    assert all(len({row // 8 for row in part}) <= 8 for part in parts)  # few pages are open at a time
    if n == 257:
        assert parts[0] != sorted(parts[0])


def test_batches_cross_the_borders_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    import owlrec.ctr.order as order

    whole = shuffled_rows
    monkeypatch.setattr(order, "shuffled_rows", lambda n, seed, epoch: whole(n, seed, epoch, window=64, block=8))
    batches = list(epoch_batches(200, 30, 3, 1))
    assert [len(b) for b in batches] == [30] * 6 + [20]
    assert sorted(torch.cat(batches).tolist()) == list(range(200))
    assert all(
        torch.equal(a, b) for a, b in zip(islice(epoch_batches(200, 30, 3, 1), 4, None), batches[4:], strict=True)
    )
