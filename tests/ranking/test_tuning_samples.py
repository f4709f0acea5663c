"""ReiT's data: nested shots, each sample asked in both ways side by side, nothing of the future, no silent loss."""

import re
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import write_samples

from owlrec.errors import RecipeError, SchemaError
from owlrec.ids import shard_of
from owlrec.prompting.frameworks import RankPromptConfig
from owlrec.ranking import samples as samples_module
from owlrec.ranking.behavior_retrieval import BehaviorRetriever, with_candidates
from owlrec.ranking.samples import TUNING_ROWS, Shown, TuningData, ask_about, draw_samples, draw_shots, read_users
from owlrec.scenario import get_scenario
from owlrec.schema import SAMPLES
from owlrec.sources.outcomes import Labels
from owlrec.sources.splits import ItemCatalog, SplitConfig, build_samples
from owlrec.workspace import Workspace

N_ITEMS = 12
UNTITLED, INVISIBLE = 10, 11
TITLES = [f"Film {i:02d}" for i in range(10)] + [None, "\u200b"]
CATALOG = ItemCatalog(pa.table({"item_id": pa.array(range(N_ITEMS), pa.int64()), "title": TITLES}))
# Even items are alike, and so are odd ones.
RETRIEVER = BehaviorRetriever(np.arange(N_ITEMS), np.array([[1, 0], [0, 1]] * 6, dtype=np.float32))
USERS = pa.table({"user_id": pa.array([1, 2], pa.int64()), "gender": ["female", None], "age": pa.array([33, 44])})


def sample(**changes: Any) -> dict[str, Any]:
    usual = {"user_id": 1, "item_id": 8, "label": 1.0, "timestamp": 1000, "split": "train"}
    history = {"history": [0, 1, 2, 3, 5, 7], "history_ratings": [1.0, 2.0, 3.0, 4.0, 5.0, 1.0]}
    row = {**usual, **history, **changes}
    return {"history_labels": [1.0] * len(row["history"] or []), **row}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SAMPLES)


def built(
    samples: pa.Table,
    *,
    shots: int | None = None,
    k: int = 3,
    ways: tuple[Shown, ...] = ("recent", "retrieved"),
    retrieved_for: Literal["set", "candidate"] = "candidate",
) -> TuningData:
    """What is asked about the first `shots` of the train split, each candidate by itself."""
    drawn = samples.take(pa.array(draw_shots(samples, shots, 0)))
    return asked(with_candidates(drawn, samples, CATALOG.ids), k=k, ways=ways, retrieved_for=retrieved_for)


def asked(
    samples: pa.Table, *, k: int, ways: tuple[Shown, ...], retrieved_for: Literal["set", "candidate"] = "candidate"
) -> TuningData:
    movies, prompt = get_scenario("movies"), RankPromptConfig(retrieved_for=retrieved_for)
    return ask_about(samples, USERS, CATALOG, RETRIEVER, movies, prompt, lambda text: len(text.split()), k=k, ways=ways)


def shown(text: str) -> list[tuple[int, str]]:
    """(item, rating) of the numbered behaviors."""
    return [(int(item), rating) for item, rating in re.findall(r'^\d+\. "Film (\d+)" ?(.*)$', text, re.MULTILINE)]


def many(n: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return table(
        *(
            sample(
                user_id=int(rng.integers(1, 9)),
                item_id=int(rng.integers(0, N_ITEMS)),
                timestamp=1000 + i,
                label=float(rng.integers(2)),
                history=(history := rng.integers(0, N_ITEMS, rng.integers(0, 9)).tolist()),
                history_ratings=[float(r) for r in rng.integers(1, 6, len(history))],
                split=str(rng.choice(["train", "train", "valid", "test"])),
            )
            for i in range(n)
        )
    )


def test_a_sample_is_asked_with_recent_then_with_retrieved_behaviors() -> None:
    data = built(table(sample()))
    assert data.rows.schema == TUNING_ROWS
    recent, retrieved = data.rows.to_pylist()
    assert (recent["shown"], retrieved["shown"]) == ("recent", "retrieved")
    assert shown(recent["text"]) == [(3, "4 stars"), (5, "5 stars"), (7, "1 star")]
    # All even ones, then the newest odd one, in the order in which they happened.
    assert shown(retrieved["text"]) == [(0, "1 star"), (2, "3 stars"), (7, "1 star")]
    for row in (recent, retrieved):
        assert (row["user_id"], row["item_id"], row["timestamp"], row["answer"]) == (1, 8, 1000, "Yes")
        assert row["text"].startswith("The user's gender is female and age is 33.\n")
        assert '"Film 08"?' in row["text"]
        assert row["system"]


def test_samples_of_one_moment_are_shown_the_same_and_as_like_as_one_of_them() -> None:
    """Even items are alike, and so are odd ones: 8 by itself is shown 0, 2 and the newest; together with 9, the newest
    of both."""
    pair = table(sample(), sample(item_id=9))
    one, other = built(pair, ways=("retrieved",), k=2, retrieved_for="candidate").rows["text"].to_pylist()
    assert ([i for i, _ in shown(one)], [i for i, _ in shown(other)]) == ([0, 2], [5, 7])
    one, other = built(pair, ways=("retrieved",), k=2, retrieved_for="set").rows["text"].to_pylist()
    assert [i for i, _ in shown(one)] == [i for i, _ in shown(other)] == [2, 7]


@pytest.mark.parametrize("ways", [("recent", "retrieved"), ("retrieved", "recent"), ("recent",), ("retrieved",)])
def test_rows_are_interleaved_in_the_configured_ways(ways: tuple[Shown, ...]) -> None:
    rows = built(many(60), ways=ways).rows
    assert rows["shown"].to_pylist() == list(ways) * (rows.num_rows // len(ways))
    keys = rows.select(["user_id", "item_id", "timestamp"]).to_pylist()
    for start in range(0, len(keys), len(ways)):
        assert keys[start : start + len(ways)] == [keys[start]] * len(ways)


def test_a_mixed_prompt_shows_recent_and_older_ones_like_the_candidate_and_none_twice() -> None:
    (row,) = built(table(sample()), ways=("mixed",)).rows.to_pylist()
    assert row["shown"] == "mixed"
    lately, _, alike = row["text"].partition("Of all movies")
    # Of three, the two newest; of those before them the newest that is even, as the candidate is.
    assert (shown(alike), shown(lately)) == ([(2, "3 stars")], [(5, "5 stars"), (7, "1 star")])


@given(st.lists(st.integers(0, N_ITEMS + 1), max_size=9), st.integers(1, 6))
def test_a_mixed_prompt_has_as_many_behaviors_as_any_other(history: list[int], k: int) -> None:
    one = table(sample(history=history, history_ratings=None))
    ways: tuple[Shown, ...] = ("recent", "retrieved", "mixed")
    counts = [len(shown(row["text"])) for row in built(one, ways=ways, k=k).rows.to_pylist()]
    assert counts == [min(k, sum(item < UNTITLED for item in history))] * 3


def test_any_split_can_be_asked_about() -> None:
    samples = many(200)
    for split in ("valid", "test"):
        rows = draw_shots(samples, None, 0, split)
        drawn = with_candidates(samples.take(pa.array(rows)), samples, CATALOG.ids)
        data = asked(drawn, k=3, ways=("recent",))
        expected = [row for row in samples.to_pylist() if row["split"] == split]
        assert data.counts["samples"] == len(expected)
        assert {row["timestamp"] for row in data.rows.to_pylist()} <= {row["timestamp"] for row in expected}


def test_fewer_shots_are_the_beginning_of_more() -> None:
    samples = many(400)
    texts = {shots: built(samples, shots=shots).rows.to_pylist() for shots in (4, 16, 64, None)}
    for few, more in ((4, 16), (16, 64), (64, None)):
        assert texts[few] == texts[more][: len(texts[few])]
        assert 0 < len(texts[few]) < len(texts[more])


def test_shots_are_the_seeds_and_not_the_first_rows() -> None:
    samples = many(400)
    drawn = {seed: draw_shots(samples, 50, seed).tolist() for seed in (0, 1)}
    assert drawn[0] != drawn[1]
    assert drawn[0] != sorted(drawn[0])
    assert drawn[0] == draw_shots(samples, 50, 0).tolist()


@given(st.permutations(range(40)), st.integers(0, 39))
def test_order_of_shots_depends_neither_on_the_tables_order_nor_on_other_samples(order: list[int], left: int) -> None:
    samples = many(40, seed=3)

    def drawn(rows: pa.Table) -> list[int]:
        return rows.take(pa.array(draw_shots(rows, None, 0)))["timestamp"].to_pylist()

    expected = drawn(samples)
    assert drawn(samples.take(pa.array(order))) == expected
    gone = samples["timestamp"][left].as_py()
    without = samples.take(pa.array([i for i in range(40) if i != left]))
    assert drawn(without) == [timestamp for timestamp in expected if timestamp != gone]


@pytest.mark.parametrize("n_shards", [1, 4])
@pytest.mark.parametrize("limit", [1, 20, None])
def test_shards_are_drawn_from_as_the_whole_table_is(workspace: Workspace, n_shards: int, limit: int | None) -> None:
    samples = many(200)
    workspace.fix_shards({"user": n_shards})
    write_samples(workspace, samples)
    for split, seed in (("train", 0), ("test", 3)):
        expected = samples.take(pa.array(draw_shots(samples, None, seed, split)[:limit]))
        expected = with_candidates(expected, samples, CATALOG.ids)
        assert draw_samples(workspace, split, limit, seed, CATALOG.ids).to_pylist() == expected.to_pylist()
    with pytest.raises(RecipeError, match="asks for 201 shots"):
        draw_samples(workspace, "train", 201, 0, CATALOG.ids, exactly=True)


def test_a_draw_holds_few_rows_and_reads_few_histories(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.fix_shards({"user": 8})
    write_samples(workspace, many(300))
    read: list[tuple[int, bool]] = []
    original = samples_module.read_samples

    def spy(workspace: Workspace, number: int, columns: Any = None) -> pa.Table:
        read.append((number, columns is None))
        return original(workspace, number, columns)

    monkeypatch.setattr(samples_module, "read_samples", spy)
    drawn = draw_samples(workspace, "train", 1, 0, CATALOG.ids)
    assert [number for number, _ in read[:8]] == list(range(8))
    assert [whole for _, whole in read] == [False] * 8 + [True]
    assert read[-1][0] == shard_of(drawn["user_id"].to_numpy(), 8)[0]


def test_users_are_read_from_their_shards(workspace: Workspace) -> None:
    workspace.write_table("users", USERS, key="user_id", n_shards=4)
    assert read_users(workspace, np.array([2, 2, 9])).to_pylist() == [{"user_id": 2, "gender": None, "age": 44}]
    assert read_users(workspace, np.zeros(0, np.int64)).schema == USERS.schema


def test_only_the_train_split_is_drawn_from() -> None:
    samples = many(200)
    train = [row for row in samples.to_pylist() if row["split"] == "train"]
    data = built(samples)
    assert data.counts["samples"] == len(train)
    assert {row["timestamp"] for row in data.rows.to_pylist()} <= {row["timestamp"] for row in train}
    with pytest.raises(RecipeError, match=f"asks for {len(train) + 1} shots, but the train split has {len(train)}"):
        built(samples, shots=len(train) + 1)


def test_counts_add_up() -> None:
    data = built(many(300))
    skipped = data.counts["skipped_without_title"]
    assert skipped > 0
    assert data.counts["rows"] == data.rows.num_rows == 2 * (data.counts["samples"] - skipped)
    assert data.counts["answered_yes"] == data.rows["answer"].to_pylist().count("Yes")
    assert set(data.rows["answer"].to_pylist()) == {"Yes", "No"}


@pytest.mark.parametrize("item", [UNTITLED, INVISIBLE, 99])
def test_a_candidate_without_text_is_skipped_and_counted(item: int) -> None:
    data = built(table(sample(item_id=item), sample(user_id=2, label=0.0)))
    assert data.counts == {"samples": 2, "skipped_without_title": 1, "rows": 2, "answered_yes": 0}
    assert data.rows["user_id"].to_pylist() == [2, 2]


def test_behaviors_without_a_title_leave_their_place_to_others() -> None:
    history = [4, 1, UNTITLED, 99, 3, INVISIBLE]
    recent, retrieved = built(table(sample(history=history, history_ratings=None)), k=2).rows.to_pylist()
    assert shown(recent["text"]) == [(1, ""), (3, "")]
    assert shown(retrieved["text"]) == [(4, ""), (3, "")]


@pytest.mark.parametrize("history", [[], None])
def test_a_user_without_history_or_profile_is_asked_about_all_the_same(history: list[int] | None) -> None:
    rows = built(table(sample(user_id=7, history=history, history_ratings=history))).rows.to_pylist()
    assert len(rows) == 2
    assert all(row["text"].startswith("Nothing is known of the user's viewing history.\n") for row in rows)


@pytest.mark.parametrize("label", [0.5, 4.0, -1.0, float("nan"), None])
def test_a_label_that_is_neither_yes_nor_no_is_refused(label: float | None) -> None:
    with pytest.raises(SchemaError, match="user 1, item 8, timestamp 1000: the label is"):
        built(table(sample(label=label)))


def test_ratings_of_another_history_are_refused() -> None:
    with pytest.raises(SchemaError, match="6 values in history, but 1 in history_ratings"):
        built(table(sample(history_ratings=[1.0])))


def test_nothing_at_or_after_a_samples_own_moment_is_shown_and_order_is_kept() -> None:
    rng = np.random.default_rng(5)
    n, users = 400, 12
    # Coarse clocks, so that several behaviors share a moment; an item's rating says when it happened.
    times = rng.integers(0, 40, n) * 86_400_000 + 10**12
    interactions = pa.table(
        {
            "user_id": rng.integers(1, users, n),
            "item_id": rng.integers(0, 10, n),
            "rating": (1 + (times - 10**12) // 86_400_000).astype(np.float32),
            "timestamp": times,
        }
    )
    samples = build_samples(
        interactions, SplitConfig(history_length=30), Labels(rule="rating_above", rating_above=20)
    ).samples
    rows = built(samples, k=5).rows.to_pylist()
    assert sum(bool(shown(row["text"])) for row in rows) > 100
    for row in rows:
        days = [int(rating.split()[0]) for _, rating in shown(row["text"])]
        assert days == sorted(days)
        assert all(day < 1 + (row["timestamp"] - 10**12) // 86_400_000 for day in days)
        assert len(days) <= 5
        assert days or "Nothing is known" in row["text"]
