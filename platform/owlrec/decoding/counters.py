"""What the decoder counted, in a form that crosses processes and adds up over engines.

vLLM's own acceptance metrics leave out steps without drafts (v1/core/sched/scheduler.py:2113), and so overstate tokens
a step; these count every step.
"""

from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel


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
    wrong; `tokens_*`, held now; `retrieval_s`, `verification_s`. by_rows: by the size of the batch, up to and
    including the key.
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
