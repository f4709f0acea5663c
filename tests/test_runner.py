"""The runner: each pending shard made once, whatever fails, whoever else runs, here and on Ray's actors."""

import asyncio
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from owlrec import runner, shards
from owlrec.errors import DiskFullError, EngineError, OwlRecError, WorkspaceError
from owlrec.runner import Pool, Result, Stage, Work, WorkerLost, pending_shards, run_stage
from owlrec.shards import Artifact, Card, Claims, Shard
from owlrec.workspace import Workspace

FOLDER = "doubled/f"
SHARDS = [Shard("user", n) for n in range(4)] + [Shard("item", n) for n in range(2)]
INPUTS = dict.fromkeys(SHARDS, "i")


class Doubling(Stage):
    """Writes twice a shard's number, and remembers what it was asked for."""

    name, folder = "double", FOLDER

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.earlier: dict[str, Card | None] = {}
        self.opened: list[str] = []
        self.closed = 0

    def open(self, workspace: Workspace, worker: str) -> None:
        self.opened.append(worker)

    def run(self, work: Work) -> Any:
        self.made[work.shard.name] += 1
        self.earlier[work.shard.name] = work.earlier
        return write(work)

    def close(self) -> None:
        self.closed += 1


def write(work: Work) -> Result:
    file = work.shard.file(".txt")
    entry = work.workspace.write_bytes(work.artifact.path(file), str(2 * work.shard.number).encode())
    return Result({file: entry}, rows_in=3, rows_out=2, rows_dead=1, counts={"tokens": 5})


def left_claims(workspace: Workspace) -> list[str]:
    return list(workspace.entries("claims"))


def test_shards_are_pending_until_made_of_these_inputs(workspace: Workspace) -> None:
    assert pending_shards(workspace, FOLDER, INPUTS) == (SHARDS, {})
    cards = run_stage(workspace, Doubling(), {shard: "i" for shard in SHARDS[:3]})
    assert pending_shards(workspace, FOLDER, INPUTS) == (SHARDS[3:], cards)
    other = INPUTS | {SHARDS[1]: "j"}
    assert pending_shards(workspace, FOLDER, other)[0] == [SHARDS[1], *SHARDS[3:]]
    assert pending_shards(workspace, "doubled/g", INPUTS)[0] == SHARDS
    workspace.delete_file(f"{FOLDER}/{SHARDS[0].file('.txt')}")
    assert pending_shards(workspace, FOLDER, INPUTS)[0] == [SHARDS[0], *SHARDS[3:]]


def test_a_run_makes_what_is_pending_and_says_so_on_cards(workspace: Workspace) -> None:
    first, second, reported = Doubling(), Doubling(), list[str]()
    some = run_stage(workspace, first, {shard: "i" for shard in SHARDS[:2]})
    began = time.time()
    cards = run_stage(workspace, second, INPUTS, on_card=lambda card: reported.append(card.shard))
    assert list(cards) == [shard.name for shard in SHARDS]
    assert cards == Artifact(workspace, FOLDER).cards() | cards
    assert {name: cards[name] for name in some} == some
    assert second.made == Counter(reported) == Counter(shard.name for shard in SHARDS[2:])
    assert (len(second.opened), second.closed) == (1, 1)
    card = cards["user/00000003"]
    assert (card.stage, card.fingerprint, card.worker) == ("double", "i", second.opened[0])
    assert (card.rows_in, card.rows_out, card.rows_dead, card.counts) == (3, 2, 1, {"tokens": 5})
    assert began <= card.finished <= time.time()
    assert workspace.read_bytes(f"{FOLDER}/user/00000003.txt") == b"6"
    assert left_claims(workspace) == []

    third = Doubling()
    assert run_stage(workspace, third, INPUTS, on_card=lambda card: reported.append(card.shard)) == cards
    assert (third.opened, len(reported)) == ([], 4)  # nothing is even opened where nothing is to do


def test_finished_shards_are_made_again_on_request_and_see_what_they_were(workspace: Workspace) -> None:
    before = run_stage(workspace, Doubling(), INPUTS)
    stage = Doubling()
    after = run_stage(workspace, stage, INPUTS, again=[SHARDS[1]])
    name = SHARDS[1].name
    assert stage.earlier == {name: before[name]}
    assert after[name].finished > before[name].finished
    assert {n: after[n] for n in after if n != name} == {n: before[n] for n in before if n != name}


def test_other_inputs_make_a_shard_again_and_see_what_it_was(workspace: Workspace) -> None:
    before = run_stage(workspace, Doubling(), INPUTS)
    stage = Doubling()
    after = run_stage(workspace, stage, INPUTS | {SHARDS[2]: "j"})
    assert stage.earlier == {SHARDS[2].name: before[SHARDS[2].name]}
    assert after[SHARDS[2].name].fingerprint == "j"


class Failing(Doubling):
    """Fails on one shard, so many times."""

    def __init__(self, error: OwlRecError, times: int, cause: Exception | None = None) -> None:
        super().__init__()
        self.error, self.times, self.cause = error, times, cause

    def run(self, work: Work) -> Any:
        result = super().run(work)
        if work.shard == SHARDS[1] and self.made[work.shard.name] <= self.times:
            raise self.error from self.cause
        return result


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the runner would have waited between attempts."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(runner.asyncio, "sleep", sleep)
    return slept


def test_what_a_store_refuses_for_a_moment_is_tried_again(workspace: Workspace, pauses: list[float]) -> None:
    stage = Failing(WorkspaceError("cut off"), 2, OSError("reset"))
    cards = run_stage(workspace, stage, INPUTS)
    assert list(cards) == [shard.name for shard in SHARDS]
    assert (stage.made[SHARDS[1].name], pauses) == (3, [1, 2])


@pytest.mark.parametrize(
    ("error", "cause", "attempts"),
    [
        (WorkspaceError("cut off"), OSError("reset"), 3),
        (WorkspaceError("no such table"), None, 1),
        (DiskFullError("no space"), OSError(28, "full"), 1),
        (EngineError("no such model"), OSError("404"), 1),
        (WorkerLost("out of memory"), OSError("CUDA"), 1),
    ],
)
def test_what_cannot_be_helped_ends_the_run_and_finished_shards_stay(
    workspace: Workspace, pauses: list[float], error: OwlRecError, cause: Exception | None, attempts: int
) -> None:
    stage = Failing(error, 99, cause)
    with pytest.raises(type(error), match=str(error)):
        run_stage(workspace, stage, INPUTS)
    assert stage.made == {SHARDS[0].name: 1, SHARDS[1].name: attempts}
    assert stage.closed == 1
    assert left_claims(workspace) == []
    assert pending_shards(workspace, FOLDER, INPUTS)[0] == SHARDS[1:]
    after = Doubling()
    run_stage(workspace, after, INPUTS)
    assert SHARDS[0].name not in after.made


def test_a_mistake_ends_the_shards_in_flight_beside_it(workspace: Workspace) -> None:
    cancelled = list[str]()

    class Asking(Doubling):
        async def run(self, work: Work) -> Any:
            if work.shard == SHARDS[1]:
                await asyncio.sleep(0.05)  # until the others have begun
                raise EngineError("no such model")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(work.shard.name)
                raise

    with pytest.raises(EngineError, match="no such model"):
        run_stage(workspace, Asking(), INPUTS, Pool(in_flight=3))
    assert sorted(cancelled) == [SHARDS[0].name, SHARDS[2].name]
    assert left_claims(workspace) == []


def test_a_stage_that_does_not_open_ends_the_run(workspace: Workspace) -> None:
    class Closed(Doubling):
        def open(self, workspace: Workspace, worker: str) -> None:
            raise EngineError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        run_stage(workspace, Closed(), INPUTS)
    assert pending_shards(workspace, FOLDER, INPUTS)[0] == SHARDS


def test_two_runs_share_a_workspace_and_make_each_shard_once(workspace: Workspace) -> None:
    class Slow(Doubling):
        def run(self, work: Work) -> Any:
            time.sleep(0.05)
            return super().run(work)

    inputs = {Shard("user", n): "i" for n in range(12)}
    stages, results, start = [Slow(), Slow()], list[dict[str, Card]](), threading.Barrier(2)

    def run(stage: Stage) -> None:
        start.wait()
        results.append(run_stage(workspace, stage, inputs, Pool(lease_s=8.0)))

    threads = [threading.Thread(target=run, args=(stage,)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert list(results[0]) == [shard.name for shard in inputs]
    assert stages[0].made + stages[1].made == Counter(shard.name for shard in inputs)
    assert left_claims(workspace) == []


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("waits", ["sync", "async"])
def test_as_many_shards_are_in_flight_as_the_pool_says(workspace: Workspace, in_flight: int, waits: str) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def change(by: int) -> None:
        nonlocal now, most
        with lock:
            now += by
            most = max(most, now)

    class Sync(Doubling):
        def run(self, work: Work) -> Any:
            change(1)
            time.sleep(0.1)
            change(-1)
            return super().run(work)

    class Async(Doubling):
        async def run(self, work: Work) -> Any:
            change(1)
            await asyncio.sleep(0.1)
            change(-1)
            return write(work)

    run_stage(workspace, Sync() if waits == "sync" else Async(), INPUTS, Pool(in_flight=in_flight))
    assert most == in_flight
    assert pending_shards(workspace, FOLDER, INPUTS)[0] == []


def test_a_shard_that_another_run_has_taken_over_is_left_to_it(workspace: Workspace) -> None:
    shard, path = SHARDS[0], f"claims/{FOLDER}/{SHARDS[0].name}"
    other = Claims(workspace, "other")
    theirs = Card(stage="double", shard=shard.name, fingerprint="i", worker="other")

    class Overslept(Doubling):
        def run(self, work: Work) -> Any:
            if work.shard != shard:
                return super().run(work)
            assert work.still_mine()
            workspace.delete_file(path)  # what an expired lease comes to
            assert other.claim(path)
            deadline = time.monotonic() + 20
            while work.still_mine() and time.monotonic() < deadline:
                time.sleep(0.05)
            work.artifact.finish(theirs)
            other.close()
            work.check()
            raise AssertionError("the loss went unnoticed")

    cards = run_stage(workspace, Overslept(), INPUTS, Pool(lease_s=2.0))
    assert cards[shard.name] == theirs
    assert not workspace.exists(f"{FOLDER}/{shard.file('.txt')}")
    assert left_claims(workspace) == []


# On Ray's actors


@pytest.fixture
def on_ray(ray_local: None) -> Iterator[None]:
    """Workers cannot import tests, so that their stages travel whole."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


class Deadly(Doubling):
    """Ends its worker over one shard so many times; deaths are counted by files."""

    def __init__(self, deaths: Path, times: int, how: str) -> None:
        super().__init__()
        self.deaths, self.times, self.how = deaths, times, how

    def run(self, work: Work) -> Any:
        if work.shard == SHARDS[1] and len(list(self.deaths.iterdir())) < self.times:
            (self.deaths / str(time.time_ns())).touch()
            if self.how == "exit":
                os._exit(1)
            raise WorkerLost("the device is out of memory")
        return write(work)


@pytest.mark.ray
def test_a_worker_that_dies_over_a_shard_is_replaced(workspace: Workspace, tmp_path: Path, on_ray: None) -> None:
    (deaths := tmp_path / "deaths").mkdir()
    reported: list[str] = []
    pool = Pool(here=False, in_flight=2, lease_s=8.0)
    cards = run_stage(workspace, Deadly(deaths, 1, "exit"), INPUTS, pool, lambda card: reported.append(card.shard))
    assert list(cards) == [shard.name for shard in SHARDS]
    assert sorted(reported) == sorted(cards)
    assert len(list(deaths.iterdir())) == 1
    assert workspace.read_bytes(f"{FOLDER}/{SHARDS[1].file('.txt')}") == b"2"
    assert left_claims(workspace) == []


@pytest.mark.ray
def test_three_workers_lost_over_one_shard_end_the_run(workspace: Workspace, tmp_path: Path, on_ray: None) -> None:
    (deaths := tmp_path / "deaths").mkdir()
    pool = Pool(here=False, log_path=str(tmp_path / "engine.log"))
    with pytest.raises(EngineError, match=r"3 workers died on shard user/00000001.*engine\.log"):
        run_stage(workspace, Deadly(deaths, 99, "lost"), INPUTS, pool)
    assert len(list(deaths.iterdir())) == 3
    assert "out of memory" in (tmp_path / "engine.log").read_text()


def test_files_of_a_gathered_thousand_are_looked_for_at_the_end_of_a_run(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (runner, shards):
        monkeypatch.setattr(module, "BLOCK", 10)  # for a thousand
    monkeypatch.setattr(shards, "GATHERED", 10)
    workspace = Workspace(s3_root)
    inputs = {Shard("user", number): "i" for number in range(11)}
    run_stage(workspace, Doubling(), dict(list(inputs.items())[:10]))
    assert workspace.names(FOLDER, "gathered", "user") == ["00000.jsonl"]
    workspace.delete_file(f"{FOLDER}/user/00000007.txt")
    assert [shard.number for shard in pending_shards(workspace, FOLDER, inputs)[0]] == [10]
    made: list[str] = []
    cards = run_stage(workspace, Doubling(), inputs, on_card=lambda card: made.append(card.shard))
    assert made == ["user/00000010", "user/00000007"]
    assert len(cards) == 11
    assert workspace.exists(FOLDER, "user", "00000007.txt")
