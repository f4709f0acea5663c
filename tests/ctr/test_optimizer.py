"""Row-wise Adagrad by hand, what a step touches, two ranks' rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from two_ranks import be_a_rank, run_two_ranks  # type: ignore[import-not-found]

from owlrec.ctr.experiment import CTRConfig
from owlrec.ctr.trainer import Optimizers, RowwiseAdagrad, large_tables, mean_over_ranks


class TwoTables(nn.Module):
    def __init__(self, large: int, small: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Embedding(large, 4, padding_idx=0), nn.Embedding(small, 4)
        self.head = nn.Linear(8, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.large(rows), self.small(rows % 5)], dim=1)).squeeze(1)


CONFIG = CTRConfig(learning_rate=0.1)


def optimizers_of(model: nn.Module) -> Optimizers:
    return Optimizers(model, CONFIG, sparse_above_rows=10, table_learning_rate=0.5)


def test_two_steps_by_hand() -> None:
    table = nn.Parameter(torch.zeros(3, 2))
    optimizer = RowwiseAdagrad([table], lr=0.5)
    for rows, values in (([1, 1], [[1.0, 0.0], [2.0, 4.0]]), ([2, 1], [[1.0, 1.0], [0.0, 2.0]])):
        table.grad = torch.sparse_coo_tensor([rows], values, (3, 2), check_invariants=False)
        optimizer.step()
    # Row 1: gradients (3, 4) of mean square 12.5, then (0, 2) of 2, on top of which 14.5.
    by_hand = [[0, 0], [-0.5 * 3 / 12.5**0.5, -0.5 * 4 / 12.5**0.5 - 0.5 * 2 / 14.5**0.5], [-0.5, -0.5]]
    torch.testing.assert_close(table.detach(), torch.tensor(by_hand))


def test_a_row_alone_moves_as_torch_adagrad_moves_it() -> None:
    """With one component a row, row-wise Adagrad is Adagrad."""
    ours, theirs = (nn.Parameter(torch.ones(4, 1)) for _ in range(2))
    rowwise = RowwiseAdagrad([ours], lr=0.1)
    adagrad = torch.optim.Adagrad([theirs], lr=0.1, eps=1e-8)
    for seed in range(5):
        values = torch.randn(2, 1, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = (
            torch.sparse_coo_tensor([[seed % 4, (seed + 1) % 4]], values, (4, 1), check_invariants=False) for _ in "12"
        )
        rowwise.step()
        adagrad.step()
    torch.testing.assert_close(ours, theirs)


def test_a_step_touches_only_the_rows_that_it_uses() -> None:
    model = TwoTables(1000)
    optimizers = optimizers_of(model)
    assert list(optimizers.tables) == ["large.weight"]
    before, small = model.large.weight.detach().clone(), model.small.weight.detach().clone()
    used = [0, 3, 7, 7, 999]  # 0 is padding
    for _ in range(2):
        optimizers.zero_grad()
        model(torch.tensor(used)).square().sum().backward()
        assert model.large.weight.grad is not None
        assert model.large.weight.grad.is_sparse
        assert model.large.weight.grad._nnz() <= len(used)
        optimizers.step()
    moved = (model.large.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7, 999]
    assert not torch.equal(model.small.weight, small)
    sums = next(v for k, v in optimizers.state().items() if k.endswith("sum"))
    assert sums.nonzero().flatten().tolist() == [3, 7, 999]


def test_small_tables_stay_dense() -> None:
    model = TwoTables(10)
    assert large_tables(model, 10) == {}
    optimizers_of(model)
    model(torch.tensor([1, 2])).sum().backward()
    assert model.large.weight.grad is not None
    assert not model.large.weight.grad.is_sparse


def test_state_goes_on_where_it_stood() -> None:
    rows = torch.tensor([1, 4, 6, 19])

    def steps(optimizers: Optimizers, model: TwoTables, n: int) -> None:
        for _ in range(n):
            optimizers.zero_grad()
            model(rows).square().sum().backward()
            optimizers.step()

    whole = TwoTables(20)
    steps(optimizers_of(whole), whole, 7)
    first, second = TwoTables(20), TwoTables(20)
    before, after = optimizers_of(first), optimizers_of(second)
    steps(before, first, 3)
    second.load_state_dict(first.state_dict())
    after.restore({name: value.clone() for name, value in before.state().items()}, before.steps)
    steps(after, second, 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


GRADIENTS = (([5, 2], [[1.0, 2.0], [3.0, 4.0]]), ([2, 2, 0], [[1.0, 1.0], [1.0, 0.0], [8.0, 6.0]]))


def _run_rank(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        rows, values = GRADIENTS[rank]
        mean = mean_over_ranks(torch.sparse_coo_tensor([rows], values, (7, 2), check_invariants=False), 2)
        np.savez(folder / f"{rank}.npz", rows=mean.indices()[0].numpy(), values=mean.values().numpy())
    finally:
        dist.destroy_process_group()


@pytest.mark.process
def test_ranks_agree_on_the_mean_of_their_rows(tmp_path: Path) -> None:
    run_two_ranks(__file__, tmp_path)
    for rank in (0, 1):
        state = np.load(tmp_path / f"{rank}.npz")
        assert state["rows"].tolist() == [0, 2, 5]
        assert state["values"].tolist() == [[4.0, 3.0], [2.5, 2.5], [0.5, 1.0]]


def test_the_loss_falls_on_a_sparse_table() -> None:
    model = TwoTables(50)
    optimizers = optimizers_of(model)
    rows, labels = torch.arange(1, 50), (torch.arange(1, 50) % 3 == 0).float()
    losses = []
    for _ in range(60):
        optimizers.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(rows), labels)
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


if __name__ == "__main__":
    be_a_rank(_run_rank)
