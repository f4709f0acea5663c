"""The delta release, the vectors of earlier partitions, and what becomes of a user whose answer failed."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refresh_world import (  # type: ignore[import-not-found]
    DAY,
    DIM,
    HOUR,
    START,
    AnsweredRefresh,
    carry_out,
    log_events,
    plan_refresh,
    prompts_of,
    publish_world,
    recipe_for,
    vectors,
    watched,
)

from owlrec.encoding.compression import SemanticIdConfig
from owlrec.encoding.vectors import PARTITIONS, EncoderConfig, VectorShards, partitions_folder
from owlrec.errors import ReleaseError, WorkspaceError
from owlrec.generation.job import GenerateConfig
from owlrec.refresh.apply import interrupted_plan, stack_partitions, too_many_dead
from owlrec.refresh.state import CLAIM, dead_files, read_state, write_state
from owlrec.releases import current_release, list_releases, open_release, roll_back
from owlrec.releases.format import read_manifest
from owlrec.runs import upkeep
from owlrec.runs.upkeep import double_shards
from owlrec.shards import Card, claimed
from owlrec.storage import PointerMoved
from owlrec.workspace import Workspace

AWAY = [115, 116, 117]


def text_of(workspace: Workspace, user: int) -> str:
    with open_release(workspace) as release:
        (knowledge,) = release.store.get("user", [user])
    return knowledge.text if knowledge else ""


def partitions_of(workspace: Workspace, user: int, n: int = 8) -> list[list[float]]:
    with open_release(workspace) as release:
        rows, there = release.store.partitions("user", [user], n)
    return rows[0][there[0]].tolist()


def vector_of(text: str) -> list[float]:
    return [float(np.float16(len(text) / 128)), 0, 0, 1]


def test_new_text_stands_on_the_parent_and_nothing_else_changes(world: Workspace) -> None:
    full = current_release(world)
    log_events(world, watched(1, AWAY))
    position = carry_out(world, plan_refresh(world))
    assert current_release(world) == position.release != full
    delta = read_manifest(world, position.release)
    assert (delta.delta, delta.parent, delta.knowledge) == (True, full, {"user": 1})
    assert text_of(world, 1) == f"Renewed text of user 1 as of {START + DAY + 2 * HOUR}."
    assert text_of(world, 2) == "User 2 likes what is told slowly."
    assert partitions_of(world, 2) == [[2 / 64] * DIM]


def test_earlier_vectors_move_on_and_the_oldest_falls_out(world: Workspace) -> None:
    seen = [[1 / 64] * DIM]
    for day in range(1, 4):
        log_events(world, watched(1, AWAY, START + day * DAY), str(day))
        carry_out(world, plan_refresh(world, drift=0, partitions=3))
        seen.insert(0, vector_of(text_of(world, 1)))
        assert partitions_of(world, 1) == seen[:3]


def test_one_partition_is_only_the_newest(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    carry_out(world, plan_refresh(world, partitions=1))
    assert partitions_of(world, 1) == [vector_of(text_of(world, 1))]


def test_new_vectors_are_coded_by_the_releases_own_quantizer(world: Workspace) -> None:
    publish_world(world, "coded", ids=SemanticIdConfig(levels=2, codes_per_level=4))
    with open_release(world) as release:
        before, _ = release.store.codes("user", range(1, 41))
        quantizer = release.quantizers()["user"]
    for day in (1, 2):
        log_events(world, [*watched(1, AWAY, START + day * DAY), *watched(2, AWAY, START + day * DAY)], str(day))
        carry_out(world, plan_refresh(world, drift=0))
        with open_release(world) as release:
            assert release.manifest.delta
            assert release.manifest.codes == {"user": 2}
            after, coded = release.store.codes("user", range(1, 41))
            newest = release.store.vectors("user", [1, 2])[0]
        assert coded.all()
        np.testing.assert_array_equal(after[:2, :-1], quantizer.encode(newest))
        np.testing.assert_array_equal(after[2:], before[2:])
        assert after[:2, -1].tolist() == before[:2, -1].tolist()  # a hash of the id tells equal codes apart


def test_user_without_earlier_vectors_has_one_partition(world: Workspace) -> None:
    with open_release(world) as release:
        new = vectors("user", {1: np.ones(DIM), 99: np.zeros(DIM)})
        table = stack_partitions(new, release.store, 4)
        assert sorted(zip(table["id"].to_pylist(), table["partition"].to_pylist(), strict=True)) == [
            (1, 0), (1, 1), (99, 0),
        ]  # fmt: skip
        assert stack_partitions(new.slice(0, 0), release.store, 4).num_rows == 0


def test_failed_answer_keeps_the_old_text_and_asks_again_only_when_the_user_has_moved_on(world: Workspace) -> None:
    log_events(world, [*watched(1, AWAY), *watched(2, AWAY)], "one")
    carry_out(world, plan_refresh(world), failed=[1])
    assert text_of(world, 1) == "User 1 likes what is told slowly."
    assert text_of(world, 2).startswith("Renewed")
    log_events(world, watched(1, [118, 119], START + 2 * DAY), "two")
    plan = plan_refresh(world)
    assert plan.calls == 0
    carry_out(world, plan)
    log_events(world, watched(1, [120], START + 3 * DAY), "three")
    plan = plan_refresh(world)
    assert prompts_of(world, plan)[1]["text"].count('"Film') == 6  # what failed is asked about, too
    carry_out(world, plan)
    assert text_of(world, 1).startswith("Renewed")


def test_backlog_leaves_a_vector_of_each_partition_and_the_newest_text(world: Workspace) -> None:
    log_events(world, watched(1, range(100, 125)))
    planned = plan_refresh(world, history_tokens=30, partitions=6)  # six titles of five words
    state = carry_out(world, planned)
    texts = [f"Renewed text of user 1 as of {START + DAY + hour * HOUR}." for hour in (5, 11, 17, 23, 24)]
    assert text_of(world, 1) == texts[-1]
    assert partitions_of(world, 1) == [*(vector_of(text) for text in reversed(texts)), [1 / 64] * DIM]
    assert read_manifest(world, state.release).knowledge == {"user": 1}
    (user,) = [u for n in state.shards for u in state.read_users(world, n, "minilm")]
    assert (user.short, user.n_partitions, user.text_as_of) == ((), 5, START + DAY + 24 * HOUR)


def stored(world: Workspace) -> dict[tuple[int, int], list[float]]:
    """The vectors of all partitions that refreshes have read, by user and as_of."""
    shards = VectorShards(world, partitions_folder(EncoderConfig().identity), PARTITIONS)
    read = [shard for number in shards.numbers if (shard := shards.shard(number)) is not None]
    for shard in read:
        keys = list(zip(shard.ids.tolist(), shard.as_of.tolist(), strict=True))
        assert keys == sorted(set(keys))
        assert shard.encoder == EncoderConfig().identity
    return {
        (id_, moment): vector
        for shard in read
        for id_, moment, vector in zip(shard.ids.tolist(), shard.as_of.tolist(), shard.vectors.tolist(), strict=True)
    }


def test_vectors_of_all_partitions_are_kept_where_arms_read_them(world: Workspace) -> None:
    publish_world(world, "coded", ids=SemanticIdConfig(levels=2, codes_per_level=4))
    log_events(world, watched(1, range(100, 112)))
    carry_out(world, plan_refresh(world, history_tokens=30, partitions=1))
    log_events(world, [*watched(1, AWAY, START + 3 * DAY), *watched(2, AWAY, START + 3 * DAY)], "two")
    carry_out(world, plan_refresh(world, drift=0, partitions=1))
    moments = {
        1: [START + DAY + 5 * HOUR, START + DAY + 11 * HOUR, START + 3 * DAY + 2 * HOUR],
        2: [START + 3 * DAY + 2 * HOUR],
    }
    assert stored(world) == {
        (user, as_of): vector_of(f"Renewed text of user {user} as of {as_of}.")
        for user, user_moments in moments.items()
        for as_of in user_moments
    }
    assert len(partitions_of(world, 1)) == 1  # the release keeps what it was told to
    assert double_shards(world, ["user"]) == {"user": 8}
    assert len(stored(world)) == 4


def test_backlog_is_frozen_as_far_as_it_was_answered(world: Workspace) -> None:
    log_events(world, watched(1, range(100, 125)))
    failed = [("user", 1, START + DAY + hour * HOUR) for hour in (17, 23, 24)]  # what goes on from a failure fails
    state = carry_out(world, plan_refresh(world, history_tokens=30), failed)
    (user,) = [u for n in state.shards for u in state.read_users(world, n, "minilm")]
    assert (len(user.short), user.n_partitions, user.held) == (13, 2, 13)
    assert (user.text_as_of, state.counts["renewed"]) == (START + DAY + 11 * HOUR, 2)
    assert text_of(world, 1).endswith(f"as of {START + DAY + 11 * HOUR}.")


def test_older_partitions_make_room_for_those_of_one_refresh(world: Workspace) -> None:
    with open_release(world) as release:
        new = pa.concat_tables([vectors("user", {1: np.full(DIM, n), 2: np.full(DIM, 10 + n)}) for n in range(3)])
        table = stack_partitions(new.sort_by("id"), release.store, 2)
        assert sorted(
            zip(
                table["id"].to_pylist(),
                table["partition"].to_pylist(),
                [v[0] for v in table["vector"].to_pylist()],
                strict=True,
            )
        ) == [(1, 0, 2), (1, 1, 1), (2, 0, 12), (2, 1, 11)]
        table = stack_partitions(new.sort_by("id"), release.store, 4)
        assert table.num_rows == 8
        assert {v[0] for v in table.filter(pc.equal(table["partition"], 3))["vector"].to_pylist()} == {1 / 64, 2 / 64}


def test_refresh_of_which_every_answer_fails_publishes_nothing_and_moves_on(world: Workspace) -> None:
    full = current_release(world)
    log_events(world, watched(1, AWAY))
    position = carry_out(world, plan_refresh(world), failed=[1])
    assert (position.release, current_release(world)) == (full, full)
    assert position.watermark == START + DAY + 2 * HOUR
    assert plan_refresh(world) is None


def test_refresh_without_calls_moves_the_watermark_and_no_release(world: Workspace) -> None:
    full = current_release(world)
    log_events(world, watched(1, [105]))
    position = carry_out(world, plan_refresh(world))
    assert (position.watermark, position.release, len(list_releases(world))) == (START + DAY, full, 1)


def killed(world: Workspace, plan: object, monkeypatch: pytest.MonkeyPatch, step: str, **options: object) -> None:
    """Carries a plan out up to a step of runs.refresh or refresh.apply."""
    with monkeypatch.context() as patch:
        patch.setattr(step, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            carry_out(world, plan, **options)


def test_a_delta_that_was_published_is_only_settled(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    killed(world, plan, monkeypatch, "owlrec.runs.upkeep.settle")
    delta = current_release(world)
    later = publish_world(world, "second")  # somebody publishes in between
    assert interrupted_plan(world, "", "settings that changed since") == plan.plan
    monkeypatch.setattr(AnsweredRefresh, "_ask", None)  # nobody is asked again
    state = carry_out(world, plan)
    assert state.release == delta
    assert state.counts["renewed"] == 1
    assert current_release(world) == later
    assert len(list_releases(world)) == 3
    assert interrupted_plan(world, state.name, "") is None


def test_what_became_current_meanwhile_stays_and_the_answers_are_kept_for_the_next_plan(
    world: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    later = publish_world(world, "second")
    with pytest.raises(ReleaseError, match=f"built on {plan.plan.parent}, but {later}"):
        carry_out(world, plan)
    assert current_release(world) == later
    assert interrupted_plan(world, "", plan.refresh.planner.recipe) is None
    assert not world.exists(plan.plan.folder)
    again = plan_refresh(world)
    assert again.plan.parent == later
    state = carry_out(world, again)
    assert read_manifest(world, state.release).parent == later
    assert text_of(world, 1).startswith("Renewed")
    assert len(world.names("knowledge")) == 1  # where the texts of both plans are


def test_plan_whose_parent_was_rolled_back_is_not_published(world: Workspace) -> None:
    first = current_release(world)
    publish_world(world, "second")
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    roll_back(world)
    with pytest.raises(ReleaseError, match=f"built on {plan.plan.parent}, but {first} is"):
        carry_out(world, plan)
    assert current_release(world) == first
    assert read_state(world).name == ""


def test_vectors_are_encoded_once(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    killed(world, plan, monkeypatch, "owlrec.refresh.apply.build_release")
    monkeypatch.setattr("owlrec.encoding.vectors.Encoder", None)
    assert carry_out(world, plan).release == current_release(world)


def test_second_refresh_does_not_move_what_the_first_has_moved(
    world: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_events(world, watched(1, [105]), "one")
    plan = plan_refresh(world)
    first = carry_out(world, plan)
    with pytest.raises(PointerMoved):
        write_state(world, first.model_copy(update={"name": "other"}), plan.base.name)
    assert read_state(world) == first


def test_two_refreshes_at_once_are_told(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    with claimed(world, CLAIM, "refresh"), pytest.raises(WorkspaceError, match="refresh is already running"):
        upkeep.run(recipe_for(world), world)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 4), st.integers(100, 129), st.integers(0, 40)), max_size=12),
            st.sets(st.integers(1, 4)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_event_is_lost_or_doubled_however_they_are_split(
    world: Workspace, rounds: list[tuple[list[tuple[int, int, int]], set[int]]]
) -> None:
    """Rounds bring events of four users, repeated and late, and answers about some of them fail."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Workspace(shutil.copytree(world.root, Path(folder) / "ws"))
        held = copy.read_table("interactions").to_pylist()
        accepted = {(r["user_id"], r["timestamp"], r["item_id"]) for r in held if r["user_id"] <= 4}
        for number, (events, failed) in enumerate(rounds):
            rows = [(user, item, 4.0, START + DAY + hour * HOUR) for user, item, hour in events]
            accepted |= {(user, time, item) for user, item, _, time in rows}
            log_events(copy, rows, str(number))
            if any(events for events, _ in rounds[: number + 1]):
                # With such a lateness nothing that was read is forgotten, so that it can be counted.
                plan = plan_refresh(copy, freeze_behaviors=4, max_lateness_days=1000)
                if plan is not None:
                    carry_out(copy, plan, failed)
        state = read_state(copy)
        users = [u for shard in state.shards for u in state.read_users(copy, shard, "minilm")]
        met = {u.user_id for u in users}
        kept = [(u.user_id, *key) for u in users for key in [*u.seen, *(b.key for b in u.short)]]
        assert sorted(kept) == sorted(key for key in accepted if key[0] in met)
        assert {user for events, _ in rounds for user, _, _ in events} == met


def test_what_earlier_refreshes_left_is_swept_away(world: Workspace) -> None:
    for day in range(1, 5):
        log_events(world, [*watched(1, AWAY, START + day * DAY), *watched(99, [100], START + day * DAY)], str(day))
        state = carry_out(world, plan_refresh(world, drift=0))
    files = [path for path in world.entries("refresh") if path != "CURRENT"]
    others = [path for path in files if not path.startswith(state.name)]
    named = {f for s in state.shards.values() for f in (s.file, s.deferred)}
    assert len(dead_files(world)) == 4  # one for each event of user 99
    assert all("/dead/" in path or f"refresh/{path}" in named for path in others)


@pytest.mark.parametrize(
    ("shards", "too_many"),
    [
        ([], False),
        ([(1, 1)], False),
        ([(5, 5), (5, 5)], False),  # of ten rows a share says nothing
        ([(6, 6), (5, 5)], True),
        ([(1000, 11)], False),
        ([(300, 11), (250, 0)], False),
        ([(300, 11), (249, 0)], True),
    ],
)
def test_when_failures_are_too_many(shards: list[tuple[int, int]], too_many: bool) -> None:
    cards = [Card(stage="refresh", fingerprint="", rows_in=rows, rows_dead=dead) for rows, dead in shards]
    assert too_many_dead(cards, GenerateConfig(max_dead_share=0.02)) == too_many
