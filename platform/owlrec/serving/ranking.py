"""The cascade: a CTR model puts all candidates in order, an LLM re-orders the head of it within the deadline.

What the LLM has not said by then is not waited for: the CTR order goes out, marked as degraded. A recommendation that
is late is worth nothing, and one by the CTR model is what there was before the LLM came.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Protocol

from owlrec.serving.problems import Problem
from owlrec.serving.schemas import Rank, RankAnswer, Ranked, Why
from owlrec.serving.telemetry import NoTelemetry, Telemetry

_MARGIN_S = 0.01  # kept for writing the answer, but no more than a tenth of what there is
_log = logging.getLogger("owlrec.serving")


class Backend(Protocol):
    """Something that scores candidates: a deployment's handle, or a test."""

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        """A probability for each candidate, in their order; nan where one could not be scored."""


class Cascade:
    """Ranks with a CTR model and, where there is one, an LLM."""

    def __init__(self, ctr: Backend, llm: Backend | None, telemetry: Telemetry | None = None) -> None:
        self._ctr = ctr
        self._llm = llm
        self._telemetry = telemetry or NoTelemetry()

    async def rank(self, asked: Rank) -> RankAnswer:
        """Candidates in order, at the deadline at the latest.

        Raises Problem (503) where not even the CTR model answers in time.
        """
        whole_s = asked.deadline_ms / 1000
        due = time.monotonic() + whole_s - min(_MARGIN_S, whole_s / 10)
        ctr = await self._ctr_scores(asked, due)
        # Ties, and what is no number, keep the order in which the candidates came.
        order = sorted(range(len(ctr)), key=lambda row: -ctr[row] if not math.isnan(ctr[row]) else math.inf)
        head = order if asked.mode == "llm" else order[: asked.rerank] if asked.mode == "cascade" else []
        said, reason = await self._llm_scores(asked, [asked.candidates[row] for row in head], due)
        llm = {row: score for row, score in zip(head, said, strict=True) if not math.isnan(score)} if said else {}
        if said and len(llm) < len(head):
            reason = f"the LLM could not score {len(head) - len(llm)} of {len(head)} candidates"
        if reason:
            self._telemetry.count("degraded", tags={"reason": reason.partition(" of ")[0][:60]})
        places = {row: place for place, row in enumerate(order, 1)}
        weight = asked.llm_weight
        mixed = {
            row: weight * score + (1 - weight) * (ctr[row] if not math.isnan(ctr[row]) else score)
            for row, score in llm.items()
        }
        by_llm = sorted(llm, key=lambda row: (-mixed[row], places[row]))
        final = [*by_llm, *(row for row in order if row not in llm)][: asked.top_k]
        results = [
            Ranked(
                id=asked.candidates[row],
                score=_number(mixed.get(row, ctr[row])),
                by="llm" if row in llm else "ctr",
                why=Why(ctr_score=_number(ctr[row]), ctr_place=places[row], llm_score=llm.get(row))
                if asked.explain
                else None,
            )
            for row in final
        ]
        return RankAnswer(mode=asked.mode, degraded=reason is not None, reason=reason, results=results)

    async def _ctr_scores(self, asked: Rank, due: float) -> Sequence[float]:
        try:
            return await self._timed("ctr", self._ctr, asked, asked.candidates, due)
        except TimeoutError:
            detail = "the CTR model did not answer within the deadline"
        except Problem:
            raise
        except Exception:
            _log.exception("the CTR model failed")
            detail = "the CTR model is not available"
        raise Problem(503, detail, headers={"Retry-After": "1"})

    async def _llm_scores(
        self, asked: Rank, candidates: Sequence[int], due: float
    ) -> tuple[Sequence[float], str | None]:
        """Scores, or none and the reason."""
        if not candidates:
            return (), None
        if self._llm is None:
            return (), "no LLM is deployed"
        try:
            return await self._timed("llm", self._llm, asked, candidates, due), None
        except TimeoutError:
            return (), "the LLM did not answer within the deadline"
        except Exception as error:
            _log.warning("the LLM is not available: %s", type(error).__name__)
            return (), "the LLM is not available"

    async def _timed(
        self, stage: str, backend: Backend, asked: Rank, candidates: Sequence[int], due: float
    ) -> Sequence[float]:
        start = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, due - start)):
                return await backend.score(asked, candidates)
        finally:
            self._telemetry.time(stage, time.monotonic() - start)


def _number(score: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(score) else score
