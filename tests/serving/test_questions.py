"""What a served ranker is asked is, to the letter, what it was tuned on."""

import re
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from served_world import served_behaviors

from owlrec.ranking.behavior_retrieval import SET_SIZE, BehaviorRetriever, with_candidates
from owlrec.ranking.samples import RankingConfig, Shown, ask_about
from owlrec.scenario import get_scenario
from owlrec.schema import INTERACTIONS
from owlrec.serving.questions import QuestionWriter, WorkspaceTables, recent_of
from owlrec.serving.schemas import Rank
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import ItemCatalog, SplitConfig, build_samples
from owlrec.workspace import Workspace

N_USERS, N_ITEMS, NOW = 8, 60, 1000
MOVIES, LABELS = get_scenario("movies"), Labels(rule="column", rating_above=3)
SPLIT = SplitConfig(history_length=20, method="user")
USERS = pa.table({"user_id": pa.array(range(N_USERS), pa.int64()), "gender": ["female", None] * (N_USERS // 2)})
TITLES = [None if i % 11 == 5 else f"Film {i}" for i in range(N_ITEMS)]
ITEMS = pa.table({"item_id": pa.array(range(N_ITEMS), pa.int64()), "title": TITLES})
VECTORS = np.random.default_rng(3).standard_normal((N_ITEMS, 4))
EITHER = pytest.mark.parametrize("retrieved_for", ["set", "candidate"])


def count(text: str) -> int:
    return len(text.split())


def lists() -> dict[int, list[int]]:
    """What each user is asked about now: as many items as a set holds, none of which they have met."""
    rng = np.random.default_rng(1)
    return {user: rng.choice(np.arange(40, N_ITEMS), SET_SIZE, replace=False).tolist() for user in range(N_USERS)}


def log() -> pa.Table:
    rng, n = np.random.default_rng(0), 30
    rows = [
        {"user_id": user, "item_id": int(item), "timestamp": 10 * i, "label": float(rng.random() < 0.7)}
        for user in range(N_USERS)
        for i, item in enumerate(rng.integers(0, 40, n))
    ]
    return pa.Table.from_pylist(rows)


def writer(workspace: Workspace, config: RankingConfig) -> QuestionWriter:
    interactions = with_outcomes(log(), LABELS, "log").select(INTERACTIONS.names)
    served = served_behaviors(workspace, interactions, SPLIT)
    workspace.write_table("users", USERS, key="user_id", n_shards=2)
    workspace.write_table("items", ITEMS, key="item_id", n_shards=1)
    retriever = BehaviorRetriever(np.arange(N_ITEMS), VECTORS)
    return QuestionWriter(WorkspaceTables(workspace), retriever, MOVIES, config, recent_of(served), count)


def configured(retrieved_for: str, shown: Shown, k: int = 5) -> RankingConfig:
    data = {"behaviors": k, "shown": [shown]}
    return RankingConfig.model_validate({"data": data, "retrieved_for": retrieved_for})


def asked_of_samples(config: RankingConfig) -> dict[tuple[int, int], tuple[str, str]]:
    """Of samples whose moment is now: the log goes on with one list of each user."""
    now = [
        {"user_id": user, "item_id": item, "timestamp": NOW, "label": float(item % 2)}
        for user, items in lists().items()
        for item in items
    ]
    samples = build_samples(pa.concat_tables([log(), pa.Table.from_pylist(now)]), SPLIT, LABELS).samples
    samples = samples.filter(pa.array(samples["timestamp"].to_numpy() == NOW))
    rows = ask_about(
        with_candidates(samples, samples, np.arange(N_ITEMS)),
        USERS,
        ItemCatalog(ITEMS),
        BehaviorRetriever(np.arange(N_ITEMS), VECTORS),
        MOVIES,
        config.prompt,
        count,
        k=config.data.behaviors,
        ways=config.data.shown,
    ).rows
    return {(row["user_id"], row["item_id"]): (row["system"], row["text"]) for row in rows.to_pylist()}


@EITHER
@pytest.mark.parametrize("shown", ["recent", "retrieved", "mixed"])
def test_a_request_is_asked_what_its_samples_were(
    workspace: Workspace, retrieved_for: str, shown: Literal["recent", "retrieved", "mixed"]
) -> None:
    config = configured(retrieved_for, shown)
    written, expected = writer(workspace, config), asked_of_samples(config)
    assert len(expected) > 60
    for user, candidates in lists().items():
        questions = written.write(Rank(user_id=user, candidates=candidates), candidates)
        for item, question in zip(candidates, questions, strict=True):
            assert question == expected.get((user, item), ("", ""))
            assert (question[1] == "") == (TITLES[item] is None)


def behaviors_of(text: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)


def test_candidates_of_a_request_share_all_but_their_title(workspace: Workspace) -> None:
    candidates = lists()[0]
    for retrieved_for, different in (("set", 1), ("candidate", 9)):
        questions = writer(workspace, configured(retrieved_for, "retrieved")).write(
            Rank(user_id=0, candidates=candidates), candidates
        )
        shown = {tuple(behaviors_of(text)) for _, text in questions if text}
        assert len(shown) <= different
        assert (len(shown) == 1) == (retrieved_for == "set")


def test_a_history_that_comes_with_a_request_is_retrieved_from(workspace: Workspace) -> None:
    """Items 1 and 2 are nearest to nothing that user 0 did; told, they are shown and no other."""
    history: list[Any] = [{"item_id": 1, "taken": True}, {"item_id": 2, "taken": False}, {"item_id": 3, "rating": 4.0}]
    asked = Rank.model_validate({"user_id": 0, "history": history, "candidates": [50, 51]})
    questions = writer(workspace, configured("set", "retrieved")).write(asked, [50, 51])
    assert [behaviors_of(text) for _, text in questions] == [['"Film 1"', '"Film 3" 4 stars']] * 2


def test_nobody_known_is_asked_about_without_behaviors(workspace: Workspace) -> None:
    questions = writer(workspace, configured("set", "retrieved")).write(Rank(user_id=99, candidates=[50]), [50])
    assert "Nothing is known" in questions[0][1]
    assert writer(workspace, configured("set", "retrieved")).write(Rank(user_id=0, candidates=[50]), []) == []
