import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec_decoding.controller import Controller, StepTimes


def seasoned(
    curve: StepTimes, rows: int, *, max_draft: int = 4, max_step_tokens: int = 1000, seconds: float | None = None
) -> Controller:
    """A controller past its first plain steps, whose steps with drafts cost the same as without."""
    controller = Controller(curve, max_draft=max_draft, max_step_tokens=max_step_tokens)
    controller.drafted = curve.scaled(1.0)
    for _ in range(3):
        controller.observe(rows, 0, seconds or float(curve(rows)))
    return controller


FLAT = StepTimes([1, 1024], [1.0, 1.0])
STEEP = StepTimes([1, 2, 1024], [1.0, 2.0, 1024.0])  # compute-bound: twice the tokens, twice the time
MIXED = StepTimes([1, 4, 1024], [1.0, 1.0, 1.0 + 1020 * 0.25])  # free up to 4 tokens, then a quarter of a step each


def test_curve_is_a_line_through_its_points_and_goes_on_beyond() -> None:
    curve = StepTimes([1, 4, 16], [1.0, 1.0, 4.0])
    np.testing.assert_allclose(curve(np.array([1, 2, 4, 8, 16, 32])), [1, 1, 1, 2, 4, 8])


def test_curve_follows_observed_steps_near_them() -> None:
    curve = StepTimes([1, 1024], [1.0, 1.0])
    for _ in range(50):
        curve.observe(8, 1.5)
        curve.observe(64, 1.0)
    assert float(curve(8)) == pytest.approx(1.5, rel=0.01)
    assert float(curve(64)) == pytest.approx(1.0, rel=0.01)


def test_one_hiccup_hardly_moves_a_settled_curve() -> None:
    curve = StepTimes([1, 1024], [1.0, 1.0])
    for _ in range(50):
        curve.observe(8, 1.0)
    curve.observe(8, 100.0)
    assert float(curve(8)) <= 1.1 + 1e-9


def test_a_curve_measured_on_a_busy_machine_is_put_right_as_a_whole() -> None:
    curve = StepTimes([1, 4, 1024], [3.0, 3.0, 3.0 * 256])  # three times too slow
    for _ in range(20):
        curve.observe(4, 1.0)
    np.testing.assert_allclose(curve(np.array([4, 1024])), [1, 256], rtol=0.2)
    assert float(curve(1)) < float(curve(1024)) / 200  # the whole curve moved


def test_free_tokens_are_all_drafted() -> None:
    chance = np.array([[0.9, 0.5, 0.1, 0.01], [0.3, 0.2, 0.1, 0.05]])
    assert list(seasoned(FLAT, 2).allocate(chance, np.array([4, 2]))) == [4, 2]


def test_nothing_is_drafted_where_each_token_costs_its_share() -> None:
    chance = np.full((4, 4), 0.999)
    assert list(seasoned(STEEP, 4).allocate(chance, np.full(4, 4))) == [0, 0, 0, 0]
    assert not seasoned(STEEP, 4).worth_searching(4)


def test_likeliest_tokens_of_all_rows_are_taken_while_they_pay() -> None:
    # Two rows: a step of 2 tokens takes 1. Drafts 1 and 2 are free (4 tokens), each further one costs 1/4 of a step.
    #   0.9 0.8 (free): (2 + 1.7) / 1 = 3.70.  third, 0.7: 4.4 / 1.25 = 3.52 < 3.70: not taken.
    chance = np.array([[0.9, 0.7, 0.1, 0.0], [0.8, 0.2, 0.0, 0.0]])
    assert list(seasoned(MIXED, 2).allocate(chance, np.array([4, 2]))) == [1, 1]
    # Three likely tokens in one row: 0.95 + 0.9 are free, and the two go to that row alone.
    chance = np.array([[0.95, 0.9, 0.85, 0.8], [0.1, 0.05, 0.0, 0.0]])
    assert list(seasoned(MIXED, 2).allocate(chance, np.array([4, 2]))) == [2, 0]


def test_verification_that_costs_more_than_it_gains_is_left_out() -> None:
    controller = seasoned(FLAT, 1)
    controller.drafted = FLAT.scaled(2.0)
    assert list(controller.allocate(np.array([[0.5, 0.25, 0.1, 0.05]]), np.array([4]))) == [0]  # 1.9 tokens in 2 s
    assert list(controller.allocate(np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([4]))) == [4]  # 4 tokens in 2 s


def test_step_bound_is_kept() -> None:
    controller = seasoned(FLAT, 2, max_step_tokens=5)
    assert controller.allocate(np.full((2, 4), 0.9), np.full(2, 4)).sum() == 3


def test_floor_is_the_price_of_a_token_in_tokens() -> None:
    # Beyond the knee at 4 tokens a draft costs 0.25 of a step that gives 8 tokens in 2 s: 0.25 * 8 / 2 = 1.
    assert seasoned(MIXED, 8).floor(8) == pytest.approx(1.0)
    assert seasoned(FLAT, 8).floor(8) == pytest.approx(0.01)


def test_first_steps_at_a_batch_size_are_plain_so_that_drafts_have_something_to_beat() -> None:
    controller = Controller(FLAT, max_draft=4, max_step_tokens=100)
    chance, count = np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([4])
    for _ in range(3):
        assert controller.allocate(chance, count).sum() == 0
        controller.observe(1, 0, 1.0)
    assert controller.allocate(chance, count).sum() == 4


def test_one_slow_first_step_with_drafts_does_not_end_drafting() -> None:
    controller = seasoned(FLAT, 1)
    chance, count = np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([4])
    drafted = 0
    for step in range(200):
        n = int(controller.allocate(chance, count).sum())
        controller.observe(1, n, 50.0 if n and not drafted else 1.0)
        drafted += n > 0
        if step == 20:
            assert drafted >= 2
    assert drafted > 150


def test_the_road_not_taken_is_tried_now_and_then() -> None:
    controller = seasoned(FLAT, 1)
    chance, count = np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([4])
    drafted = []
    for _ in range(600):
        n = int(controller.allocate(chance, count).sum())
        drafted.append(n)
        controller.observe(1, n, 1.0)
    assert 1 <= drafted.count(0) <= 4


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 5.0), min_size=3, max_size=3),
)
def test_allocation_is_as_fast_as_the_best_of_all_allocations(rates: list[list[float]], rises: list[float]) -> None:
    chance = np.cumprod(np.array(rates), axis=1)
    rows = len(chance)
    times = np.cumsum([1.0, *rises])
    curve = StepTimes([1, 4, 16, 64], times)
    controller = seasoned(curve, rows, max_draft=3)

    def speed(shares: np.ndarray) -> float:
        gained = sum(chance[r, : shares[r]].sum() for r in range(rows))
        return float((rows + gained) / curve(rows + shares.sum()))

    best = max(speed(np.array(s)) for s in np.ndindex(*(4,) * rows))
    assert speed(controller.allocate(chance, np.full(rows, 3))) == pytest.approx(best)


def test_wrong_curves_are_refused() -> None:
    with pytest.raises(ValueError, match="two points"):
        StepTimes([1], [1.0])
