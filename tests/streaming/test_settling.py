"""The delta release, the vectors of earlier partitions, and what becomes of a user whose answer failed."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming_world import (  # type: ignore[import-not-found]
    DAY,
    DIM,
    HOUR,
    START,
    carry_out,
    log_events,
    plan_refresh,
    prompts_of,
    publish_world,
    vectors,
    watched,
)

from owlrec.encoding.semantic_ids import SemanticIdConfig
from owlrec.errors import ReleaseError
from owlrec.releases import current_release, list_releases, open_release, roll_back
from owlrec.releases.manifest import read_manifest
from owlrec.streaming.journal import pending_plan, read_position, read_state
from owlrec.streaming.settling import stack_partitions
from owlrec.streaming.state import State, read_users
from owlrec.workspace import Workspace

AWAY = [115, 116, 117]


def text_of(workspace: Workspace, user: int) -> str:
    with open_release(workspace) as release:
        (found,) = release.store.get("user", [user])
    return found.text if found else ""


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
        carry_out(world, plan_refresh(world, freeze_drift=0), partitions=3)
        seen.insert(0, vector_of(text_of(world, 1)))
        assert partitions_of(world, 1) == seen[:3]


def test_one_partition_is_only_the_newest(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    carry_out(world, plan_refresh(world), partitions=1)
    assert partitions_of(world, 1) == [vector_of(text_of(world, 1))]


def test_new_vectors_are_coded_by_the_releases_own_quantiser(world: Workspace) -> None:
    publish_world(world, "coded", ids=SemanticIdConfig(levels=2, codes_per_level=4, method="kmeans"))
    with open_release(world) as release:
        before, _ = release.store.codes("user", range(1, 41))
        quantiser = release.quantisers()["user"]
    assert before[:, -1].max() > 0  # 40 users on 16 codes: some share them
    for day in (1, 2):  # the text of the second day is as long as that of the first, and so is its vector the same
        log_events(world, [*watched(1, AWAY, START + day * DAY), *watched(2, AWAY, START + day * DAY)], str(day))
        carry_out(world, plan_refresh(world, freeze_drift=0))
        with open_release(world) as release:
            assert release.manifest.delta
            assert release.manifest.codes == {"user": 2}
            after, coded = release.store.codes("user", range(1, 41))
            newest = release.store.vectors("user", [1, 2])[0]
        assert coded.all()
        np.testing.assert_array_equal(after[:2, :-1], quantiser.encode(newest))
        np.testing.assert_array_equal(after[2:], before[2:])
        assert len(np.unique(after, axis=0)) == 40
        assert after[:2, -1].tolist() == [before[:, -1].max() + 1, before[:, -1].max() + 2]


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


def test_carrying_out_again_makes_no_twin(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    with monkeypatch.context() as patch:
        patch.setattr("streaming_world.finish", lambda *_: None)  # as if it had been killed there
        carry_out(world, plan)
    delta = current_release(world)
    later = publish_world(world, "second")  # somebody publishes in between
    assert pending_plan(world) == plan
    position = carry_out(world, plan)
    assert position.release == delta
    assert current_release(world) == later
    assert len(list_releases(world)) == 3


def test_plan_goes_on_top_of_what_became_current_meanwhile(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    later = publish_world(world, "second")
    assert plan.parent != later
    carry_out(world, plan)
    assert read_manifest(world, current_release(world)).parent == later
    assert text_of(world, 1).startswith("Renewed")


def test_plan_whose_parent_was_rolled_back_is_not_published(world: Workspace) -> None:
    publish_world(world, "second")
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    roll_back(world)
    with pytest.raises(ReleaseError, match=f"does not come after {plan.parent}"):
        carry_out(world, plan)


def test_vectors_are_encoded_once(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    with monkeypatch.context() as patch:
        patch.setattr("owlrec.streaming.settling.publish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            carry_out(world, plan)
    monkeypatch.setattr("owlrec.streaming.settling.Encoder", None)
    assert carry_out(world, plan).release == current_release(world)


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
                plan = plan_refresh(copy, freeze_behaviours=4, max_lateness_days=1000)
                if plan is not None:
                    carry_out(copy, plan, failed)
        position = read_position(copy)
        state = read_state(copy, position) if position else State(n_shards=1)
        users = [u for shard in state.shards for u in read_users(copy, state, shard, "minilm")]
        met = {u.user_id for u in users}
        kept = [(u.user_id, *key) for u in users for key in [*u.seen, *(b.key for b in u.short)]]
        assert sorted(kept) == sorted(key for key in accepted if key[0] in met)
        assert {user for events, _ in rounds for user, _, _ in events} == met


def test_old_plans_and_states_are_swept_away(world: Workspace) -> None:
    for day in range(1, 5):
        log_events(world, watched(1, AWAY, START + day * DAY), str(day))
        position = carry_out(world, plan_refresh(world, freeze_drift=0))
    assert [f"streaming/states/{name}" for name in world.names("streaming", "states")] == [position.state]
    assert len(world.names("streaming", "plans")) == 1
    assert not Path(world.path("streaming", "PENDING")).exists()
