import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec_decoding.controller import Controller, StepTimes, allocate


def mixed(tokens: np.ndarray | float) -> np.ndarray:
    """Free up to 4 tokens, then a quarter of a step each."""
    return 1.0 + 0.25 * np.maximum(np.asarray(tokens, dtype=float) - 4, 0)


def running(seconds: float = 1.0, per_token: float = 0.0, *, rows: int = 4, max_step_tokens: int = 1000) -> Controller:
    """A controller that has seen plain steps up to 64 tokens."""
    measured = [1, 4, 16, 64]
    times = StepTimes(measured, [seconds + (n - 1) * per_token for n in measured])
    controller = Controller(times, max_draft=4, max_step_tokens=max_step_tokens)
    for _ in range(5):
        feed(controller, rows, 0, seconds + (rows - 1) * per_token)
    return controller


def feed(controller: Controller, rows: int, drafts: int, seconds: float, emitted: int | None = None) -> None:
    controller.observe(rows, drafts, seconds, prefill=0, context=0, emitted=rows if emitted is None else emitted)


def test_likeliest_tokens_of_all_rows_are_taken_while_they_pay() -> None:
    # Two rows: a step of 2 tokens takes 1. Drafts 1 and 2 are free (4 tokens), each further one costs 1/4 of a step.
    #   0.9 0.8 (free): (2 + 1.7) / 1 = 3.70.  third, 0.7: 4.4 / 1.25 = 3.52 < 3.70: not taken.
    seconds = mixed(2 + np.arange(7))
    assert list(allocate(np.array([[0.9, 0.7, 0.1], [0.8, 0.2, 0.0]]), np.array([3, 2]), seconds)) == [1, 1]
    # Three likely tokens in one row: 0.95 + 0.9 are free, and the two go to that row alone.
    assert list(allocate(np.array([[0.95, 0.9, 0.85], [0.1, 0.05, 0.0]]), np.array([3, 2]), seconds)) == [2, 0]


def test_no_more_is_drafted_than_was_found_or_has_a_price() -> None:
    chance = np.full((2, 4), 0.9)
    assert list(allocate(chance, np.array([4, 2]), np.ones(9))) == [4, 2]
    assert allocate(chance, np.array([4, 2]), np.ones(4)).sum() == 3
    assert allocate(chance, np.array([0, 0]), np.ones(1)).sum() == 0


def test_nothing_is_drafted_where_each_token_costs_its_share() -> None:
    assert allocate(np.full((4, 4), 0.999), np.full(4, 4), 4.0 + np.arange(17)).sum() == 0


def test_a_number_of_tokens_can_be_asked_for_at_any_price() -> None:
    shares = allocate(np.full((4, 4), 0.5), np.full(4, 4), 4.0 + 10 * np.arange(17), at_least=5)
    assert shares.sum() == 5


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(0.05, 3.0), min_size=12, max_size=12),
)
def test_allocation_is_as_fast_as_the_best_of_all_allocations(rates: list[list[float]], rises: list[float]) -> None:
    chance = np.cumprod(np.array(rates), axis=1)
    rows = len(chance)
    seconds = np.cumsum([1.0, *rises])[: 3 * rows + 1]

    def speed(shares: np.ndarray) -> float:
        return float((rows + sum(chance[r, : shares[r]].sum() for r in range(rows))) / seconds[shares.sum()])

    best = max(speed(np.array(s)) for s in np.ndindex(*(4,) * rows))
    assert speed(allocate(chance, np.full(rows, 3), seconds)) >= best / 1.005  # less than that is left to plain steps


def test_floor_is_a_share_of_the_price_of_a_token_in_tokens() -> None:
    # A step of 8 rows takes 1.07 s, and .01 s more for each token: a token costs .075 tokens.
    controller = running(per_token=0.01, rows=8)
    assert controller.floor(8) == pytest.approx(0.7 * 8 * 0.01 / 1.07, rel=0.2)
    assert running().floor(8) == pytest.approx(0.01, abs=0.02)


def test_what_surely_costs_more_is_not_searched_for() -> None:
    assert running().worth_searching(4)
    steep = Controller(StepTimes([1, 4, 16, 64], [1.0, 1.0, 1.0, 10.6]), max_draft=4, max_step_tokens=1000)
    for i in range(60):  # a knee at 16 tokens
        feed(steep, 16, i % 16, 1.0 + 0.2 * (i % 16))
    assert not steep.worth_searching(16)


def test_a_step_grows_by_at_most_half_beyond_what_was_seen() -> None:
    controller = running()
    chance, count = np.full((64, 4), 0.99), np.full(64, 4)
    assert controller.allocate(chance, count).sum() == int(1.5 * 64) + 1 - 64
    feed(controller, 64, 33, 1.0)
    assert controller.allocate(chance, count).sum() == int(1.5 * 97) + 1 - 64


def test_the_step_bound_is_kept() -> None:
    controller = running(max_step_tokens=5)
    assert controller.allocate(np.full((4, 4), 0.9), np.full(4, 4)).sum() == 1
    few = Controller(StepTimes([1, 64], [1.0, 1.0]), max_draft=4, max_step_tokens=1000, max_drafts=3)
    assert few.allocate(np.full((4, 4), 0.9), np.full(4, 4)).sum() == 3


def test_a_wrong_estimate_never_ends_drafting() -> None:
    """Drafts look dear, and are free."""
    controller = running(per_token=1.0)
    chance, count = np.full((4, 4), 0.9), np.full(4, 4)
    drafted = []
    for _ in range(800):
        shares = controller.allocate(chance, count) if controller.worth_searching(4) else np.zeros(4, int)
        drafted.append(int(shares.sum()))
        feed(controller, 4, drafted[-1], 1.0)
    assert min(drafted[-100:-50]) > 0


def test_one_slow_step_does_not_end_drafting() -> None:
    controller = running()
    chance, count = np.full((4, 4), 0.9), np.full(4, 4)
    drafted = 0
    for _ in range(300):
        n = int(controller.allocate(chance, count).sum())
        feed(controller, 4, n, 50.0 if n and not drafted else 1.0)
        drafted += n > 0
    assert drafted > 250


def test_steps_that_read_prompts_make_drafts_dearer() -> None:
    """A token costs nothing up to 64 tokens and a tenth of a step beyond; every second step reads 60."""
    controller = running(rows=16)
    for i in range(400):
        prefill, drafts = 60 * (i % 2), i % 7
        seconds = 1.0 + 0.1 * max(0, 16 + drafts + prefill - 64)
        controller.observe(16, drafts, seconds, prefill=prefill, context=0, emitted=16)
    chance, count = np.full((16, 2), 0.3), np.full(16, 2)
    # A draft costs half the tenth, .5 tokens at 16 tokens per 1.6 s.
    assert controller.allocate(chance, count).sum() == 0
    assert running(rows=16).allocate(chance, count).sum() == 32


def test_a_stretch_without_the_decoder_is_the_yardstick_of_a_long_run() -> None:
    controller = running()
    chance, count = np.full((4, 4), 0.9), np.full(4, 4)
    plain = 0
    for _ in range(2048 - 5):
        if not controller.worth_searching(4):
            plain += 1
            feed(controller, 4, 0, 1.0)
            continue
        n = int(controller.allocate(chance, count).sum())
        feed(controller, 4, n, 1.0, emitted=4 + n)
    assert plain == 32
    assert controller.yardstick["plain_tokens"] / controller.yardstick["plain_s"] == 4
    assert controller.yardstick["drafting_tokens"] / controller.yardstick["drafting_s"] > 10
    assert controller.worth_searching(4)


def test_drafting_that_was_slower_than_the_yardstick_pauses_until_the_next() -> None:
    """Drafts promise much and give nothing: chances that are wrong by far, which no step time tells."""
    controller = running()
    chance, count = np.full((4, 4), 0.9), np.full(4, 4)
    drafted = []
    for _ in range(3 * 2048):
        n = int(controller.allocate(chance, count).sum()) if controller.worth_searching(4) else 0
        feed(controller, 4, n, 1.3 if n else 1.0)
        drafted.append(n > 0)
    assert sum(drafted[:2048]) > 1500
    assert sum(drafted[2048:]) < 100
