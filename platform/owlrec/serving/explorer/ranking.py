"""Candidates in the order of the CTR model and in that of the LLM, side by side, with what moved between them.

One question to the ranking application brings both orders. Where the LLM did not rank, or nothing ranks at all, the
page says so and shows what there is.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from owlrec.errors import root_mistake
from owlrec.serving.problems import Problem
from owlrec.serving.schemas import LARGEST_ID, MAX_LLM_CANDIDATES, Rank, RankAnswer
from owlrec.serving.tables import WorkspaceTables

Ranker = Callable[[Rank], Awaitable[RankAnswer]]  # raises where it does not answer
MOST_CHARACTERS = 2500  # of a list of ids
_DRAWN = 20
_DEADLINE_MS = 8000  # people wait longer than pages do


async def compare_rankings(ranker: Ranker | None, tables: WorkspaceTables, user: int, words: str) -> dict[str, Any]:
    """What the template of the page is filled with. words: item ids, or nothing for some drawn from the catalogue.

    Raises Problem (422) for what are no ids, or too many.
    """
    # Threads: tables are files.
    candidates = parse_ids(words) or await asyncio.to_thread(tables.draw_candidates, user, _DRAWN)
    view = {"user": user, "listed": words.strip(), "candidates": len(candidates), "ctr": [], "llm": [], "moved": 0}
    if ranker is None:
        return {**view, "problem": "no ranking application is deployed beside this page"}
    if not candidates:
        return {**view, "problem": "there are no candidates: name items by their ids"}
    asked = Rank(
        user_id=user,
        candidates=candidates,
        mode="llm",
        top_k=len(candidates),
        deadline_ms=_DEADLINE_MS,
        explain=True,
    )
    try:
        answer = await ranker(asked)
    except Exception as error:
        mistake = root_mistake(error)
        return {**view, "problem": str(mistake) if mistake else "the ranking application does not answer"}
    sides = await asyncio.to_thread(_side_by_side, answer, tables)
    return {**view, **sides, "problem": answer.reason}


def parse_ids(words: str) -> list[int]:
    """The ids in a list that people wrote, with commas, blanks or line breaks between; each once.

    Raises Problem (422).
    """
    parts = [part for part in re.split(r"[\s,;]+", words) if part]
    if not all(part.isascii() and part.isdigit() and len(part) <= 19 and int(part) <= LARGEST_ID for part in parts):
        raise Problem(422, "is no list of item ids, such as 50, 100, 181", field="candidates")
    ids = list(dict.fromkeys(map(int, parts)))
    if len(ids) > MAX_LLM_CANDIDATES:
        raise Problem(
            422, f"holds {len(ids)} ids; an LLM is asked about {MAX_LLM_CANDIDATES} at most", field="candidates"
        )
    return ids


def _side_by_side(answer: RankAnswer, tables: WorkspaceTables) -> dict[str, Any]:
    titles = tables.titles([r.id for r in answer.results])
    rows: list[dict[str, Any]] = []
    for place, (result, title) in enumerate(zip(answer.results, titles, strict=True), 1):
        assert result.why is not None
        rows.append(
            {
                "id": result.id,
                "title": title or f"item {result.id}",
                "place": place,
                "ctr_place": result.why.ctr_place,
                "ctr_score": result.why.ctr_score,
                "llm_score": result.why.llm_score,
                "rise": result.why.ctr_place - place,  # places nearer to the top than the CTR model put it
            }
        )
    by_llm = any(row["llm_score"] is not None for row in rows)
    return {
        "ctr": sorted(rows, key=lambda row: row["ctr_place"]),
        "llm": rows if by_llm else [],
        "moved": sum(row["rise"] != 0 for row in rows) if by_llm else 0,
        "furthest": max(rows, key=lambda row: abs(row["rise"])) if by_llm else None,
    }
