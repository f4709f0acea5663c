"""What a refresh decides: whose events are taken in, who is due, who is asked, and that order changes nothing."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refresh_world import (  # type: ignore[import-not-found]
    DAY,
    HOUR,
    START,
    AnsweredRefresh,
    carry_out,
    log_events,
    partition_prompts,
    plan_refresh,
    prompts_of,
    publish_world,
    recipe_for,
    watched,
    write_interactions,
)

from owlrec.encoding.vectors import EncoderConfig
from owlrec.errors import ReleaseError, SourceError
from owlrec.ids import shard_of
from owlrec.prompting.prompts import EARLIER
from owlrec.refresh.state import State, dead_files, read_state
from owlrec.releases import current_release, roll_back
from owlrec.releases.retention import compact
from owlrec.runs.upkeep import StopSignals
from owlrec.workspace import Workspace

AWAY = [115, 116, 117]  # films at a right angle to all that users 1 to 11 have read


def user_of(workspace: Workspace, state: State, user: int) -> object:
    shard = int(shard_of(np.array([user]), state.n_shards)[0])
    return next(u for u in state.read_users(workspace, shard, "minilm") if u.user_id == user)


def in_another_shard(user: int) -> int:
    shards = shard_of(np.arange(41), 4)
    return next(u for u in range(2, 41) if shards[u] != shards[user])


def test_drifting_user_is_asked_about_and_a_steady_one_is_not(world: Workspace) -> None:
    log_events(world, [*watched(1, AWAY), *watched(2, [106, 107, 108])])
    plan = plan_refresh(world)
    assert (plan.calls, plan.counts["frozen_by_drift"], plan.counts["events_new"]) == (1, 1, 6)
    assert plan.state.watermark == START + DAY + 2 * HOUR
    (prompt,) = prompts_of(world, plan).values()
    assert (prompt["kind"], prompt["id"], prompt["as_of"]) == ("user", 1, START + DAY + 2 * HOUR)
    assert 'Summary so far: "User 1 likes what is told slowly."' in prompt["text"]
    assert '"Film 15 (1985)" 4 stars; "Film 16 (1986)" 4 stars; "Film 17 (1987)" 4 stars' in prompt["text"]
    assert len(user_of(world, plan.state, 2).short) == 3


def test_long_short_term_is_read_without_drift(world: Workspace) -> None:
    log_events(world, [*watched(1, range(107, 113)), *watched(2, range(108, 113))])
    plan = plan_refresh(world)
    assert (list(prompts_of(world, plan)), plan.counts["frozen_by_length"]) == ([1], 1)


def test_old_short_term_is_read_when_the_newest_event_of_all_says_so(world: Workspace) -> None:
    other = in_another_shard(1)
    log_events(world, watched(1, [105]), "one")
    carry_out(world, plan_refresh(world))
    log_events(world, watched(other, [other + 5 + 99], START + 8 * DAY - 1), "two")
    plan = plan_refresh(world)
    assert plan.calls == 0
    carry_out(world, plan)
    log_events(world, watched(other, [other + 6 + 99], START + 8 * DAY), "three")
    plan = plan_refresh(world)
    assert (list(prompts_of(world, plan)), plan.counts["frozen_by_age"]) == ([1], 1)


def test_budget_asks_about_the_most_active_and_the_others_wait_their_turn(world: Workspace) -> None:
    log_events(world, [*watched(1, AWAY), *watched(2, [*AWAY, 118]), *watched(3, [*AWAY, 118])], "one")
    asked = []
    for number, film in enumerate((124, 125, 126, 127)):  # what user 20 has read lies that way
        plan = plan_refresh(world, budget_calls=1)
        asked += list(prompts_of(world, plan))
        assert plan.counts["left_waiting"] == max(2 - number, 0)
        carry_out(world, plan)
        log_events(world, watched(20, [film], START + 2 * DAY + number * DAY // 2), f"later-{number}")
    assert asked == [2, 3, 1]


BACKLOG = [(1, 100 + n % 30, 4.0, START + DAY + n * 1000) for n in range(500)]


def quoted(prompt: dict[str, object]) -> list[str]:
    return re.findall(r'"(Film [^"]*)" 4 stars', str(prompt["text"]))


def test_backlog_longer_than_a_prompt_is_quoted_in_full_over_several(world: Workspace) -> None:
    log_events(world, BACKLOG[::-1])
    plan = plan_refresh(world)
    prompts = partition_prompts(world, plan)
    # A quoted title has 5 tokens (of the echo engine, words), and a prompt takes 256: 51 titles.
    assert [len(quoted(prompt)) for prompt in prompts] == [51] * 9 + [41]
    titles = [f"Film {item - 100} (19{70 + item - 100})" for _, item, _, _ in BACKLOG]
    assert [title for prompt in prompts for title in quoted(prompt)] == titles
    ends = [*range(50, 500, 51), 499]
    assert [prompt["as_of"] for prompt in prompts] == [BACKLOG[end][3] for end in ends]
    assert 'Summary so far: "User 1 likes what is told slowly."' in str(prompts[0]["text"])
    assert all(f'Summary so far: "{EARLIER}"' in str(prompt["text"]) for prompt in prompts[1:])
    assert (plan.calls, plan.counts["frozen_by_length"]) == (10, 10)


def test_budget_ends_within_a_backlog_and_the_rest_waits_unread(world: Workspace) -> None:
    log_events(world, [*BACKLOG, *watched(2, AWAY)])
    read, asked, budgets = [], [], (3, 4, 20)
    for number, budget in enumerate(budgets):
        plan = plan_refresh(world, budget_calls=budget)
        prompts = partition_prompts(world, plan)
        asked.append(sorted({int(str(prompt["id"])) for prompt in prompts}))
        read += [title for prompt in prompts if prompt["id"] == 1 for title in quoted(prompt)]
        state = carry_out(world, plan)
        user = user_of(world, state, 1)
        assert [b.time for b in user.short] == [time for *_, time in BACKLOG[len(read) :]]
        assert user.text_as_of == BACKLOG[len(read) - 1][3]
        log_events(world, watched(20, [124 + number], START + 2 * DAY + number * HOUR), f"later-{number}")
    assert len(read) == 500
    assert read[:3] == ["Film 0 (1970)", "Film 1 (1971)", "Film 2 (1972)"]
    # User 1's drift, .29 times log(501), is more than user 2's, 1 times log(4); once 153 were read, less of it is left.
    assert asked == [[1], [1, 2], [1]]


def test_behaviors_of_one_moment_fill_partitions_with_moments_of_their_own(world: Workspace) -> None:
    log_events(world, [(1, item, 4.0, START + DAY) for item in range(100, 130)])
    moments = [prompt["as_of"] for prompt in partition_prompts(world, plan_refresh(world, history_tokens=50))]
    assert moments == [START + DAY, START + DAY + 1, START + DAY + 2]


def test_nobody_keeps_an_engine_for_longer_than_a_hundred_partitions(world: Workspace) -> None:
    log_events(world, BACKLOG)
    plan = plan_refresh(world, history_tokens=1)
    assert (plan.calls, plan.counts["due"], plan.counts["left_waiting"]) == (100, 500, 400)


def test_events_in_any_order_are_the_same_plan_to_the_byte(world: Workspace, tmp_path: Path) -> None:
    events = [*watched(1, AWAY), *watched(2, range(106, 116)), *watched(30, [100, 101]), *watched(99, [100])]
    shutil.copytree(world.root, tmp_path / "twin")
    twin = Workspace(tmp_path / "twin")
    log_events(world, events)
    log_events(twin, [*events[::-1][5:], *events[::-1][:5]])
    one, other = plan_refresh(world), plan_refresh(twin)
    assert one.counts == other.counts
    assert (one.calls, one.state.watermark) == (2, other.state.watermark)
    contents = [
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.parquet")
            if "events" not in path.parts
        }
        for folder in (Path(world.path(one.plan.folder)), Path(twin.path(other.plan.folder)))
    ]
    assert len(contents[0]) >= 6
    assert contents[0] == contents[1]


def test_nothing_new_is_no_plan_and_repeated_events_change_nobody(world: Workspace) -> None:
    log_events(world, watched(1, AWAY), "one")
    before = carry_out(world, plan_refresh(world))
    release = current_release(world)
    assert plan_refresh(world) is None
    log_events(world, watched(1, AWAY), "sent-twice")
    plan = plan_refresh(world)
    assert (plan.counts["events_read"], plan.counts["events_new"], plan.calls) == (3, 0, 0)
    assert carry_out(world, plan).shards == before.shards
    assert plan_refresh(world) is None
    assert current_release(world) == release


def test_events_that_the_tables_hold_are_known(world: Workspace) -> None:
    held = world.read_table("interactions").to_pylist()
    log_events(world, [(r["user_id"], r["item_id"], r["rating"], r["timestamp"]) for r in held])
    plan = plan_refresh(world)
    assert (plan.counts["events_read"], plan.counts["events_new"], plan.counts["refused"]) == (len(held), 0, 0)


def test_what_the_tables_hold_after_the_history_is_unread(world: Workspace) -> None:
    write_interactions(world, watched(1, range(105, 112), START + HOUR))
    log_events(world, watched(1, [112]))
    plan = plan_refresh(world)
    assert (plan.counts["events_new"], plan.counts["frozen_by_length"]) == (1, 1)
    assert '"Film 5 (1975)"' in prompts_of(world, plan)[1]["text"]
    assert '"Film 12 (1982)"' in prompts_of(world, plan)[1]["text"]


def test_late_event_finds_its_place_and_one_too_late_is_refused_once(world: Workspace) -> None:
    log_events(world, watched(1, [105], START + 10 * DAY), "one")
    carry_out(world, plan_refresh(world, freeze_days=30))
    log_events(world, [*watched(1, [106], START + 7 * DAY), *watched(1, [107], START + 7 * DAY - 1)], "two")
    plan = plan_refresh(world, freeze_days=30)
    assert (plan.counts["events_new"], plan.counts["refused_TooLate"]) == (1, 1)
    assert plan.state.watermark == START + 10 * DAY
    assert [b.item for b in user_of(world, plan.state, 1).short] == [106, 105]
    carry_out(world, plan)
    assert plan_refresh(world, freeze_days=30) is None
    (file,) = dead_files(world)
    assert world.read_parquet(file)["error"].to_pylist() == ["TooLate"]


def test_refused_events_are_reported_once_and_taken_in_when_they_may_be(world: Workspace) -> None:
    log_events(world, watched(99, [105, 106, 107]), "one")
    plan = plan_refresh(world)
    assert (plan.calls, plan.counts["events_new"], plan.counts["refused_UnknownUser"]) == (0, 0, 3)
    carry_out(world, plan)
    assert plan_refresh(world) is None
    plan = plan_refresh(world, admit=("users",))
    assert (plan.counts["refused"], plan.counts["events_new"]) == (0, 3)
    prompt = prompts_of(world, plan)[99]  # all of it is new: nothing was read of this user
    assert "Summary so far" not in prompt["text"]
    carry_out(world, plan)
    log_events(world, watched(99, [108], START + 2 * DAY), "two")
    assert plan_refresh(world).counts["events_new"] == 1  # known now, by the state


def test_event_from_the_future_is_taken_in_once_its_moment_has_come(world: Workspace) -> None:
    log_events(world, [*watched(1, [105], START + DAY), *watched(1, [106], START + 2 * DAY)])
    plan = plan_refresh(world, now=START + DAY)
    assert (plan.counts["events_new"], plan.counts["refused_FromTheFuture"]) == (1, 1)
    assert plan.state.watermark == START + DAY
    carry_out(world, plan)
    assert plan_refresh(world, now=START + DAY) is None
    plan = plan_refresh(world, now=START + 2 * DAY)
    assert (plan.counts["events_new"], plan.counts["refused"]) == (1, 0)


def test_unknown_item_counts_as_behavior_but_is_not_quoted(world: Workspace) -> None:
    log_events(world, [*watched(1, [*range(105, 112), 999]), *watched(2, range(900, 910))])
    plan = plan_refresh(world, admit=("items",))
    assert list(prompts_of(world, plan)) == [1]  # of user 2 there would be nothing to quote
    assert prompts_of(world, plan)[1]["text"].count('"Film') == 7
    assert len(user_of(world, plan.state, 2).short) == 10


def test_user_without_an_earlier_text_is_asked_about_without_one(world: Workspace) -> None:
    publish_world(world, "second", without_text=[1])
    log_events(world, watched(1, AWAY))
    assert "Summary so far" not in prompts_of(world, plan_refresh(world))[1]["text"]


def test_only_shards_with_news_are_written_again(world: Workspace) -> None:
    other = in_another_shard(1)
    log_events(world, [*watched(1, [105]), *watched(other, [110])], "one")
    first = carry_out(world, plan_refresh(world))
    log_events(world, watched(1, [106], START + 2 * DAY), "two")
    plan = plan_refresh(world)
    mine, theirs = (int(s) for s in shard_of(np.array([1, other]), 4))
    assert plan.state.shards[theirs] == first.shards[theirs]
    assert plan.state.shards[mine].file.startswith(plan.plan.folder)
    second = carry_out(world, plan)
    assert world.exists(second.shards[theirs].file)
    assert not world.exists(first.shards[mine].file)
    assert world.names("refresh") == sorted(["CURRENT", first.name, second.name])


def test_state_outlives_a_split_of_its_shards(world: Workspace) -> None:
    log_events(world, [*watched(1, [105]), *watched(99, [105])], "one")
    carry_out(world, plan_refresh(world))
    tables = {name: world.read_table(name) for name in ("users", "interactions", "histories")}
    world.grow_shards({"user": 8})
    for name, table in tables.items():
        world.write_table(name, table, key="user_id")
    log_events(world, [*watched(1, [106], START + 2 * DAY), *watched(5, [110], START + 2 * DAY)], "two")
    plan = plan_refresh(world, admit=("users",))
    assert plan.counts["events_new"] == 3  # what was deferred among them
    assert len(user_of(world, plan.state, 1).short) == 2
    assert user_of(world, plan.state, 5).text_as_of == START + 4
    assert user_of(world, plan.state, 99).text_as_of == 0
    users = [u.user_id for n in plan.state.shards for u in plan.state.read_users(world, n, "minilm")]
    assert sorted(users) == [1, 5, 99]


def test_prompts_lie_beside_their_users(world: Workspace) -> None:
    log_events(world, [row for user in range(1, 6) for row in watched(user, AWAY)])
    plan = plan_refresh(world)
    assert sorted(prompts_of(world, plan)) == [1, 2, 3, 4, 5]
    for name in world.names(plan.state.prompts):
        ids = world.read_parquet(f"{plan.state.prompts}/{name}")["id"].to_numpy()
        assert set(shard_of(ids, 4)) == {int(name.removesuffix(".parquet"))}


def test_log_that_lost_its_events_is_an_error(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    carry_out(world, plan_refresh(world))
    Path(world.path("events", "one.parquet")).unlink()
    with pytest.raises(SourceError, match=r"the log is empty, but events up to 2001-09-10 .* delete .*refresh"):
        plan_refresh(world)


def test_without_a_whole_run_there_is_nothing_to_build_on(small_world: Workspace) -> None:
    write_interactions(small_world)
    log_events(small_world, watched(1, AWAY))
    with pytest.raises(ReleaseError, match="Run `owlrec run` with the same recipe first"):
        plan_refresh(small_world)


def test_parent_that_is_gone_is_named(world: Workspace) -> None:
    first = current_release(world)
    log_events(world, watched(1, AWAY), "one")
    delta = carry_out(world, plan_refresh(world)).release
    log_events(world, watched(1, [118], START + 2 * DAY), "two")
    shutil.move(world.path("releases", first), world.path("aside"))
    with pytest.raises(ReleaseError, match=f"delta of release '{first}', which is"):
        plan_refresh(world)
    shutil.move(world.path("releases", delta), world.path("aside-too"))
    with pytest.raises(ReleaseError, match=f"release {delta}, which is"):
        plan_refresh(world)


def test_rolled_back_release_is_not_built_around(world: Workspace) -> None:
    log_events(world, watched(1, AWAY), "one")
    delta = carry_out(world, plan_refresh(world)).release
    roll_back(world)
    log_events(world, watched(1, [118], START + 2 * DAY), "two")
    with pytest.raises(
        ReleaseError, match=f"is not newer than {delta}.*`owlrec release rollback --to {delta}`.*delete"
    ):
        plan_refresh(world)
    roll_back(world, delta)
    assert plan_refresh(world).plan.parent == delta


def test_compaction_and_a_new_full_release_are_built_upon(world: Workspace) -> None:
    log_events(world, watched(1, AWAY), "one")
    carry_out(world, plan_refresh(world))
    compacted = compact(world).name
    log_events(world, watched(1, AWAY, START + 2 * DAY), "two")
    plan = plan_refresh(world, drift=0.1)
    assert plan.plan.parent == compacted
    assert "Renewed text of user 1" in prompts_of(world, plan)[1]["text"]
    carry_out(world, plan)
    full = publish_world(world, "second")
    log_events(world, watched(2, AWAY, START + 3 * DAY), "three")
    assert plan_refresh(world).plan.parent == full


def test_release_of_another_encoder_is_refused(world: Workspace) -> None:
    log_events(world, watched(1, AWAY))
    planner = AnsweredRefresh(recipe_for(world), world, StopSignals()).planner
    with pytest.raises(ReleaseError, match=r"encoder 'minilm', but the recipe uses 'other@256'"):
        replace(planner, encoder=EncoderConfig(model="other")).read_log(read_state(world), START + DAY)
    assert not world.exists("refresh")
