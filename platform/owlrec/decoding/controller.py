"""How many tokens to draft for each row, so that the batch as a whole emits the most tokens a second.

One more draft token pays when the chance that it is accepted exceeds what it costs, measured in tokens that the time
would have given otherwise: q > (dt/dn) * (tokens / t). So drafts fall from many at a batch of one to none where t is
steep, by themselves. t is learned from all steps (step_times.py). (vLLM's own speculation drafts a fixed number at any
batch and can be slower than none; SmartSpec, arXiv 2406.14066, adapts one length for all rows.)
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel

from owlrec.decoding.step_times import StepTimes

# ------------------------------------------------------------------------------------------------------------- counters
# What the decoder counted, in a form that crosses processes and adds up over engines.
#
# vLLM's own acceptance metrics leave out steps without drafts (v1/core/sched/scheduler.py:2113), and so overstate
# tokens a step; these count every step.


class StepSums(BaseModel):
    """Steps of decoding rows only, summed."""

    steps: int = 0
    tokens: int = 0  # emitted
    seconds: float = 0.0
    plain_s: float = 0.0  # what as many tokens take without drafts, by the controller's curve of such steps

    @property
    def speed_up(self) -> float:
        """Tokens a second against those of plain decoding; nan before the first step."""
        return self.plain_s / self.seconds if self.seconds else float("nan")


class DecoderCounters(BaseModel):
    """Counters of one engine since its start, or of several together.

    counts: `steps`; `rows` (of all steps), `tokens`, `drafted`, `accepted`, `relaxed` (accepted by the relaxed rule
    alone); `hits_*`, drafts by the source that gave them; `unknown_pools`, `bad_rules`, `pools_*`, things that went
    wrong; `tokens_*`, held now; `retrieval_s`, `verification_s`; `yardstick_*`, see Controller. by_rows: by the size of
    the batch, up to and including the key.
    """

    counts: dict[str, float] = {}
    by_rows: dict[int, StepSums] = {}

    def since(self, before: "DecoderCounters") -> "DecoderCounters":
        """What was counted after `before`, an earlier look at the same engine."""
        grown = {name: value - before.counts.get(name, 0) for name, value in self.counts.items()}
        by_rows = {}
        for rows, sums in self.by_rows.items():
            earlier = before.by_rows.get(rows, StepSums())
            fields = {name: getattr(sums, name) - getattr(earlier, name) for name in StepSums.model_fields}
            by_rows[rows] = StepSums(**fields)
        return DecoderCounters(counts=grown, by_rows=by_rows)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row emits in a step, steps without drafts included; nan before the first step."""
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
        """In a line."""
        drafted, accepted, relaxed = (self.counts.get(name, 0) for name in ("drafted", "accepted", "relaxed"))
        return (
            f"{self.tokens_per_step:.2f} tokens a row and step, {drafted:,.0f} drafted, {accepted:,.0f} accepted, "
            f"{relaxed:,.0f} of them relaxed"
        )


def add_counters(parts: Iterable[DecoderCounters]) -> DecoderCounters:
    """The sum over engines."""
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
    rows, depth = chance.shape
    live = np.arange(depth) < count[:, None]
    row, flat = np.nonzero(live)[0], np.minimum.accumulate(chance, axis=1)[live]
    order = np.argsort(-flat)[: len(seconds) - 1]
    speed = (rows + np.concatenate([[0.0], np.cumsum(flat[order])])) / seconds[: len(order) + 1]
    first = min(at_least, len(order))
    best = first + int(np.argmax(speed[first:]))
    if at_least == 0 and speed[best] <= _WORTH * speed[0]:
        best = 0
    return np.bincount(row[order[:best]], minlength=rows)


class Controller:
    """Learns what steps cost and parts the draft tokens of each step among its rows.

    Now and then a step is larger or smaller than the best, whatever the estimates say, since an estimate that is wrong
    is put right by trying alone. In a long run a stretch without drafts and search is the yardstick: where drafting
    was slower, it pauses until the next. yardstick: steps of decoding alone, in stretches without the decoder
    (`plain_*`) and in between (`drafting_*`): `tokens` and seconds, `s`.
    """

    def __init__(self, times: StepTimes, *, max_draft: int, max_step_tokens: int) -> None:
        """times: as measured at start. max_draft: tokens per row. max_step_tokens: bound on rows and drafts."""
        self.times = times
        self.max_draft, self.max_step_tokens = max_draft, max_step_tokens
        self.yardstick: Counter[str] = Counter()
        self._step, self._paused = 0, False
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
        drafts = min(self.max_draft * rows, self._room(rows))
        if self._explores or not drafts:
            return 0.01
        seconds = self._seconds(rows, drafts)
        steps = np.unique(np.geomspace(1, drafts + 1, 9).astype(np.int64)) - 1
        slopes = np.diff(seconds[steps]) / np.diff(steps) if len(steps) > 1 else np.zeros(1)
        return float(np.clip(_PRICE_SHARE * slopes.min() * rows / seconds[0], 0.01, 1.0))

    def worth_searching(self, rows: int) -> bool:
        """Whether even drafts that are surely accepted would pay; where not, the search is saved, but for a try now
        and then."""
        if self._plain:
            return False
        drafts = np.arange(min(self.max_draft * rows, self._room(rows)) + 1)
        speed = (rows + drafts) / self._seconds(rows, len(drafts) - 1)
        return len(drafts) > 1 and bool(self._explores or speed.max() > _WORTH * speed[0])

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
        return allocate(chance, count, self._seconds(rows, room), at_least=at_least)

    def _room(self, rows: int) -> int:
        return max(0, min(self.max_step_tokens, int(_GROWTH * max(self.times.largest, rows)) + 1) - rows)

    def _seconds(self, rows: int, drafts: int) -> np.ndarray:
        """Expected seconds of steps with 0 to `drafts` tokens drafted, with as much prefill as there was lately:
        which step reads a prompt is not known when its drafts are made."""
        tokens = rows + np.arange(drafts + 1, dtype=np.float64)
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


def band_of_rows(rows: int) -> int:
    """The upper end of the band that steps of so many rows are counted in: 1, 2, 4, 8, 12, 16 and so on."""
    return int(_BANDS[min(int(np.searchsorted(_BANDS, rows)), len(_BANDS) - 1)])
