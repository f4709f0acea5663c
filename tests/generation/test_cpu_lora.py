"""One product a run of rows, against one product a row."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from owlrec.generation.cpu_lora import _expand, _runs, _shrink

PLACES, WIDE, RANK, OUT = 3, 5, 4, 6
places_of_rows = st.lists(st.integers(-1, PLACES - 1), min_size=1, max_size=12)


@given(places_of_rows, st.integers(0, PLACES - 1), st.sampled_from([3, 4]))
def test_each_row_meets_its_own_adapter_and_none_meets_nothing(places: list[int], empty: int, dims: int) -> None:
    random = torch.Generator().manual_seed(len(places))
    x = torch.randn(len(places), WIDE, generator=random)
    a, b = (torch.randn(PLACES, 1, *shape, generator=random) for shape in ((RANK, WIDE), (OUT, RANK)))
    a[empty], b[empty] = 0, 0
    stacked = (a, b) if dims == 4 else (a.squeeze(1), b.squeeze(1))
    between, y = torch.zeros(len(places), RANK), torch.ones(len(places), OUT + 3)
    runs = _runs(torch.tensor(places))
    _shrink(between, x, stacked[0], 0.5, runs)
    _expand(y[:, 2 : 2 + OUT], between, stacked[1], runs)
    for row, place in enumerate(places):
        expected = torch.ones(OUT + 3)
        if place >= 0:
            expected[2 : 2 + OUT] += 0.5 * b[place, 0] @ (a[place, 0] @ x[row])
        torch.testing.assert_close(y[row], expected, atol=1e-5, rtol=1e-5)


@given(places_of_rows)
def test_runs_cover_the_rows_that_have_an_adapter(places: list[int]) -> None:
    covered = np.full(len(places), -1)
    for start, end, place in _runs(torch.tensor(places)):
        assert (covered[start:end] == -1).all()
        covered[start:end] = place
    assert covered.tolist() == places


def test_numbers_stay_in_the_outputs_format() -> None:
    y, x = torch.zeros(2, OUT, dtype=torch.bfloat16), torch.ones(2, RANK)
    _expand(y, x, torch.ones(1, 1, OUT, RANK, dtype=torch.bfloat16), [(0, 2, 0)])
    assert y.dtype == torch.bfloat16
    assert y.eq(RANK).all()
