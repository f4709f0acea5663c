"""What a shard's rows draft from: read when the shard is claimed, on any storage, gone when it is done."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
from release_rows import publish_rows, tables, texts  # type: ignore[import-not-found]
from shard_runs import StageWithEngine, texts_file  # type: ignore[import-not-found]

from owlrec.generation import EchoEngineConfig
from owlrec.generation.engines import Completion, Engine, SamplingConfig
from owlrec.generation.job import build_job, table_inputs
from owlrec.ids import Kind
from owlrec.prompting.prompts import PromptConfig
from owlrec.releases import earlier_texts as module
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.releases.earlier_texts import ReleasedTexts
from owlrec.releases.release import current_release
from owlrec.runner import run_stage
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace
from owlrec_decoding import DecodingConfig

OLD = {("user", 1): "likes war", ("user", 2): "likes peace", ("user", 3): "likes owls", ("item", 1): "a film"}


class Recording(Engine):
    """Which pools are open, and what each request found open."""

    def __init__(self) -> None:
        self.open: dict[str, dict[int, str]] = {}
        self.searchable: dict[str, bool] = {}
        self.found: list[tuple[dict[str, Any], dict[str, dict[int, str]]]] = []

    async def open_texts(self, pools: Mapping[str, Mapping[int, str]], *, searchable: bool = True) -> None:
        for pool, its in pools.items():
            self.open[pool], self.searchable[pool] = dict(its), searchable

    async def close_texts(self, pools: Sequence[str]) -> None:
        for pool in pools:
            del self.open[pool]

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        assert extra is not None
        self.found.append((dict(extra), {name: self.open[name] for name in extra["owlrec_pools"]}))
        return Completion("A text about it that says something of its own.", 10, 5, "stop")

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def offered(
    earlier: ReleasedTexts,
    engine: Recording,
    ids: Sequence[int],
    *,
    kind: Kind = "user",
    cohorts: Mapping[int, Sequence[str]] | None = None,
    own: Mapping[int, str] | None = None,
) -> tuple[Mapping[int, list[str]], dict[str, dict[int, str]]]:
    """The pools of each row, and all that were open meanwhile."""

    async def within() -> tuple[Mapping[int, list[str]], dict[str, dict[int, str]]]:
        async with earlier.offered(engine, "shard", kind, ids, cohorts or {}, own or {}) as pools:
            return pools, dict(engine.open)

    return asyncio.run(within())


@pytest.fixture(params=["local", "s3"])
def released(request: pytest.FixtureRequest, workspace: Workspace) -> Workspace:
    where = workspace if request.param == "local" else Workspace(request.getfixturevalue("s3_root"))
    publish_rows(where, "old", texts(OLD))
    return where


def test_a_row_finds_its_own_text_its_cohorts_and_a_sample_of_its_kind(released: Workspace) -> None:
    engine, cohorts = Recording(), {1: ["a"], 2: ["a", "b", "c"], 9: ["a"]}
    pools, open_ = offered(ReleasedTexts(released), engine, [1, 2, 9], cohorts=cohorts)
    assert pools == {
        1: ["shard a", "shard", "user"],
        2: ["shard a", "shard b", "shard", "user"],
        9: ["shard a", "shard", "user"],
    }
    assert open_["shard"] == {1: "likes war", 2: "likes peace"}  # nothing is known of 9
    assert open_["shard a"] == {1: "likes war", 2: "likes peace"}
    assert open_["shard b"] == {2: "likes peace"}
    assert sorted(open_["user"].values()) == ["likes owls", "likes peace", "likes war"]
    assert engine.searchable == {"shard": False, "shard a": True, "shard b": True, "user": True}
    assert list(engine.open) == ["user"]  # the sample serves the next shard


def test_a_delta_renews_what_is_drafted_from(workspace: Workspace) -> None:
    first = publish_rows(workspace, "old", texts(OLD))
    publish_rows(workspace, "new", texts({("user", 1): "likes cats"}), delta_of=first.name)
    _, open_ = offered(ReleasedTexts(workspace), Recording(), [1, 2])
    assert open_["shard"] == {1: "likes cats", 2: "likes peace"}
    assert len(open_["user"]) == 3


def test_newer_texts_of_the_job_itself_come_first(released: Workspace) -> None:
    _, open_ = offered(ReleasedTexts(released), Recording(), [1, 2], own={1: "likes fish", 7: "else"})
    assert open_["shard"] == {1: "likes fish", 2: "likes peace"}


def test_the_sample_is_bounded(released: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 2)
    _, open_ = offered(ReleasedTexts(released), Recording(), [1])
    assert len(open_["user"]) == 2


@pytest.mark.parametrize(("relaxed", "kept"), [(True, {}), (False, {1: "likes war"})])
def test_relaxed_texts_are_not_relaxed_again(workspace: Workspace, relaxed: bool, kept: dict[int, str]) -> None:
    rows = tables(texts({("user", 1): "likes war"}))
    at = rows["knowledge"][0].schema.get_field_index("relaxed")
    rows["knowledge"][0] = rows["knowledge"][0].set_column(at, "relaxed", pa.array([3], pa.int32()))
    publish(workspace, **rows, info=ReleaseInfo(fingerprint="f" * 64, model="m", encoder="e"))
    _, open_ = offered(ReleasedTexts(workspace, relaxed), Recording(), [1])
    assert open_["shard"] == open_["user"] == kept


def test_without_a_release_rows_draft_from_what_the_run_writes(workspace: Workspace) -> None:
    pools, open_ = offered(ReleasedTexts(workspace), Recording(), [1])
    assert pools == {1: ["shard", "user"]}
    assert open_ == {"shard": {}, "user": {}}


def test_a_release_that_cannot_be_read_costs_no_text(released: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    name = current_release(released)
    for path in released.entries(f"releases/{name}"):
        if path.startswith("part"):
            released.delete_file(f"releases/{name}/{path}")
    _, open_ = offered(ReleasedTexts(released), Recording(), [1])
    assert open_["shard"] == {}
    assert "no drafts" in caplog.text


def test_a_shard_opens_its_texts_before_its_first_request(small_world: Workspace) -> None:
    publish_rows(small_world, "old", texts({("item", i): f"text {i}" for i in range(100, 130)}))
    echo, decoding = EchoEngineConfig(type="echo"), DecodingConfig(mode="strict")
    job = build_job(get_scenario("movies"), PromptConfig(), SamplingConfig(), echo, decoding)
    shard = next(shard for shard in table_inputs(small_world) if shard.kind == "item")
    engine = Recording()
    stage = StageWithEngine(job, engine, earlier_texts=ReleasedTexts)
    run_stage(small_world, stage, {shard: "i"})
    assert len(engine.found) == small_world.read_parquet(texts_file(job, shard)).num_rows > 0
    for extra, open_ in engine.found:
        id_ = extra["owlrec_document"]
        assert extra["owlrec_pools"] == [shard.name, "item"]
        assert open_[shard.name][id_] == f"text {id_}"
        assert len(open_["item"]) == 30
    assert list(engine.open) == ["item"]
