"""The controller played against a step-time curve and texts whose acceptance is known, beside an oracle.

The oracle knows the curve and every chance. Tokens per second of a long run are highest where each step maximizes its
expected tokens less what its seconds would earn elsewhere, at the run's own rate (Dinkelbach 1967); that rate is found
by iteration, and each step's best number of drafts by trying all. As the controller, it does not know which step will
read a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from owlrec_decoding.controller import Controller, StepTimes

Curve = Callable[[np.ndarray, int, float], np.ndarray]
"""Seconds of steps of so many tokens (an array), with so many rows, of a context of so many tokens each."""

MAX_STEP_TOKENS = 16384
_MEASURED = (1, 4, 16, 64, 256)  # tokens of the steps that an engine measures at start, without context


@dataclass(frozen=True)
class Trace:
    """Drafts of a row and step each. chance: float64 [n, depth], that a token is accepted with all before it. count:
    int64 [n], tokens drafted. accepted: int64 [n], how many of them were right, where that is known; None = as many as
    the chances say."""

    chance: np.ndarray
    count: np.ndarray
    accepted: np.ndarray | None = None

    def tokens(self, picked: np.ndarray, shares: np.ndarray) -> float:
        """Tokens that rows with the drafts `picked`, cut to `shares`, emit in a step."""
        if self.accepted is not None:
            return float(len(picked) + np.minimum(self.accepted[picked], shares).sum())
        offered = np.arange(self.chance.shape[1]) < shares[:, None]
        return float(len(picked) + self.chance[picked][offered].sum())


@dataclass(frozen=True)
class Load:
    """What an engine is given: decoding rows, each of `context` tokens, and `prefill` prompt tokens in a share
    `mixed` of the steps."""

    rows: int
    context: float = 500.0
    mixed: float = 0.0
    prefill: int = 0


@dataclass(frozen=True)
class Played:
    """Expected tokens and seconds of each step, float64 [steps]."""

    tokens: np.ndarray
    seconds: np.ndarray

    def rate(self, first: int = 0, end: int | None = None) -> float:
        """Tokens per second of the steps from `first` to `end`."""
        return float(self.tokens[first:end].sum() / self.seconds[first:end].sum())


def table_curve(
    tokens: Sequence[float],
    seconds: Sequence[float],
    attention: dict[int, dict[int, float]] | None = None,
    *,
    fixed_s: float = 0.0,
) -> Curve:
    """A curve through measured points, the last slope going on.

    attention: seconds by rows and context, bilinear between them; rows beyond and below in proportion. fixed_s: of
    every step, for launches and host work.
    """
    n, t = np.asarray(tokens, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    slope = (t[-1] - t[-2]) / (n[-1] - n[-2])

    def read(rows: int, context: float) -> float:
        if not attention:
            return 0.0
        points = [(r, _line(list(by), list(by.values()), context)) for r, by in sorted(attention.items())]
        return max(0.0, _line([0, *[r for r, _ in points]], [0.0, *[s for _, s in points]], rows))

    def curve(at: np.ndarray, rows: int, context: float) -> np.ndarray:
        at = np.asarray(at, dtype=np.float64)
        return np.interp(at, n, t) + slope * np.maximum(at - n[-1], 0.0) + read(rows, context) + fixed_s

    return curve


def play(
    curve: Curve,
    trace: Trace,
    load: Load,
    steps: int,
    *,
    noise: float = 0.0,
    slower_from: int | None = None,
    slower: float = 3.0,
    seed: int = 0,
) -> Played:
    """Runs a new controller for so many steps. noise: standard deviation of a step's time as it is observed, relative.
    slower_from: step from which everything takes `slower` times as long."""
    rng = np.random.default_rng([seed, 1])
    depth, rows = trace.chance.shape[1], load.rows
    controller = Controller(
        StepTimes(_MEASURED, [float(curve(np.array([n]), 0, 0.0)[0]) for n in _MEASURED]),
        max_draft=depth,
        max_step_tokens=MAX_STEP_TOKENS,
    )
    out = Played(np.zeros(steps), np.zeros(steps))
    for step, (picked, prefill) in enumerate(_steps(trace, load, steps, seed)):
        chance, count, shares = trace.chance[picked], trace.count[picked], np.zeros(rows, np.int64)
        if controller.worth_searching(rows):
            floor = controller.floor(rows)
            shares = controller.allocate(chance, np.minimum(count, (chance >= floor).sum(axis=1)))
        drafts = int(shares.sum())
        seconds = float(curve(np.array([rows + drafts + prefill]), rows, load.context)[0])
        seconds *= slower if slower_from is not None and step >= slower_from else 1.0
        tokens = trace.tokens(picked, shares)
        taken = max(0.1, 1 + noise * rng.standard_normal()) * seconds
        context = int(rows * load.context)
        controller.observe(rows, drafts, taken, prefill=prefill, context=context, emitted=round(tokens))
        out.tokens[step], out.seconds[step] = tokens, seconds
    return out


def play_oracle(curve: Curve, trace: Trace, load: Load, steps: int, *, sample: int = 48, seed: int = 0) -> Played:
    """The best allocation, known curve and chances, over the steps that `play` has with this seed; its rate is found
    on a sample of others."""
    rows, depth = load.rows, trace.chance.shape[1]
    tokens = rows + np.arange(min(rows * depth, MAX_STEP_TOKENS - rows) + 1)
    alone, beside = (curve(tokens + prefill, rows, load.context) for prefill in (0, load.prefill))
    seconds = (1 - load.mixed) * alone + load.mixed * beside
    gains = [_gain(trace, picked) for picked, _ in _steps(trace, load, sample, seed + 1)]
    rate, better = 0.0, float(rows / seconds[0])
    while better > rate * (1 + 1e-9):
        rate = better
        best = [int(np.argmax(gain - rate * seconds[: len(gain)])) for gain in gains]
        better = float(sum(g[b] for g, b in zip(gains, best, strict=True)) / sum(seconds[b] for b in best))
    out = Played(np.zeros(steps), np.zeros(steps))
    for step, (picked, prefill) in enumerate(_steps(trace, load, steps, seed)):
        gain = _gain(trace, picked)
        drafts = int(np.argmax(gain - rate * seconds[: len(gain)]))
        out.tokens[step], out.seconds[step] = gain[drafts], (beside if prefill else alone)[drafts]
    return out


def play_plain(curve: Curve, load: Load, steps: int, *, seed: int = 0) -> Played:
    """The same steps without drafts."""
    prefills = _prefills(load, steps, seed)
    return Played(np.full(steps, float(load.rows)), curve(load.rows + prefills, load.rows, load.context))


def _steps(trace: Trace, load: Load, steps: int, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """The rows' drafts, as places in the trace, and the prompt tokens of each step."""
    rng = np.random.default_rng(seed)
    for prefill in _prefills(load, steps, seed):
        yield rng.integers(0, len(trace.count), load.rows), int(prefill)


def _prefills(load: Load, steps: int, seed: int) -> np.ndarray:
    return load.prefill * (np.random.default_rng([seed, 2]).random(steps) < load.mixed)


def _gain(trace: Trace, picked: np.ndarray) -> np.ndarray:
    """Expected tokens of a step with its 0, 1, … likeliest drafted tokens."""
    live = np.arange(trace.chance.shape[1]) < trace.count[picked, None]
    likeliest = -np.sort(-trace.chance[picked][live])[: MAX_STEP_TOKENS - len(picked)]
    return len(picked) + np.concatenate([[0.0], np.cumsum(likeliest)])


def _line(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """The line through points, its first and last pieces going on."""
    if len(x) == 1:
        return y[0]
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1])
