"""The pipeline's steps without Ray: answers that fail in numbers, and a wish to stop between two steps."""

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from refresh_world import (  # type: ignore[import-not-found]
    DAY,
    START,
    AnsweredRefresh,
    log_events,
    recipe_for,
    watched,
)

from owlrec.encoding.vectors import PARTITIONS, VectorShards, partitions_folder
from owlrec.errors import EngineError, WorkspaceError
from owlrec.generation import EchoEngineConfig, job
from owlrec.generation.engines import Completion, EchoEngine, RequestFailed, SamplingConfig
from owlrec.refresh import state as partitions
from owlrec.refresh.state import dead_files, read_state, unfinished_plans
from owlrec.releases import open_release
from owlrec.releases.release import pointer
from owlrec.runs import upkeep
from owlrec.runs.upkeep import Stopped, StopSignals, reshard
from owlrec.storage import PointerHeld
from owlrec.workspace import Workspace

AWAY = [115, 116, 117]


class Server(EchoEngine):
    """Fails all that it is asked while it is away; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(EchoEngineConfig(type="echo"))
        self.away, self.asked = False, 0

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        self.asked += 1
        if self.away and "Film 15" in prompt:
            raise RequestFailed("the server is away")
        return await super().complete(system, prompt, sampling, extra)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """The engine of all stages of texts."""
    engine = Server()
    monkeypatch.setattr(job, "build_engine", lambda *_: engine)
    return engine


def test_failures_in_numbers_end_the_run_and_the_next_one_asks_for_them_again(world: Workspace, server: Server) -> None:
    log_events(world, [r for user in range(1, 12) for r in watched(user, AWAY)] + watched(20, range(105, 113)))
    server.away = True
    with pytest.raises(EngineError, match="11 of 12 rows failed"):
        upkeep.run(recipe_for(world), world)
    assert (server.asked, read_state(world).name) == (12, "")
    (plan,) = unfinished_plans(world, "")
    with pytest.raises(EngineError, match="11 of 12 rows failed"):
        upkeep.run(recipe_for(world), world)
    assert server.asked == 12 + 11  # the one that was answered stays
    server.away = False
    assert [state.name for state in upkeep.run(recipe_for(world), world)] == [plan.name]
    assert server.asked == 12 + 11 + 11
    with open_release(world) as release:
        knowledge = release.store.get("user", [1, 11, 20])
    assert [k is not None and k.framework for k in knowledge] == ["streaming"] * 3
    assert upkeep.run(recipe_for(world), world) == []


def test_a_few_failures_hold_nobody_up(world: Workspace, server: Server) -> None:
    log_events(world, [*watched(1, AWAY), *watched(20, range(105, 113))])
    server.away = True
    (state,) = upkeep.run(recipe_for(world), world)
    assert (state.calls, server.asked) == (2, 2)
    with open_release(world) as release:
        held, renewed = release.store.get("user", [1, 20])
    assert held is not None
    assert held.text == "User 1 likes what is told slowly."
    assert renewed is not None
    assert renewed.text.startswith("echo-")
    server.away = False
    assert upkeep.run(recipe_for(world), world) == []


def test_wish_to_stop_is_honored_after_the_step_and_the_next_run_goes_on(
    world: Workspace, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_events(world, watched(1, AWAY))
    shard_watch = upkeep.ShardWatch

    def stopping_watch(*arguments: Any) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return shard_watch(*arguments)

    with monkeypatch.context() as patch, StopSignals() as signals:
        patch.setattr(upkeep, "ShardWatch", stopping_watch)
        with pytest.raises(Stopped):
            upkeep.run(recipe_for(world), world, signals=signals)
    assert (server.asked, len(unfinished_plans(world, ""))) == (1, 1)
    assert len(upkeep.run(recipe_for(world), world)) == 1
    assert server.asked == 1


def test_refreshes_on_an_object_store_are_those_on_a_disk(world: Workspace, server: Server, s3_root: str) -> None:
    remote = Workspace(s3_root)
    for path in world.entries():
        remote.write_bytes(path, world.read_bytes(path))
    outcomes = []
    for workspace in (world, remote):
        recipe = recipe_for(workspace, history_tokens=40)  # eight titles
        for name, user in (("one", 1), ("two", 2)):
            log_events(workspace, [*watched(user, [*range(115, 125), 500]), *watched(99, [100])], name)
            row = {"item_id": [500], "timestamp": [START + user], "title": [f"Heat {user}"]}
            workspace.write_parquet(f"events/items/{name}.parquet", pa.table(row))
            (state,) = upkeep.run(recipe, workspace)
            assert (state.calls, state.counts["renewed"], state.counts["items_renewed"]) == (2, 2, 1)
        assert upkeep.run(recipe, workspace) == []
        dead = [workspace.read_parquet(file).to_pylist() for file in dead_files(workspace)]
        outcomes.append((left(workspace), sorted(map(str, dead))))
    assert outcomes[0] == outcomes[1]


def test_nobody_is_asked_while_releases_are_on_hold(world: Workspace, server: Server) -> None:
    log_events(world, watched(1, AWAY))
    pointer(world).hold("a bad model", "on-call")
    with pytest.raises(PointerHeld, match="a bad model"):
        upkeep.run(recipe_for(world), world)
    assert server.asked == 0
    pointer(world).lift()
    assert [state.counts["renewed"] for state in upkeep.run(recipe_for(world), world)] == [1]


def test_a_reshard_waits_for_an_interrupted_refresh(
    world: Workspace, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_events(world, [r for user in range(1, 12) for r in watched(user, AWAY)])
    server.away = True
    with pytest.raises(EngineError):
        upkeep.run(recipe_for(world), world)
    with pytest.raises(WorkspaceError, match="a refresh was interrupted"):
        reshard(recipe_for(world), world)
    server.away = False
    (state,) = upkeep.run(recipe_for(world), world)
    before = [u for n in state.shards for u in state.read_users(world, n, "minilm")]
    assert reshard(recipe_for(world), world, ["user"]) == {"user": 8}
    state = read_state(world)
    after = [u for n in state.shards for u in state.read_users(world, n, "minilm")]
    assert sorted(after, key=lambda u: u.user_id) == sorted(before, key=lambda u: u.user_id)
    log_events(world, watched(1, [118, 119, 120], START + 9 * DAY), "two")
    monkeypatch.setattr(partitions, "FREEZE_DRIFT", 0)
    (state,) = upkeep.run(recipe_for(world), world)
    assert (state.calls, state.counts["renewed"], state.n_shards) == (1, 1, 8)


def left(workspace: Workspace) -> dict[str, Any]:
    """What a refresh leaves to others, and to the next one."""
    state = read_state(workspace)
    with open_release(workspace) as release:
        store = release.store
        texts = {kind: store.get(kind, store.ids(kind)) for kind in ("user", "item")}
        vectors = {kind: store.partitions(kind, store.ids(kind), 8)[0].tolist() for kind in ("user", "item")}
    folder = partitions_folder(recipe_for(workspace).encoder.identity)
    shards = [shard for n in range(4) if (shard := VectorShards(workspace, folder, PARTITIONS).shard(n)) is not None]
    return {
        "texts": texts,
        "vectors": vectors,
        "partitions": [(s.ids.tolist(), s.as_of.tolist(), s.vectors.tolist()) for s in shards],
        "items": workspace.read_table("items").to_pylist(),
        "users": [u for n in state.shards for u in state.read_users(workspace, n, "minilm")],
        "counts": state.counts,
    }


@pytest.mark.parametrize(
    "step",
    [
        "owlrec.refresh.plan.write_plan",
        "owlrec.refresh.plan.ItemsStage",
        "owlrec.refresh.plan.InterestsStage",
        "owlrec.refresh.plan.PromptsStage",
        "owlrec.refresh.apply.build_release",
        "owlrec.refresh.apply.make_current",
        "owlrec.refresh.apply.UpsertItems",
        "owlrec.refresh.apply.SavePartitions",
        "owlrec.refresh.apply.SettleStage",
        "owlrec.runs.upkeep.write_state",
        "owlrec.runs.upkeep.sweep",
    ],
)
def test_items_and_partitions_outlive_an_end_at_any_step(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """An interrupted refresh, whose logs have another order, leaves what an undisturbed one does."""
    monkeypatch.setattr(upkeep, "Refresh", AnsweredRefresh)
    twin = Workspace(shutil.copytree(world.root, tmp_path / "twin"))
    events = [*watched(1, [*range(100, 120), 500]), *watched(2, AWAY)]
    items = {
        "item_id": ["500", "101", "101"],
        "timestamp": [START, START + 1, START],
        "title": ["Heat (1995)", "Film 1, restored", "Film 1"],
    }
    for workspace, order in ((world, slice(None, None, -1)), (twin, slice(None))):
        log_events(workspace, events[order])
        table = pa.table({name: values[order] for name, values in items.items()})
        workspace.write_parquet("events/items/one.parquet", table)
    recipe, moment = recipe_for(world, history_tokens=30), START + 100 * DAY
    assert [state.calls for state in upkeep.run(recipe, twin, now=moment)] == [5]  # four partitions of user 1
    with monkeypatch.context() as patch:
        patch.setattr(step, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upkeep.run(recipe, world, now=moment)
    upkeep.run(recipe, world, now=moment)
    mine, theirs = left(world), left(twin)
    assert mine == theirs
    assert len(mine["items"]) == 31
    assert sum(len(ids) for ids, *_ in mine["partitions"]) == 5
    assert upkeep.run(recipe, world, now=moment) == []
