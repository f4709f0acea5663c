"""What a refresh leaves of what users did last, whether or not their texts are renewed."""

import numpy as np
import pytest
from refresh_world import (  # type: ignore[import-not-found]
    DAY,
    HOUR,
    START,
    carry_out,
    log_events,
    plan_refresh,
    publish_world,
    recipe_for,
    watched,
)

from owlrec.refresh.state import Behavior, UserState, renewed_behaviors
from owlrec.releases import current_release, list_releases, open_release
from owlrec.releases.format import read_manifest
from owlrec.releases.retention import compact
from owlrec.runs import upkeep
from owlrec.workspace import Workspace


@pytest.fixture
def kept(world: Workspace) -> Workspace:
    """The world with a release that keeps four behaviors of each user."""
    publish_world(world, "with behaviors", history_length=4)
    return world


def items_of(workspace: Workspace, user: int) -> list[int]:
    with open_release(workspace) as release:
        (rows,) = release.store.behaviors([user])
    return [] if rows is None else rows["item"].tolist()


def test_events_too_few_for_a_text_reach_the_release(kept: Workspace) -> None:
    full = current_release(kept)
    assert items_of(kept, 1) == [101, 102, 103, 104]  # of five
    log_events(kept, watched(1, [120]))
    state = carry_out(kept, plan_refresh(kept))
    delta = read_manifest(kept, state.release)
    assert (delta.parent, delta.knowledge, delta.behaviors, delta.history_length) == (full, {}, {"user": 1}, 4)
    assert state.calls == 0
    assert items_of(kept, 1) == [102, 103, 104, 120]
    assert items_of(kept, 2) == [102, 103, 104, 105]
    with open_release(kept) as release:
        (rows,) = release.store.behaviors([1])
        assert rows[-1].tolist() == (START + DAY, 120, 4.0, 1.0, 0)
        assert release.store.get("user", [1])[0].as_of == START


def test_texts_and_behaviors_go_into_one_delta(kept: Workspace) -> None:
    log_events(kept, [*watched(1, [115, 116, 117]), *watched(2, [120])])
    state = carry_out(kept, plan_refresh(kept))
    delta = read_manifest(kept, state.release)
    assert (delta.knowledge, delta.behaviors) == ({"user": 1}, {"user": 2})
    assert items_of(kept, 1) == [104, 115, 116, 117]
    log_events(kept, watched(2, [121], START + 2 * DAY), "two")
    carry_out(kept, plan_refresh(kept))
    assert items_of(kept, 2) == [104, 105, 120, 121]
    compact(kept)
    assert items_of(kept, 1) == [104, 115, 116, 117]
    assert items_of(kept, 2)[-2:] == [120, 121]


def test_a_failed_answer_keeps_nobody_from_their_behaviors(kept: Workspace) -> None:
    log_events(kept, watched(1, [115, 116, 117]))
    state = carry_out(kept, plan_refresh(kept), failed=[1])
    assert read_manifest(kept, state.release).knowledge == {}
    assert items_of(kept, 1) == [104, 115, 116, 117]


def test_what_is_known_already_is_not_doubled_and_order_is_by_time_then_item(kept: Workspace) -> None:
    same = watched(1, [105, 104], START + DAY)
    late = [(1, 110, 3.0, START + HOUR // 2), (1, 104, 4.0, START)]  # the last stands in the tables
    log_events(kept, [*same, (1, 100, 1.0, START + DAY), *late])
    carry_out(kept, plan_refresh(kept))
    assert items_of(kept, 1) == [110, 100, 105, 104]
    releases = len(list_releases(kept))
    log_events(kept, same, "again")
    carry_out(kept, plan_refresh(kept))
    assert len(list_releases(kept)) == releases
    assert upkeep.run(recipe_for(kept), kept) == []


def test_a_release_that_keeps_none_is_given_none(world: Workspace) -> None:
    with open_release(world) as release:
        assert renewed_behaviors([UserState(1, short=(Behavior(5, 100, None),))], release).num_rows == 0


def test_of_two_rows_of_one_behavior_the_releases_own_stays(kept: Workspace) -> None:
    with open_release(kept) as release:
        before = release.store.behaviors([1])[0]
        short = (Behavior(START, 104, None), Behavior(START + 1, 7, None))
        rows = renewed_behaviors([UserState(1, short=short), UserState(777, short=short)], release).to_pylist()
    assert rows[0]["items"] == [102, 103, 104, 7]
    assert rows[0]["ratings"] == [*map(float, before["rating"][1:]), None]
    assert rows[0]["labels"] == [*map(float, before["label"][1:]), 1.0]
    assert rows[1] == {
        "id": 777, "times": [START, START + 1], "items": [104, 7], "ratings": [None, None], "labels": [1.0, 1.0],
        "events": [0, 0],
    }  # fmt: skip
    assert not np.isnan(before["rating"]).any()


def test_an_object_store_keeps_the_same_behaviors(kept: Workspace, s3_root: str) -> None:
    remote = Workspace(s3_root)
    for path in kept.entries():
        remote.write_bytes(path, kept.read_bytes(path))
    for workspace in (kept, remote):
        log_events(workspace, [*watched(1, [120]), *watched(3, [121])])
        upkeep.run(recipe_for(workspace), workspace)
    for user in (1, 2, 3):
        assert items_of(remote, user) == items_of(kept, user)
    assert items_of(remote, 3)[-1] == 121
