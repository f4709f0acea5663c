"""What the LLM is asked about a request's candidates: the user's behaviours that bear on them (SUBR, ReLLa), in the
words that the ranker was tuned on. Retrieved for the set, they are the same in each prompt, so the engine reads them
once.

A user who comes by id is asked about by the behaviors that the current release holds, cut as the samples were. A
history that comes with the request stands in the place of these; nothing is kept of it.
"""

import math
from collections.abc import Callable, Sequence

from owlrec.prompting.rella import rank_prompt
from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.retrieval import BehaviourRetriever
from owlrec.ranking.samples import Shown, behaviours_shown
from owlrec.scenario import Scenario
from owlrec.serving.schemas import Rank
from owlrec.serving.served import ServedReleases
from owlrec.serving.tables import WorkspaceTables
from owlrec.sources.outcomes import taken

Recent = Callable[[int], list[tuple[int, float | None]]]  # user -> (item, rating) of what they took, oldest first


def recent_of(served: ServedReleases) -> Recent:
    """What a user took among the last behaviors that the current release holds; raises Problem (503) without one."""

    def recent(user: int) -> list[tuple[int, float | None]]:
        with served.lease() as release:
            (found,) = release.store.behaviors([user])
        rows = [] if found is None else found[taken(found["rating"], found["label"])].tolist()
        return [(item, None if math.isnan(rating) else rating) for _, item, rating, _ in rows]

    return recent


class QuestionWriter:
    """Writes the questions of `ranking.scorer.Scorer`."""

    def __init__(
        self,
        tables: WorkspaceTables,
        retriever: BehaviourRetriever,
        scenario: Scenario,
        config: RankingConfig,
        recent: Recent,
        count_tokens: Callable[[str], int],
    ) -> None:
        """config: that the ranker was tuned with; the last of its ways of showing behaviours is asked in."""
        self._tables = tables
        self._retriever = retriever
        self._scenario = scenario
        self._config = config
        self._recent = recent
        self._count_tokens = count_tokens
        self._shown: Shown = config.data.shown[-1]

    def write(self, asked: Rank, candidates: Sequence[int]) -> list[tuple[str, str]]:
        """System turn and user turn about each candidate, in their order; two "" for one without a title."""
        if asked.history is None:
            behaviours = [] if asked.user_id is None else self._recent(asked.user_id)
        else:
            behaviours = [(b.item_id, b.rating) for b in asked.history if b.taken]
        items = [item for item, _ in behaviours]
        sample = {
            "user_id": asked.user_id,
            "history": items,
            "history_ratings": [rating for _, rating in behaviours],
        }
        titles, targets = self._tables.titles(items), self._tables.titles(list(candidates))
        profile, prompt, k = self._profile(asked), self._config.prompt, self._config.data.behaviours
        sets = [list(candidates)] if prompt.retrieved_for == "set" else [[item] for item in candidates]
        shown = [behaviours_shown(sample, titles, one, self._retriever, k, self._shown) for one in sets]
        if prompt.retrieved_for == "set":
            shown *= len(targets)
        return [
            rank_prompt(self._scenario, profile, target, prompt, self._count_tokens, **lists)
            for target, lists in zip(targets, shown, strict=True)
        ]

    def _profile(self, asked: Rank) -> dict[str, str]:
        row = self._tables.row("user", asked.user_id) if asked.user_id is not None else None
        known = {f: str(row[f]) for f in self._scenario.profile_fields if row and row.get(f) is not None}
        return known | {f: v for f, v in asked.profile.items() if f in self._scenario.profile_fields}
