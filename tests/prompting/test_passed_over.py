"""What a user passed over is quoted as such or not at all, by every prompt there is."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.cohorts.cohort_model import ProfileSettings, best_candidates, build_profiles, user_candidates
from owlrec.generation import EchoEngineConfig
from owlrec.prompting.frameworks import RankPromptConfig, rank_prompt
from owlrec.prompting.prompts import FRAMEWORKS, PromptConfig, cohort_prompts, user_prompts
from owlrec.ranking.behavior_retrieval import BehaviorRetriever
from owlrec.ranking.samples import behaviors_shown
from owlrec.refresh.events import EVENTS, taken_in
from owlrec.refresh.state import RefreshPrompts
from owlrec.scenario import SCENARIOS
from owlrec.schema import COHORTS, SAMPLES
from owlrec.sources.outcomes import Labels, taken, with_outcomes
from owlrec.sources.splits import (
    Behaviors,
    ItemCatalog,
    Samples,
    SplitConfig,
    SplitValues,
    Texts,
    histories,
    sample_rows,
    split_thresholds,
    with_histories,
)

N_USERS, N_ITEMS = 4, 12
LABELED = Labels(rule="column", rating_above=3)
EVENT_LOG = Labels(rule="column", rating_above=3, events=True)
CATALOG = ItemCatalog(pa.table({"item_id": range(N_ITEMS), "title": [f"Thing {chr(65 + i)}" for i in range(N_ITEMS)]}))
USERS = pa.table({"user_id": pa.array(range(N_USERS), pa.int64()), "raw_id": [str(u) for u in range(N_USERS)]})


def count(text: str) -> int:
    return len(text.split())


@st.composite
def logs(draw: st.DrawFn) -> pa.Table:
    key = st.tuples(st.integers(0, N_USERS - 1), st.integers(0, N_ITEMS - 1), st.integers(1, 30))
    keys = draw(st.lists(key, min_size=1, max_size=60, unique=True))
    took = draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys)))
    user, item, time = zip(*keys, strict=True)
    event = [draw(st.sampled_from(["click", "play", "purchase"])) if t else "impression" for t in took]
    label = list(map(float, took))
    return pa.table({"user_id": user, "item_id": item, "timestamp": time, "label": label, "event": event})


def quoted_as_taken(text: str, phrase: str) -> set[int]:
    """The items whose title stands in a text, but for the sentence that says what was passed over."""
    before, _, rest = text.partition(phrase)
    said = before + rest.partition(".")[2]
    return {i for i in range(N_ITEMS) if f'"Thing {chr(65 + i)}"' in said}


def took(behaviors: Behaviors, user: int) -> set[int]:
    return set(behaviors.item[(behaviors.user == user) & behaviors.taken].tolist())


@settings(max_examples=80, deadline=None)
@given(logs(), st.sampled_from([LABELED, EVENT_LOG]), st.booleans(), st.sampled_from(sorted(SCENARIOS)))
def test_nothing_passed_over_is_quoted_as_taken(log: pa.Table, labels: Labels, kept: bool, domain: str) -> None:
    scenario, split = SCENARIOS[domain], SplitConfig(passed_over=kept)
    behaviors = Behaviors.ordered(with_outcomes(log, labels, "log"))
    samples = Samples.of(behaviors, split)
    read = histories(behaviors, Texts.of(behaviors, split))

    for framework in FRAMEWORKS:
        config = PromptConfig(framework=framework)
        for prompt in user_prompts(USERS, read, CATALOG, config, scenario, count):
            assert not isinstance(prompt, Exception)
            for text in (prompt.text, prompt.facts):  # type: ignore[union-attr]
                assert quoted_as_taken(text, scenario.passed_over) <= took(behaviors, prompt.id)

    members = pa.Table.from_pylist(
        [
            {"kind": "user", "id": u, "as_of": 0, "cohort": "c", "facet": "liked", "source": "", "distance": 0.1}
            for u in range(N_USERS)
        ],
        schema=COHORTS,
    )
    best = best_candidates([user_candidates(members, USERS, read, scenario, N_USERS)], N_USERS)
    everything = {i for u in range(N_USERS) for i in took(behaviors, u)}
    profiles = build_profiles(best, {"c": N_USERS}, "user", CATALOG.titles, ProfileSettings())
    for prompt in cohort_prompts(profiles, scenario):
        assert quoted_as_taken(prompt.text, "disliked these or left them alone") <= everything

    thresholds = split_thresholds([SplitValues.of(behaviors, samples, split)], split)
    rows = sample_rows(behaviors, samples, split, thresholds, labels, np.arange(N_ITEMS))
    lists = {"item_id": behaviors.item, "rating": behaviors.rating, "label": behaviors.label}
    chosen = slice(None) if kept else behaviors.taken
    asked = with_histories(rows, pa.table({name: values[chosen] for name, values in lists.items()}))
    retriever = BehaviorRetriever(np.arange(N_ITEMS), np.eye(N_ITEMS, dtype=np.float32))
    for row in asked.select(SAMPLES.names).to_pylist():
        for shown in ("recent", "retrieved", "mixed"):
            titles = CATALOG.titles(np.array(row["history"], dtype=np.int64))
            behaved = behaviors_shown(row, titles, range(N_ITEMS), retriever, 5, shown)  # type: ignore[arg-type]
            _, text = rank_prompt(scenario, {}, "the candidate", RankPromptConfig(), count, **behaved)
            assert quoted_as_taken(text, "\0") <= took(behaviors, row["user_id"])

    table = log.append_column("rating", pa.nulls(len(log), pa.float32()))
    fresh = table.filter(pa.array(taken_in(table, labels))).select(EVENTS.names)
    for user in range(N_USERS):
        items = fresh.filter(pa.array(fresh["user_id"].to_numpy() == user))["item_id"].to_numpy()
        behaved_: list[tuple[str, Any]] = [(title, None) for title in CATALOG.titles(items)]
        text, _ = RefreshPrompts(scenario, EchoEngineConfig(type="echo"), 256, 128).after_text("", behaved_)
        assert quoted_as_taken(text, "\0") <= took(behaviors, user)


def test_what_was_passed_over_is_said_in_the_scenario_s_words() -> None:
    log = {"user_id": [1] * 4, "item_id": [0, 1, 2, 3], "timestamp": [1, 2, 3, 4], "label": [1.0, 0.0, 1.0, 1.0]}
    behaviors = Behaviors.ordered(with_outcomes(pa.table(log), LABELED, "log"))
    read = histories(behaviors, Texts.of(behaviors, SplitConfig(cuts=("now",))))
    (prompt,) = user_prompts(USERS, read, CATALOG, PromptConfig(), SCENARIOS["ads"], count)
    assert 'The user clicked these ads, oldest first: "Thing A"; "Thing C"; "Thing D". ' in prompt.text  # type: ignore[union-attr]
    assert 'The user was shown but did not click these: "Thing B".' in prompt.text  # type: ignore[union-attr]


@pytest.mark.parametrize("rating", [np.nan, 3.0])
def test_whatever_is_graded_was_taken(rating: float) -> None:
    assert taken(np.array([rating]), np.array([0.0])).tolist() == [not np.isnan(rating)]
