import numpy as np
import pytest

from owlrec_decoding.simulate import Curve, Load, Trace, play, play_oracle, play_plain, table_curve


def trace(rates: list[float], depth: int = 16) -> Trace:
    rng = np.random.default_rng(2)
    rate = rng.choice(rates, size=512)
    return Trace(np.cumprod(np.repeat(rate[:, None], depth, axis=1), axis=1), rng.integers(2, depth + 1, size=512))


def sharp(tokens: np.ndarray, rows: int, context: float) -> np.ndarray:
    return np.maximum(1.0, np.asarray(tokens) / 295.0)


GPU = table_curve(
    [1, 128, 256, 512, 1024, 2048],
    [0.005, 0.0057, 0.0067, 0.0089, 0.0181, 0.0342],
    {64: {255: 0.0015, 1023: 0.0038}, 256: {255: 0.0042, 1023: 0.0117}},
    fixed_s=0.0007,
)
CPU = table_curve([1, 4, 16, 64], [0.025, 0.034, 0.063, 0.206])
REFRESH = [0.0, 0.35, 0.6, 0.8, 0.95]
CELLS = [
    (curve, rows, context, rates)
    for curve in (sharp, GPU, CPU)
    for rows, context in ((1, 1023), (64, 255), (256, 1023))
    for rates in (REFRESH, [0.0, 0.0, 0.2])
]


@pytest.mark.parametrize(("curve", "rows", "context", "rates"), CELLS)
def test_the_controller_is_near_the_oracle_and_follows_a_slow_down(
    curve: Curve, rows: int, context: int, rates: list[float]
) -> None:
    drafts, load = trace(rates), Load(rows, context, mixed=min(0.5, rows / 512), prefill=512)
    ran = play(curve, drafts, load, 800, noise=0.03, slower_from=500)
    best, plain = play_oracle(curve, drafts, load, 800), play_plain(curve, load, 800)
    assert ran.rate(0, 500) >= 0.95 * best.rate(0, 500)
    assert ran.rate(0, 500) >= 0.98 * plain.rate(0, 500)
    assert 3 * ran.rate(700) >= 0.95 * best.rate(700)


def test_the_oracle_is_the_best_of_all_constant_choices() -> None:
    """One row whose drafts are all alike: its rate is that of the best number of drafts."""
    alike = Trace(np.cumprod(np.full((8, 6), 0.7), axis=1), np.full(8, 6))
    curve = table_curve([1, 2, 8], [1.0, 1.2, 4.0])
    by_hand = max(
        (1 + sum(0.7**i for i in range(1, n + 1))) / float(curve(np.array([1 + n]), 1, 0)[0]) for n in range(7)
    )
    assert play_oracle(curve, alike, Load(1), 20).rate() == pytest.approx(by_hand)


def test_the_oracle_weighs_a_step_by_the_rate_of_the_run() -> None:
    """Two kinds of steps, half and half: certain drafts, and ones of .3 at a price of a quarter of a step. Alone the
    second would be drafted (1.3 / 1.25 > 1), beside the first, which earns 1.6 tokens a second, they are not."""
    two = Trace(np.array([[1.0], [0.3]]), np.ones(2, np.int64))
    curve = table_curve([1, 2, 3], [1.0, 1.25, 1.5])
    played = play_oracle(curve, two, Load(1), 400, sample=400)
    assert set(played.seconds[played.tokens == 1.0]) == {1.0}
    assert set(played.tokens) == {1.0, 2.0}


def test_a_table_is_read_between_its_points_and_beyond() -> None:
    curve = table_curve([1, 3], [1.0, 2.0], {2: {100: 1.0, 200: 2.0}, 4: {100: 3.0, 200: 6.0}}, fixed_s=0.5)
    np.testing.assert_allclose(curve(np.array([1, 2, 5]), 0, 0), np.array([1.0, 1.5, 3.0]) + 0.5)
    assert float(curve(np.array([1]), 3, 150)[0]) == pytest.approx(1.5 + 3.0)  # between 1.5 and 4.5
    assert float(curve(np.array([1]), 1, 100)[0]) == pytest.approx(1.5 + 0.5)  # half of two rows
    assert float(curve(np.array([1]), 5, 300)[0]) == pytest.approx(1.5 + 12.0)  # 3 at two rows, 9 at four
