import numpy as np
import pytest

from owlrec_decoding.controller import StepTimes


def knee(tokens: float, context: float = 0.0) -> float:
    """Flat to 256 tokens, then a 50th of a second for each 1,000; 10 ns for a token of context."""
    return 0.005 + 2e-5 * max(0.0, tokens - 256) + 1e-8 * context


def fitted(steps: int = 300, noise: float = 0.0, context: float = 0.0) -> StepTimes:
    rng = np.random.default_rng(0)
    times = StepTimes([1, 64], [knee(1), knee(64)])
    for _ in range(steps):
        tokens = int(rng.integers(1, 1024))
        at = context * float(rng.random())
        times.observe(tokens, at, knee(tokens, at) * (1 + noise * rng.standard_normal()))
    return times


def test_a_knee_is_found() -> None:
    np.testing.assert_allclose(
        fitted()(np.array([1, 128, 512, 1000])), [knee(n) for n in (1, 128, 512, 1000)], rtol=0.02
    )


def test_noise_is_averaged_out() -> None:
    times = fitted(noise=0.03)
    np.testing.assert_allclose(times(np.array([64, 400, 900])), [knee(n) for n in (64, 400, 900)], rtol=0.05)


def test_context_costs_by_itself() -> None:
    times = fitted(context=500_000)
    for tokens, context in ((64, 0), (64, 400_000), (900, 200_000)):
        assert float(times(tokens, context)[0]) == pytest.approx(knee(tokens, context), rel=0.02)


def test_beyond_what_was_seen_the_last_slope_goes_on() -> None:
    assert float(fitted()(10_000)[0]) == pytest.approx(knee(10_000), rel=0.1)


def test_a_step_never_gets_cheaper_with_more_tokens() -> None:
    rng = np.random.default_rng(1)
    times = StepTimes([1], [1.0])
    for _ in range(200):
        times.observe(int(rng.integers(1, 600)), 0, float(rng.uniform(0.5, 2)))
    assert (np.diff(times(np.arange(1, 5000))) >= 0).all()


def test_a_machine_that_slows_down_is_followed_at_sizes_not_tried_since() -> None:
    times = fitted()
    for _ in range(30):
        times.observe(64, 0, 3 * knee(64))
    assert float(times(64)[0]) == pytest.approx(3 * knee(64), rel=0.05)
    assert float(times(900)[0]) == pytest.approx(3 * knee(900), rel=0.2)


def test_a_knee_that_becomes_steeper_is_followed() -> None:
    rng = np.random.default_rng(2)
    times = fitted()
    for _ in range(200):
        tokens = int(rng.integers(1, 1024))
        times.observe(tokens, 0, 0.005 + 6e-5 * max(0, tokens - 256))
    np.testing.assert_allclose(times(np.array([64, 1000])), [0.005, 0.005 + 6e-5 * 744], rtol=0.2)


def test_one_hiccup_hardly_moves_the_fit() -> None:
    times = fitted()
    before = float(times(300)[0])
    times.observe(300, 0, 100 * knee(300))
    assert float(times(300)[0]) == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize(("tokens", "seconds"), [([], []), ([1, 2], [1.0, 0.0])])
def test_steps_that_were_not_measured_are_refused(tokens: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="measured"):
        StepTimes(tokens, seconds)
