"""Chooses how many tokens to draft for each row, to maximize the tokens per second of the whole batch.

One more draft token pays when the chance that it is accepted exceeds what it costs, measured in tokens that the time
would have given otherwise: q > (dt/dn) * (tokens / t). So drafts fall from many at a batch of one to none where t is
steep, by themselves. t is learned from all steps (step_times.py). (vLLM's own speculation drafts a fixed number at any
batch and can be slower than none; SmartSpec, arXiv 2406.14066, adapts one length for all rows.)
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

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

    counts: `steps`; `rows` (of all steps), `tokens`, `drafted`, `accepted`, `relaxed` (accepted by the relaxed rule
    alone); `hits_*`, drafts by the source that gave them; `unknown_pools`, `refused_pools`, `bad_rules`, things that
    went wrong; `tokens_*`, held now; `retrieval_s`, `verification_s`; `yardstick_*`, see Controller. by_rows: by the
    size of the batch, up to and including the key.
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
    def measured_speed_up(self) -> float:
        """Tokens a second of drafting stretches against those of stretches without, in one engine; nan where the run
        was too short for both."""
        plain, drafting = (
            self.counts.get(f"yardstick_{kind}_tokens", 0) / seconds
            if (seconds := self.counts.get(f"yardstick_{kind}_s", 0))
            else float("nan")
            for kind in ("plain", "drafting")
        )
        return drafting / plain

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


# ----------------------------------------------------------------------------------------------------------- step times
# How long a step takes: t = a + b * tokens, steeper beyond each knee, + c * context tokens read by attention.
#
# Fitted by recursive least squares on every step, prefill included (SmartSpec, arXiv 2406.14066, fits a straight line
# offline). A GPU's curve has a knee at an unknown size, so there is a hinge at each of several sizes, whose weight
# stays near zero unless steps show a knee there; beyond the largest step the last slope continues. Drafts of a row
# share the read of its context, so the third term counts rows, not drafts.


_KNEES = np.array([8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096], dtype=np.float64)
_MEMORY = 100.0  # steps that the fit remembers
_NOISE = 0.04  # of a step's time, relative
_OUTLIER = 1.5  # a step further from the estimate than this factor counts as that far: a hiccup is not a trend
_SHIFT = 1.2  # where _SHIFTED steps in a row are this far off on one side, the machine has another speed
_SHIFTED = 6
_FLAT_TOKENS = 64.0  # a step of about so many tokens is expected to cost twice a step of one, before any was seen
_FLAT_CONTEXT = 65536.0  # the same for context tokens


_EDGES = np.concatenate([[0.0], _KNEES, [2.0**24]])
_WIDTHS = np.diff(_EDGES)
# Rows that give the slope between two knees and of context.
_RISES = np.zeros((len(_KNEES) + 2, len(_KNEES) + 3))
_RISES[:-1, 1:-1] = np.tri(len(_KNEES) + 1)
_RISES[-1, -1] = 1.0


class StepTimes:
    """Seconds of a step by its tokens and by the context tokens that its rows read."""

    def __init__(self, tokens: Sequence[float] | np.ndarray, seconds: Sequence[float] | np.ndarray) -> None:
        """tokens, seconds: steps measured at start, without context. Raises ValueError for none, or a time that is
        not positive."""
        if len(tokens) == 0 or min(seconds) <= 0:
            raise ValueError(
                f"step times need one or more measured steps of positive time, not {list(tokens)} at {list(seconds)}"
            )
        base = float(min(seconds))
        self.largest = 0.0  # tokens of the largest step seen
        self.seen = 0
        self._at_edges: np.ndarray | None = None  # seconds beyond those of no token, at the edges of the slopes
        self._ratios: deque[float] = deque(maxlen=_SHIFTED)
        spread = np.array([base, base / _FLAT_TOKENS, *[base / _FLAT_TOKENS / 2] * len(_KNEES), base / _FLAT_CONTEXT])
        self._widest = spread**2
        self._weights = np.zeros(len(spread))
        self._weights[0] = base
        self._kept: tuple[np.ndarray, np.ndarray] | None = None  # weights and covariance before steps that were far off
        self._covariance = np.diag(self._widest)
        for n, t in zip(tokens, seconds, strict=True):
            self._learn(_features(float(n), 0.0), float(t))
            self.largest = max(self.largest, float(n))

    def __call__(self, tokens: np.ndarray | float, context: float = 0.0) -> np.ndarray:
        """Seconds for each number of tokens; never falls with them. context: tokens that the step's rows read."""
        if self._at_edges is None:
            slopes = np.maximum(np.cumsum(self._weights[1:-1]), 0.0)
            self._at_edges = np.concatenate([[0.0], np.cumsum(slopes * _WIDTHS)])
        flat = max(self._weights[0] + max(self._weights[-1], 0.0) * context, 1e-9)
        return np.interp(np.atleast_1d(tokens), _EDGES, self._at_edges) + flat

    def observe(self, tokens: float, context: float, seconds: float) -> None:
        """Takes in one step."""
        features = _features(float(tokens), float(context))
        expected = max(float(features @ self._weights), 1e-9)
        before = self._ratios[-1] if self._ratios else 1.0
        self._ratios.append(seconds / expected)
        low, high = min(self._ratios), max(self._ratios)
        settled = self.seen > _SHIFTED
        if settled and len(self._ratios) == _SHIFTED and (low > _SHIFT or high < 1 / _SHIFT):
            # A machine that slows down slows everything, sizes included that are not tried now.
            factor = float(np.median(self._ratios))
            weights, covariance = self._kept or (self._weights, self._covariance)
            self._weights, self._covariance = weights * factor, covariance * factor**2
            self._widest = self._widest * factor**2
            self._ratios.clear()
            self._kept = None
            self._learn(features, seconds)
        elif settled and _off(seconds / expected) and _off(before) == _off(seconds / expected):
            pass  # perhaps another speed: the steps to come decide
        else:
            self._kept = None
            if settled and _off(seconds / expected):
                self._kept = (self._weights, self._covariance)
                seconds = min(max(seconds, expected / _OUTLIER), expected * _OUTLIER)
            self._learn(features, seconds)
        self.largest = max(self.largest, float(tokens))
        self.seen += 1

    def _learn(self, features: np.ndarray, seconds: float) -> None:
        self._at_edges = None
        forgotten = self._covariance / (1 - 1 / _MEMORY)
        # What no step tells of is forgotten without end otherwise.
        shrink = np.sqrt(np.minimum(1.0, self._widest / np.maximum(np.diag(forgotten), 1e-100)))
        forgotten = forgotten * shrink[:, None] * shrink
        spread = forgotten @ features
        gain = spread / (features @ spread + (_NOISE * seconds) ** 2)
        self._weights = self._weights + gain * (seconds - features @ self._weights)
        self._covariance = forgotten - np.outer(gain, spread)
        self._covariance = (self._covariance + self._covariance.T) / 2
        # Noise must not make a token free, nor context: the likeliest weights without falling slopes, nearly.
        for _ in range(3):
            falls = np.flatnonzero(_RISES @ self._weights < 0)
            for rise in _RISES[falls]:
                below = min(0.0, float(rise @ self._weights))
                moved = self._covariance @ rise
                self._weights = self._weights - moved * (below / max(float(rise @ moved), 1e-100))


def _off(ratio: float) -> int:
    """1 for a step that took far longer than expected, -1 for far shorter, 0 for neither."""
    return int(ratio > _OUTLIER) - int(ratio < 1 / _OUTLIER)


def _features(tokens: float, context: float) -> np.ndarray:
    return np.concatenate([[1.0, tokens], np.maximum(tokens - _KNEES, 0.0), [context]])


# ----------------------------------------------------------------------------------------------------------- controller


_BANDS = np.array([1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024])
_EXPLORE_EVERY = 64  # steps; at the start at each power of two
_GROWTH = 1.5  # a step's tokens at most this many times those of the largest step seen
_WORTH = 1.005  # of plain speed, which drafts must promise: less is within the fit's error
_PRICE_SHARE = 0.7  # of the price, below which no draft is searched on: the fit may err
_MIXED_MEMORY = 64.0  # steps over which the share and the size of prefill is averaged
_CYCLE = 2048  # steps from one stretch without the decoder to the next
_STRETCH = 32  # steps of such a stretch


def allocate(chance: np.ndarray, count: np.ndarray, seconds: np.ndarray, *, at_least: int = 0) -> np.ndarray:
    """How many of its drafted tokens each row may propose, for the most expected tokens per second of the step.

    chance: float64 [rows, depth], probability that the token is accepted with all before it. count: int64 [rows],
    tokens drafted. seconds: float64 [1 + n], of the step with 0 to n tokens drafted. at_least: tokens to draft at any
    price, where there are as many. Returns int64 [rows].

    Within a row chances never rise, so that taking the likeliest tokens of all rows takes prefixes; for each number of
    tokens that is the best choice, and the best number is found by trying all.
    """
    from owlrec_decoding.pools import take_likeliest  # here, since numba takes a second and counters need none of it

    shares = np.zeros(len(chance), np.int64)
    take_likeliest(chance, count, seconds, at_least, _WORTH, shares)
    return shares


class Controller:
    """Learns step times and distributes the draft tokens of each step among its rows.

    Now and then a step is larger or smaller than the best, whatever the estimates say, since an estimate that is wrong
    is put right by trying alone. In a long run a stretch without drafts and search is the yardstick: where drafting
    was slower, it pauses until the next. yardstick: steps of decoding alone, in stretches without the decoder
    (`plain_*`) and in between (`drafting_*`): `tokens` and seconds, `s`.
    """

    def __init__(
        self, times: StepTimes, *, max_draft: int, max_step_tokens: int, max_drafts: int | None = None
    ) -> None:
        """times: as measured at start. max_draft: tokens per row. max_step_tokens: bound on rows and drafts of a step.
        max_drafts: bound on its drafts alone."""
        self.times = times
        self.max_draft, self.max_step_tokens = max_draft, max_step_tokens
        self.max_drafts = max_step_tokens if max_drafts is None else max_drafts
        self.yardstick: Counter[str] = Counter()
        self._step, self._paused = 0, False
        self._outlook: tuple[int, int, np.ndarray, np.ndarray] | None = None  # of a step and rows, see `_forecast`
        self._recent: Counter[str] = Counter()  # the yardstick's counts since the last stretch ended
        self._context = 0.0  # tokens that a row's attention reads
        self._mixed, self._prefill = 0.0, 0.0  # share of steps that read prompts, and how many tokens those read
        self._drafts = 0.0  # of a step, lately

    def observe(self, rows: int, drafts: int, seconds: float, *, prefill: int, context: int, emitted: int) -> None:
        """Takes in one step: rows that decode, tokens drafted for them, prompt tokens read beside them, context tokens
        that attention read, and tokens emitted."""
        self.times.observe(rows + drafts + prefill, context, seconds)
        self._mixed += ((prefill > 0) - self._mixed) / _MIXED_MEMORY
        if prefill:
            self._prefill += (prefill - self._prefill) / (_MIXED_MEMORY if self._prefill else 1.0) ** 0.5
        if rows and not prefill:
            self._context = context / rows
            self._drafts += (drafts - self._drafts) / 8
            kind = "plain" if self._plain and not drafts else None if self._plain else "drafting"
            if kind:
                self._recent.update({f"{kind}_tokens": emitted, f"{kind}_s": seconds})
        self._step += 1
        if self._step % _CYCLE == 0:
            self._compare()

    def plain_seconds(self, rows: int) -> float:
        """Estimate of a step of so many decoding rows without drafts and prompts."""
        return float(self.times(rows, rows * self._context)[0])

    def floor(self, rows: int) -> float:
        """The chance below which no token can pay in a step of so many rows: what one costs, where it costs least, at
        plain speed, which drafts only raise."""
        drafts, seconds = self._forecast(rows)
        if self._explores or len(drafts) == 1:
            return 0.01
        slope = float(((seconds[1:] - seconds[:-1]) / (drafts[1:] - drafts[:-1])).min())
        return min(max(_PRICE_SHARE * slope * rows / float(seconds[0]), 0.01), 1.0)

    def worth_searching(self, rows: int) -> bool:
        """Whether drafts would pay off if surely accepted; if not, the search is skipped except for an occasional
        try."""
        if self._plain:
            return False
        drafts, seconds = self._forecast(rows)
        if len(drafts) == 1 or self._explores:
            return len(drafts) > 1
        speed = (rows + drafts) / seconds
        return bool(speed.max() > _WORTH * speed[0])

    def allocate(self, chance: np.ndarray, count: np.ndarray) -> np.ndarray:
        """How many of its drafted tokens each row may propose, int64 [rows]; see the function of that name."""
        rows = len(chance)
        room = 0 if self._plain else min(int(count.sum()), self._room(rows))
        explores = self._explores
        at_least = 0
        if explores == "none":
            room = 0
        elif explores == "less":
            room = min(room, int(self._drafts / 2))
        elif explores == "more":
            at_least = min(room, int((_GROWTH - 1) * (rows + self._drafts) + self._drafts) + 1)
        return allocate(chance, count, self._seconds(rows, np.arange(room + 1)), at_least=at_least)

    def _forecast(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of drafts of this step, from none to the most, and the expected seconds of each."""
        if self._outlook is None or self._outlook[:2] != (self._step, rows):
            drafts = _spread(min(self.max_draft * rows, self._room(rows)))
            self._outlook = (self._step, rows, drafts, self._seconds(rows, drafts))
        return self._outlook[2:]

    def _room(self, rows: int) -> int:
        tokens = min(self.max_step_tokens, int(_GROWTH * max(self.times.largest, rows)) + 1)
        return max(0, min(tokens - rows, self.max_drafts))

    def _seconds(self, rows: int, drafts: np.ndarray) -> np.ndarray:
        """Expected seconds of steps with these numbers of drafts, with as much prefill as there was lately: which step
        reads a prompt is not known when its drafts are made."""
        tokens = rows + drafts
        alone = self.times(tokens, rows * self._context)
        if self._mixed < 0.01:
            return alone
        return (1 - self._mixed) * alone + self._mixed * self.times(tokens + self._prefill, rows * self._context)

    @property
    def _plain(self) -> bool:
        """Whether the next step belongs to a stretch without the decoder: the last ones of a cycle, or all others
        where drafting was slower."""
        last = self._step % _CYCLE >= _CYCLE - _STRETCH
        return last != self._paused

    @property
    def _explores(self) -> str:
        """What the next step tries: "more" drafts, "less", "none", or "" for the best."""
        step = self._step
        if step >= _EXPLORE_EVERY:
            if step % _EXPLORE_EVERY:
                return ""
            return ("more", "less", "more", "none")[step // _EXPLORE_EVERY % 4]
        return "more" if step > 1 and step & (step - 1) == 0 else ""

    def _compare(self) -> None:
        recent = self._recent
        if recent["plain_s"] and recent["drafting_s"]:
            plain, drafting = (recent[f"{kind}_tokens"] / recent[f"{kind}_s"] for kind in ("plain", "drafting"))
            self._paused = bool(drafting < plain)
        self.yardstick.update(recent)
        self._recent = Counter()


@lru_cache
def _spread(most: int) -> np.ndarray:
    """Numbers of drafts from 0 to `most`, dense where they are few."""
    return np.unique(np.geomspace(1, most + 1, 25).astype(np.int64)) - 1


def band_of_rows(rows: int) -> int:
    """Upper end of the band that counts steps of this many rows: 1, 2, 4, 8, 12, 16 and so on."""
    return int(_BANDS[min(int(np.searchsorted(_BANDS, rows)), len(_BANDS) - 1)])
