"""Streaming refresh on a published MovieLens: once, twice, killed at every step, with bad events, and watching."""

import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import forked
import killed_refresh  # type: ignore[import-not-found]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from owlrec.encoding.vectors import PARTITIONS, VectorShards, partitions_folder
from owlrec.recipe import Recipe, load_recipe
from owlrec.refresh.events import EVENTS
from owlrec.refresh.state import dead_files, pointer, read_state
from owlrec.releases import current_release, list_releases, open_release
from owlrec.releases.format import read_manifest
from owlrec.runs import STAGES
from owlrec.runs.stages import stage_function
from owlrec.runs.upkeep import run
from owlrec.workspace import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.ray]
ROOT = Path(__file__).resolve().parent.parent.parent
HOUR = 3_600_000
N_MOVED = 10
Row = tuple[int | None, int, float | None, int]


@pytest.fixture(scope="module")
def published(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose whole run on the echo engine stands beside it as `whole`; its refreshes have small shards."""
    folder = tmp_path_factory.mktemp("refresh")
    recipe = folder / "echo.yaml"
    recipe.write_text(
        textwrap.dedent(
            f"""
            name: echo
            scenario: movies
            workspace: {folder / "whole"}
            source: {{type: movielens-100k, max_users: 60, max_items: 120}}
            shard_rows: 20
            engine: {{type: echo}}
            encoder: {{model: hashing}}
            sampling: {{max_tokens: 40}}
            split: {{cuts: half}}
            prompts: {{history_tokens: 1000}}
            streaming: {{partitions: 3}}
            ray: "{ray.get_runtime_context().gcs_address}"
            """
        )
    )
    settings = load_recipe(recipe)
    for stage in STAGES[: STAGES.index("publish") + 1]:
        stage_function(stage)(settings, Workspace(settings.workspace))
    recipe.write_text(recipe.read_text().replace("shard_rows: 20", "shard_rows: 4"))
    return recipe


@pytest.fixture
def copies(published: Path, tmp_path: Path) -> Callable[[str], tuple[Recipe, Workspace]]:
    """Makes a copy of the published workspace under a name."""

    def copy(name: str) -> tuple[Recipe, Workspace]:
        shutil.copytree(published.parent / "whole", tmp_path / name)
        return load_recipe(published, workspace=str(tmp_path / name)), Workspace(tmp_path / name)

    return copy


def write_log(workspace: Workspace, name: str, rows: list[Row]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, EVENTS, strict=True)], schema=EVENTS)
    Path(workspace.path("events")).mkdir(exist_ok=True)
    pq.write_table(table, workspace.path("events", f"{name}.parquet"))


def moved(workspace: Workspace, days: float, each: int = 1) -> list[Row]:
    """Events of users, so long after all that the tables hold: with what the tables say they did, a partition."""
    interactions = workspace.read_table("interactions")
    newest = max(interactions["timestamp"].to_pylist()) + round(days * 24 * HOUR)
    done = Counter(interactions["user_id"].to_pylist())
    users = sorted(user for user, n in done.items() if n >= 20)[:N_MOVED]
    items = interactions["item_id"].to_pylist()
    rows: list[Row] = []
    for number, user in enumerate(users):
        rows += [(user, items[k], 4.0, newest + number * HOUR // 100 + k) for k in range(each)]
    return rows


def write_items(workspace: Workspace, name: str, rows: list[tuple[int, int, str]]) -> None:
    columns = dict(zip(("item_id", "timestamp", "title"), map(list, zip(*rows, strict=True)), strict=True))
    workspace.write_parquet(f"events/items/{name}.parquet", pa.table(columns))


def assert_same(one: Workspace, other: Workspace) -> None:
    """The same texts of every user and item, and vectors that differ by no more than the rounding of another batch."""
    for kind in ("user", "item"):
        mine, theirs = contents(one, kind), contents(other, kind)
        assert {id_: row[:2] for id_, row in mine.items()} == {id_: row[:2] for id_, row in theirs.items()}
        for id_, (_, _, vectors) in mine.items():
            np.testing.assert_allclose(vectors, theirs[id_][2], atol=2e-3)
    assert one.read_table("items").to_pylist() == other.read_table("items").to_pylist()


def stored(workspace: Workspace, recipe: Recipe) -> dict[tuple[int, int], list[float]]:
    """The vector of each partition that was read, by user and as_of."""
    shards = VectorShards(workspace, partitions_folder(recipe.encoder.identity), PARTITIONS)
    read = [shard for number in shards.numbers if (shard := shards.shard(number)) is not None]
    return {
        (id_, moment): vector
        for shard in read
        for id_, moment, vector in zip(shard.ids.tolist(), shard.as_of.tolist(), shard.vectors.tolist(), strict=True)
    }


def contents(workspace: Workspace, kind: str = "user") -> dict[int, tuple[str, int, list[list[float]]]]:
    """Text, as_of and all kept vectors of every user, or item."""
    with open_release(workspace) as release:
        ids = release.store.ids(kind)
        rows, there = release.store.partitions(kind, ids, 8)
        knowledge = release.store.get(kind, ids)
    return {
        k.id: (k.text, k.as_of, vectors[mask].tolist())
        for k, vectors, mask in zip(knowledge, rows, there, strict=True)
        if k is not None
    }


def refresh_command(recipe: Path, workspace: Workspace, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.refresh", str(recipe), "--workspace", workspace.root, *more]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the watch ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_refresh_renews_who_moved_on_and_a_second_one_asks_nobody(copies: Callable) -> None:
    recipe, workspace = copies("ws")
    before, full = contents(workspace), current_release(workspace)
    events = moved(workspace, 1)
    write_log(workspace, "one", events)
    (state,) = run(recipe, workspace)
    assert state.calls == state.counts["events_new"] == N_MOVED
    after, delta = contents(workspace), read_manifest(workspace, current_release(workspace) or "")
    assert (delta.delta, delta.parent, delta.knowledge) == (True, full, {"user": N_MOVED})
    for user, _, _, moment in events:
        text, as_of, vectors = after[user]
        assert text.startswith("echo-")
        assert text != before[user][0]
        assert as_of == moment
        assert vectors[1:] == before[user][2]
    renewed = {user for user, *_ in events}
    assert {u: row for u, row in after.items() if u not in renewed} == {
        u: row for u, row in before.items() if u not in renewed
    }
    files = {f: f.stat().st_mtime_ns for f in Path(workspace.root).rglob("*") if f.is_file()}
    assert run(recipe, workspace) == []
    assert {f: f.stat().st_mtime_ns for f in Path(workspace.root).rglob("*") if f.is_file()} == files


def test_kill_at_any_step_ends_in_the_release_of_an_undisturbed_run(published: Path, copies: Callable) -> None:
    """Both read several partitions of each user, and the second has a new item among its events."""
    (_, workspace), (_, twin) = copies("killed"), copies("twin")
    short = published.parent / "short-prompts.yaml"
    short.write_text(published.read_text().replace("history_tokens: 1000", "history_tokens: 24"))
    recipe = load_recipe(short)
    new, old = 900_001, int(workspace.read_table("items")["item_id"][0].as_py())
    first, second = moved(workspace, 1), moved(workspace, 2, 8)
    second += [(user, new, 5.0, moment + 1) for user, _, _, moment in second[7::8]]
    items = [(new, 10**12, "Brand New (1999)"), (old, 10**12, "An Old One, Restored"), (old, 10**12 - 1, "An Old One")]
    write_log(twin, "one", first)
    write_items(twin, "one", items[1:])
    calls = [(state.calls, state.item_calls) for state in run(recipe, twin)]
    write_log(twin, "two", second)
    write_items(twin, "two", items[:1])
    calls += [(state.calls, state.item_calls) for state in run(recipe, twin)]
    assert all(users >= 2 * N_MOVED for users, _ in calls)
    assert [items for _, items in calls] == [1, 1]
    write_log(workspace, "one", first[::-1])
    write_items(workspace, "one", items[:0:-1])
    for step in killed_refresh.STEPS:
        log = published.parent / f"{step}.log"
        dying = forked.Forked(killed_refresh.refresh_until, step, short, workspace.root, log=log)
        assert dying.wait(timeout=120) == -signal.SIGKILL, f"{step}: {log.read_text()}"
        if step == "planned":  # newer events and items, which the plan in hand knows nothing of; sent twice
            write_log(workspace, "two", [*second[::-1], *second[:5]])
            write_items(workspace, "two", items)
    assert run(recipe, workspace) == []
    assert_same(workspace, twin)
    mine, theirs = stored(workspace, recipe), stored(twin, recipe)
    assert len(mine) == sum(users for users, _ in calls)
    assert mine.keys() == theirs.keys()
    for key, vector in mine.items():
        np.testing.assert_allclose(vector, theirs[key], atol=2e-3)
    states = [read_state(w) for w in (workspace, twin)]
    assert states[0].watermark == states[1].watermark
    users = [
        [u for n in state.shards for u in state.read_users(w, n, recipe.encoder.model)]
        for w, state in zip((workspace, twin), states, strict=True)
    ]
    assert users[0] == users[1]
    deltas = [[m.knowledge for m in list_releases(w) if m.delta] for w in (workspace, twin)]
    assert deltas[0] == deltas[1] == [{"item": 1, "user": N_MOVED}] * 2
    assert len(workspace.names("knowledge")) == len(twin.names("knowledge"))


def test_stages_on_ray_leave_what_they_leave_in_this_process(copies: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for name, here in (("here", 1000), ("ray", -1)):
        recipe, workspace = copies(name)
        monkeypatch.setattr("owlrec.runs.upkeep.HERE_ROWS", here)
        write_log(workspace, "one", [*moved(workspace, 1), (10**9, 1, 4.0, 10**12)])
        (state,) = run(recipe, workspace)
        users = [u for n in state.shards for u in state.read_users(workspace, n, recipe.encoder.model)]
        outcomes.append((contents(workspace), users, state.counts))
    assert outcomes[0] == outcomes[1]


def test_bad_events_are_refused_and_counted_and_the_others_taken(copies: Callable) -> None:
    recipe, workspace = copies("ws")
    good = moved(workspace, 1)
    user, item, rating, moment = good[0]
    now = moment + HOUR
    future = (user, item, rating, now + HOUR)
    write_log(
        workspace, "one",
        [*good, good[0], (10**9, item, 4.0, moment), (user, 10**9, 4.0, moment), (None, item, 4.0, moment), future,
         (user, item, 4.0, moment // 1000)],
    )  # fmt: skip
    (state,) = run(recipe, workspace, now=now)
    errors = ("UnknownUser", "UnknownItem", "NullField", "FromTheFuture", "NotMilliseconds")
    assert {name: state.counts[f"refused_{name}"] for name in errors} == dict.fromkeys(errors, 1)
    assert (state.counts["events_new"], state.counts["events_twice"], state.counts["refused"]) == (N_MOVED, 1, 5)
    dead = [e for file in dead_files(workspace) for e in workspace.read_parquet(file)["error"].to_pylist()]
    assert sorted(dead) == sorted(errors)
    assert run(recipe, workspace, now=now) == []


def test_mistakes_end_with_one_line_and_no_traceback(published: Path, copies: Callable) -> None:
    _, workspace = copies("ws")
    command = refresh_command(published, workspace)
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False)
    assert f"{workspace.root}/events: there are no events. Add Parquet files" in ran.stderr


def test_watch_goes_on_until_it_is_told_to_stop(published: Path, copies: Callable, tmp_path: Path) -> None:
    _, workspace = copies("ws")
    recipe = tmp_path / "no-calls.yaml"
    recipe.write_text(published.read_text().replace("streaming: {", "streaming: {budget_calls: 0, "))
    write_log(workspace, "one", moved(workspace, 1))
    process = subprocess.Popen(
        refresh_command(recipe, workspace, "--watch", "0.2"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    positions = []
    for name, days in (("two", 2), (None, 3)):
        wait_for(lambda: pointer(workspace).current not in (None, *positions), process)
        positions.append(pointer(workspace).current)
        if name:
            write_log(workspace, name, moved(workspace, days))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped; the next refresh continues from here" in output
    assert output.count("events_new") == 2
