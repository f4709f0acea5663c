"""The journal: a plan is carried out once, whenever the process died, and nobody else's step is undone."""

import shutil

import pytest
from streaming_world import DAY, START, carry_out, log_events, plan_refresh, watched  # type: ignore[import-not-found]

from owlrec.errors import WorkspaceError
from owlrec.streaming.journal import begin, commit, pending_plan, read_position, read_state, sweep
from owlrec.workspace import Workspace

AWAY = [115, 116, 117]


def test_plan_is_pending_until_its_outcome_is_current(world: Workspace) -> None:
    assert pending_plan(world) is None
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    assert pending_plan(world) == plan
    position = carry_out(world, plan)
    assert pending_plan(world) is None
    assert read_position(world) == position
    assert read_state(world, position).log == {"one.parquet": 3}


def test_plan_that_was_carried_out_is_cleared_away(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    plan = plan_refresh(world)
    carry_out(world, plan)
    begin(world, plan)  # as if the process had died before it removed PENDING
    assert pending_plan(world) is None
    assert not world.exists("streaming/PENDING")


def test_the_same_events_are_planned_alike_by_whoever_comes_next(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    one = plan_refresh(world)
    world.delete_file("streaming/PENDING")  # as if the process had died before it wrote it
    assert plan_refresh(world) == one


def test_second_refresh_does_not_move_what_the_first_has_moved(world: Workspace) -> None:
    log_events(world, watched(1, AWAY), "one")
    plan = plan_refresh(world)
    moved = carry_out(world, plan)
    with pytest.raises(WorkspaceError, match="moved by another refresh meanwhile"):
        commit(world, plan, plan.state, "release")
    assert read_position(world) == moved


def test_sweep_keeps_what_the_present_state_names(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    position = carry_out(world, plan_refresh(world))
    shutil.copytree(world.path(position.state), world.path("streaming", "states", "older"))
    world.write_bytes(f"{position.state}/part-99999.parquet", b"left by a kill")
    sweep(world, position)
    assert world.names("streaming", "states") == [position.state.rpartition("/")[2]]
    state = read_state(world, position)
    files = {f"{position.state}/{name}" for name in world.names(position.state)}
    assert files == {s.file for s in state.shards.values()} | {f"{position.state}/state.json"}


def test_damaged_position_is_named_with_the_remedy(world: Workspace) -> None:
    world.write_json("streaming/CURRENT", {"watermark": "soon"})
    with pytest.raises(WorkspaceError, match="begin the refreshes anew: all events are read again, no text is lost"):
        read_position(world)


def test_beginning_anew_reads_everything_again_and_loses_nothing(world: Workspace) -> None:
    log_events(world, [*watched(1, AWAY), *watched(2, [106])])
    carry_out(world, plan_refresh(world))
    world.delete_dir("streaming")
    plan = plan_refresh(world)
    assert plan.counts["events_new"] == 4
    assert plan.watermark == START + DAY + 2 * 3_600_000
