"""Chooses how many tokens to draft for each row, to maximize the tokens per second of the whole batch.

A step over n tokens takes t(n): flat while the machine waits for memory, then linear. One more draft token pays off if
its chance of acceptance exceeds its cost, measured in tokens that the time would otherwise produce: q >
(dt/dn) * (tokens / t). So drafts fall from many at batch size one to none where t is steep. The curve is
measured at startup and then follows the real steps, separately with and without drafts, since verification adds its own
cost. (vLLM's own speculation drafts a fixed number at any batch size and can be slower than none; SmartSpec, arXiv
2406.14066, adapts one length for all rows.)
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel

# ------------------------------------------------------------------------------------------------------------- counters
# Counters of the decoder, in a form that crosses processes and can be summed over engines.
#
# vLLM's own acceptance metrics leave out steps without drafts (v1/core/sched/scheduler.py:2113) and so overstate
# tokens per step; these count every step.


class StepSums(BaseModel):
    """Sums over steps with decoding rows only."""

    steps: int = 0
    tokens: int = 0  # emitted
    seconds: float = 0.0
    plain_s: float = 0.0  # time for as many tokens without drafts, by the controller's curve

    @property
    def speed_up(self) -> float:
        """Tokens per second relative to plain decoding; nan before the first step."""
        return self.plain_s / self.seconds if self.seconds else float("nan")


class DecoderCounters(BaseModel):
    """Counters of one engine since its start, or of several engines together.

    counts: `steps`; `rows` (in all steps), `tokens`, `drafted`, `accepted`, `relaxed` (accepted only by the relaxed
    rule); `hits_*`, drafts by source; `unknown_pools`, `bad_rules`, `pools_*`, problems; `tokens_*`, currently
    held; `retrieval_s`, `verification_s`. by_rows: by batch size, up to and
    including the key.
    """

    counts: dict[str, float] = {}
    by_rows: dict[int, StepSums] = {}

    def since(self, before: "DecoderCounters") -> "DecoderCounters":
        """Counts after `before`, an earlier reading of the same engine."""
        grown = {name: value - before.counts.get(name, 0) for name, value in self.counts.items()}
        by_rows = {}
        for rows, sums in self.by_rows.items():
            earlier = before.by_rows.get(rows, StepSums())
            fields = {name: getattr(sums, name) - getattr(earlier, name) for name in StepSums.model_fields}
            by_rows[rows] = StepSums(**fields)
        return DecoderCounters(counts=grown, by_rows=by_rows)

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted per row and step, including steps without drafts; nan before the first step."""
        rows = self.counts.get("rows", 0)
        return self.counts["tokens"] / rows if rows else float("nan")

    @property
    def summary(self) -> str:
        """One line of text."""
        drafted, accepted, relaxed = (self.counts.get(name, 0) for name in ("drafted", "accepted", "relaxed"))
        return (
            f"{self.tokens_per_step:.2f} tokens per row and step, {drafted:,.0f} drafted, {accepted:,.0f} "
            f"accepted, {relaxed:,.0f} of them relaxed"
        )


def add_counters(parts: Iterable[DecoderCounters]) -> DecoderCounters:
    """Sum over engines."""
    counts: Counter[str] = Counter()
    by_rows: dict[int, StepSums] = {}
    for part in parts:
        counts.update(part.counts)
        for rows, sums in part.by_rows.items():
            before = by_rows.get(rows, StepSums())
            both = {name: getattr(before, name) + getattr(sums, name) for name in StepSums.model_fields}
            by_rows[rows] = StepSums(**both)
    return DecoderCounters(counts=dict(counts), by_rows=dict(sorted(by_rows.items())))


# ----------------------------------------------------------------------------------------------------------- controller


_NODES = np.array([1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024], dtype=np.float64)
_LEARNING_RATE = 0.1
_OUTLIER = 2.0  # limit on measured / estimated time, either way: one hiccup is not a trend
_EXPLORE_AFTER = 256  # steps after which the other mode is tried once, in case the machine has changed
_EXPLORE_FIRST = 8  # the same before the first drafts; each try doubles the wait
_STALE_AFTER = 32  # steps after which the unused mode's curve follows the other's changes
_PLAIN_FIRST = 3  # initial steps without drafts at each number of rows, as the baseline
_ASSUMED_VERIFICATION = 1.05  # assumed cost ratio of a step with drafts, before the first one


class StepTimes:
    """Step time in seconds by number of tokens, piecewise linear between fixed numbers of tokens."""

    def __init__(self, tokens: Sequence[float] | np.ndarray, seconds: Sequence[float] | np.ndarray) -> None:
        """tokens: increasing numbers of tokens, with measured `seconds`. Raises ValueError for fewer than
        two points."""
        n, t = np.asarray(tokens, dtype=np.float64), np.maximum.accumulate(np.asarray(seconds, dtype=np.float64))
        if len(n) < 2 or np.any(np.diff(n) <= 0) or t[0] <= 0:
            raise ValueError(
                f"a step-time curve needs at least two points with increasing tokens, not {n.tolist()} at {t.tolist()}"
            )
        slope = (t[-1] - t[-2]) / (n[-1] - n[-2])
        beyond = t[-1] + slope * (_NODES - n[-1])
        self._seconds = np.where(n[-1] >= _NODES, np.interp(_NODES, n, t), beyond)
        self._seen = np.zeros(len(_NODES))

    def __call__(self, tokens: np.ndarray | float) -> np.ndarray:
        """Seconds for each number of tokens."""
        return np.interp(tokens, _NODES, self._seconds)

    def observe(self, tokens: int, seconds: float) -> None:
        """Moves the nodes on both sides of `tokens` towards one measured step, and all unmeasured nodes with them."""
        right = int(np.clip(np.searchsorted(_NODES, tokens), 1, len(_NODES) - 1))
        share = float(np.clip((tokens - _NODES[right - 1]) / (_NODES[right] - _NODES[right - 1]), 0, 1))
        error = min(max(seconds / float(self(tokens)), 1 / _OUTLIER), _OUTLIER) - 1
        weight = np.zeros(len(_NODES))
        weight[right - 1], weight[right] = 1 - share, share
        rate = np.maximum(_LEARNING_RATE, 1 / (1 + self._seen)) * weight
        # A curve measured on a busy machine is wrong by one factor everywhere, so unmeasured nodes follow
        # the measured ones.
        rate[(self._seen == 0) & (weight == 0)] = rate.max()
        self._seconds = self._seconds * (1 + rate * error)
        self._seen += weight

    def scaled(self, factor: float) -> "StepTimes":
        """A copy that is `factor` times as slow."""
        return StepTimes(_NODES, self._seconds * factor)


class Controller:
    """Learns step times and distributes the draft tokens of each step among its rows."""

    def __init__(self, curve: StepTimes, *, max_draft: int, max_step_tokens: int) -> None:
        """curve: of steps without drafts, measured at startup. max_draft: tokens per row. max_step_tokens: bound on
        rows and drafts."""
        self.plain = curve
        self.drafted = curve.scaled(_ASSUMED_VERIFICATION)
        self.max_draft, self.max_step_tokens = max_draft, max_step_tokens
        # Per band of rows, without and with drafts: steps taken, and the number of the last one.
        self._taken: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._last: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._step = 0

    def observe(self, rows: int, drafts: int, seconds: float) -> None:
        """Records one real step with decoding rows only."""
        self._step += 1
        drafted, tokens, band = drafts > 0, rows + drafts, _band(rows)
        curve, other = (self.drafted, self.plain) if drafted else (self.plain, self.drafted)
        if self._step - self._last[not drafted].get(band, -_STALE_AFTER) >= _STALE_AFTER:
            other.observe(tokens, float(other(tokens)) * seconds / float(curve(tokens)))
        curve.observe(tokens, seconds)
        self._last[drafted][band] = self._step
        self._taken[drafted][band] += 1

    def floor(self, rows: int) -> float:
        """The chance below which no token can pay off in a step of this many rows: its cost at the current plain speed,
        which drafts only raise."""
        marginal = float(self.drafted(rows + 2) - self.drafted(rows + 1))
        return max(0.01, min(1.0, marginal * rows / float(self.plain(rows))))

    def worth_searching(self, rows: int) -> bool:
        """Whether drafts would pay off if surely accepted; if not, the search is skipped except for an occasional
        try."""
        best = min(self.max_draft * rows, max(0, self.max_step_tokens - rows))
        tokens = rows + np.arange(1, best + 1, dtype=np.float64)
        pays = best > 0 and bool(np.any(tokens / self.drafted(tokens) > rows / float(self.plain(rows))))
        return pays or self._due(True, rows)

    def allocate(self, chance: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Number of drafted tokens that each row may propose.

        chance: float64 [rows, depth], probability that the token and all before it are accepted. count: int64 [rows],
        tokens drafted.
        Returns int64 [rows]. Within a row chances never rise, so taking the most likely tokens of all rows takes
        prefixes.
        """
        rows, depth = chance.shape
        if self._due(False, rows) or self._taken[False][_band(rows)] < _PLAIN_FIRST:
            return np.zeros(rows, dtype=np.int64)
        live = np.arange(depth) < count[:, None]
        row, flat = np.nonzero(live)[0], np.minimum.accumulate(chance, axis=1)[live]
        order = np.argsort(-flat, kind="stable")[: max(0, self.max_step_tokens - rows)]
        if len(order) == 0:
            return np.zeros(rows, dtype=np.int64)
        drafts = np.arange(1, len(order) + 1, dtype=np.float64)
        speed = (rows + np.cumsum(flat[order])) / self.drafted(rows + drafts)
        best = int(np.argmax(speed))
        if speed[best] <= rows / float(self.plain(rows)) and not self._due(True, rows):
            return np.zeros(rows, dtype=np.int64)
        return np.bincount(row[order[: best + 1]], minlength=rows)

    def _due(self, drafted: bool, rows: int) -> bool:
        """Whether steps of one mode were last taken so long ago that their estimate needs a new measurement."""
        band = _band(rows)
        wait = _EXPLORE_AFTER
        if drafted:  # one slow first step must not turn off drafts for a whole job
            wait = min(wait, _EXPLORE_FIRST * (1 + self._taken[True][band]))
        return self._step - self._last[drafted].setdefault(band, self._step) >= wait


def _band(rows: int) -> int:
    return int(np.searchsorted(_NODES, rows))


def band_of_rows(rows: int) -> int:
    """Upper end of the band that counts steps of this many rows: 1, 2, 4, 8, 12, 16 and so on."""
    return int(_NODES[min(_band(rows), len(_NODES) - 1)])
