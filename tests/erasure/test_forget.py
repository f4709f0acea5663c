"""A user who leaves: after `forget` no byte of the workspace, of a bucket, a cache or a log tells of them."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scanned import DAY, ID, ITEMS, MARKER, RAW, START, TEXT, answers, names, scan, write_recipe, write_source
from served_world import knowledge_app  # type: ignore[import-not-found]
from starlette.testclient import TestClient
from typer.testing import CliRunner

from owlrec import cli
from owlrec.cohorts.building import build_cohorts
from owlrec.cohorts.clustering import FactorSettings
from owlrec.cohorts.cohort_model import CohortSettings, ProfileSettings, read_profiles
from owlrec.ctr.dataset import reduce_once
from owlrec.ctr.experiment import trials
from owlrec.ctr.trainer import export_trial, train_one
from owlrec.ctr.training import GridSpec, encode_once, load_data
from owlrec.erasure.forget import forget
from owlrec.generation.engines import EchoEngine, count_words
from owlrec.generation.import_export import ImportSource
from owlrec.ids import stable_id
from owlrec.machine import NodeCache
from owlrec.ranking.behavior_retrieval import ItemVectors
from owlrec.ranking.question_sets import write_questions
from owlrec.ranking.samples import RankerRun
from owlrec.recipe import Recipe, load_recipe
from owlrec.refresh.events import EVENTS
from owlrec.refresh.state import read_state
from owlrec.releases import current_release, list_releases, open_release
from owlrec.runs import STAGES
from owlrec.runs.exchange import export_vectors, import_knowledge
from owlrec.runs.models import export_ctr, vector_folders
from owlrec.runs.stages import stage_function
from owlrec.runs.upkeep import run as refresh
from owlrec.shards import finish_stage, needed_stage
from owlrec.storage import Storage
from owlrec.workspace import TOMBSTONES, Workspace, read_tombstones

pytestmark = pytest.mark.e2e
NOW = START + 40 * DAY
ITEM_TEXT = "Film {} follows a stubborn sheriff through one long winter; its slow, wry tone suits patient viewers."


def run(recipe: Recipe, workspace: Workspace, first: str, last: str) -> None:
    for stage in STAGES[STAGES.index(first) : STAGES.index(last) + 1]:
        stage_function(stage)(recipe, workspace)


def write_events(workspace: Workspace, name: str, users: list[str], first: int) -> None:
    """Twelve ratings of each of some users."""
    rows = [
        (stable_id(user), stable_id(f"i{(n + number) % ITEMS}"), 4.0, first + 1000 * n + number)
        for number, user in enumerate(users)
        for n in range(12)
    ]
    columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), EVENTS, strict=True)]
    workspace.write_parquet(f"events/{name}.parquet", pa.table(columns, schema=EVENTS))


def train(recipe: Recipe, workspace: Workspace) -> None:
    """What `train_ctr` leaves, trained in this process."""
    grid, encoded = "c" * 64, needed_stage(workspace, "encode", "").outputs["vectors"]
    folders = vector_folders(workspace, encoded)
    read = reduce_once(workspace, folders, recipe.ctr.knowledge_variance, grid)
    spec = GridSpec(
        settings=recipe.ctr,
        trials=trials(recipe.ctr),
        knowledge={source: dict(kinds) for source, kinds in read.items()},
        fingerprint=grid,
        features=recipe.features,
    )
    encode_once(workspace, spec, None)
    for trial in spec.trials:
        export_trial(workspace, grid, train_one(trial, load_data(workspace, spec), recipe.ctr))
    finish_stage(workspace, "train_ctr", grid, outputs={"grid": grid})


def whole_chain(folder: Path, recipe: Recipe, workspace: Workspace, *, trained: bool) -> None:
    """Everything that keeps a user: generated and imported texts, a refresh; models, reports and exports if trained."""
    run(recipe, workspace, "prepare", "generate")
    as_of = {row["user_id"]: row["as_of"] for row in workspace.read_table("histories").to_pylist()}
    rows = [
        {
            "id": name,
            "text": TEXT if name == RAW else TEXT.replace(MARKER, f"reader{n}"),
            "as_of": as_of[stable_id(name)],
        }
        for n, name in enumerate(names())
    ]
    rows.append({"id": RAW, "text": "", "as_of": 0})  # a dead letter
    items = [{"id": f"i{n}", "text": ITEM_TEXT.format(n)} for n in range(ITEMS)]
    for kind, texts in (("user", rows), ("item", items)):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in texts))
        import_knowledge(recipe, workspace, ImportSource(kind=kind, path=str(path), format="jsonl"))
    run(recipe, workspace, "encode", "publish")
    write_events(workspace, "first", [RAW, "u1", "u2"], START + 30 * DAY)
    refresh(recipe, workspace, now=NOW)
    if trained:
        train(recipe, workspace)
        run(recipe, workspace, "evaluate", "evaluate")
        export_ctr(recipe, workspace)
        export_vectors(recipe, workspace)
        assert recipe.ranking is not None
        vectors = ItemVectors.encoded(workspace, recipe.encoder)
        config = recipe.ranking.model_copy(update={"data": recipe.ranking.data.model_copy(update={"shots": None})})
        run_ = RankerRun(valid_samples=8, test_samples=8)
        write_questions(workspace, "ranking/tuned", config, recipe.domain, vectors, count_words, run_)
    log = workspace.log_path("engine")
    log.write_text(f"user {ID}: flagged\nuser 7: flagged\nrow of {RAW} was late\n")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that an LLM was asked in this process."""
    prompts: list[str] = []
    complete = EchoEngine.complete

    async def counted(self: EchoEngine, system: str, prompt: str, *rest: Any) -> Any:
        prompts.append(prompt)
        return await complete(self, system, prompt, *rest)

    monkeypatch.setattr(EchoEngine, "complete", counted)
    return prompts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node's cache of the test's own."""
    monkeypatch.setenv("OWLREC_CACHE", str(tmp_path / "cache"))
    NodeCache.default.cache_clear()
    yield tmp_path / "cache"
    NodeCache.default.cache_clear()


def test_no_byte_is_left(tmp_path: Path, cache: Path, asked: list[str]) -> None:
    write_source(tmp_path / "source")
    recipe_file = write_recipe(tmp_path, str(tmp_path / "ws"))
    recipe = load_recipe(recipe_file)
    workspace = Workspace(recipe.workspace)
    whole_chain(tmp_path, recipe, workspace, trained=True)

    before = scan(workspace)
    places = {path.partition("/")[0] for path in before}
    assert places >= {
        *("tables", "ingest", "knowledge", "vectors", "releases", "events", "refresh", "ctr", "models", "ranking"),
        *("exports", "logs"),
    }
    assert {name for hits in before.values() for name in hits} == {
        "raw id", "id", "marker", "id in bytes", "id as a key",
    }  # fmt: skip
    others, first = answers(workspace), current_release(workspace)

    app, _ = knowledge_app(workspace)
    with TestClient(app, base_url="http://localhost") as web:
        path = f"/v1/knowledge/user/{ID}"
        answer = web.get(path)
        assert answer.status_code == 200
        near = {"kind": "user", "id": stable_id("u3"), "limit": 30}
        assert str(ID) in str(web.post("/v1/knowledge:similar", json=near).json())
        # A HOLD keeps the release: the user must be silent all the same.
        assert CliRunner().invoke(cli.app, ["release", "hold", str(recipe_file)]).exit_code == 0
        started = time.monotonic()
        result = CliRunner().invoke(cli.app, ["forget", str(recipe_file), RAW, "nobody-knows-me"])
        assert result.exit_code == 1
        assert "HOLD" in result.stderr
        until_missing(web, path, started)
        assert web.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 404
        assert str(ID) not in str(web.post("/v1/knowledge:similar", json=near).json())
        assert current_release(workspace) == first
        assert answers(workspace) == others
        assert CliRunner().invoke(cli.app, ["release", "unhold", str(recipe_file)]).exit_code == 0
        result = CliRunner().invoke(cli.app, ["forget", str(recipe_file), RAW, "nobody-knows-me"])
        assert result.exit_code == 0, result.output
        assert web.get(path).status_code == 404

    assert scan(workspace) == {}
    assert scan(Storage(cache)) == {}
    assert answers(workspace) == others
    (run_folder,) = [name for name in workspace.names(TOMBSTONES) if name != "key"]
    report = workspace.read_json(f"{TOMBSTONES}/{run_folder}/report.json")
    assert (report["users"], report["unknown"]) == (2, 1)
    rows = {place["place"]: place["rows"] for place in report["places"]}
    assert rows["logs"] == 2
    assert rows["events"] == 12
    assert {"ctr", "models"} <= {model.partition("/")[0] for model in report["models"]}
    assert len(list_releases(workspace)) == 1
    assert workspace.log_path("engine").read_text() == "user 7: flagged\n"

    # A next run asks about nobody else, and a source that still has the user does not bring them back.
    asked.clear()
    run(recipe, workspace, "prepare", "publish")
    assert asked == []
    assert needed_stage(workspace, "generate", "").counts["user_rows_out"] == 2 * (len(names()) - 1)  # two cuts
    write_events(workspace, "second", [RAW, "u3"], START + 35 * DAY)
    refresh(recipe, workspace, now=NOW)
    assert len(asked) == 1
    assert read_state(workspace).counts["events_new"] == 12
    write_source(tmp_path / "source", more=2)
    run(recipe, workspace, "prepare", "publish")
    assert needed_stage(workspace, "prepare", "").counts["users"] == len(names()) - 1
    assert set(scan(workspace)) == {"events/second.parquet"}  # others write the log; what they add is not read


def until_missing(web: TestClient, path: str, started: float) -> None:
    while web.get(path).status_code != 404:
        assert time.monotonic() - started < 60
        time.sleep(0.05)


def test_a_server_knows_within_two_seconds(tmp_path: Path, cache: Path) -> None:
    from served_world import publish_world

    from owlrec.workspace import write_tombstones

    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    app, _ = knowledge_app(workspace)
    with TestClient(app, base_url="http://localhost") as web:
        assert web.get("/v1/knowledge/user/1").status_code == 200
        threading.Thread(target=write_tombstones, args=(workspace, np.array([1]))).start()
        started = time.monotonic()
        until_missing(web, "/v1/knowledge/user/1", started)
        assert time.monotonic() - started < 2
        entities = web.post("/v1/knowledge:batchGet", json={"kind": "user", "ids": [1, 2]}).json()["results"]
        assert [entity["found"] for entity in entities] == [False, True]


def test_no_byte_is_left_in_a_bucket(s3_root: str, tmp_path: Path, cache: Path, asked: list[str]) -> None:
    write_source(tmp_path / "source")
    recipe = load_recipe(write_recipe(tmp_path, s3_root))
    workspace = Workspace(s3_root)
    whole_chain(tmp_path, recipe, workspace, trained=False)
    logs = Storage(workspace.log_path("engine").parent)
    with open_release(workspace) as release:
        assert MARKER in str(release.store.get("user", [ID])) or release.store.get("user", [ID])[0] is not None
    assert {path.partition("/")[0] for path in scan(workspace)} >= {
        "tables",
        "knowledge",
        "vectors",
        "releases",
        "events",
    }
    assert scan(Storage(cache))
    assert scan(logs)
    others = answers(workspace)
    report = forget(workspace, [RAW])
    assert report.unknown == 0
    assert scan(workspace) == {}
    assert scan(Storage(cache)) == {}
    assert scan(logs) == {}
    assert answers(workspace) == others
    asked.clear()
    run(recipe, workspace, "prepare", "publish")
    assert asked == []


def test_a_killed_erasure_is_finished_by_the_same_command(
    tmp_path: Path, cache: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source")
    recipe = load_recipe(write_recipe(tmp_path, str(tmp_path / "whole")))
    whole_chain(tmp_path, recipe, Workspace(recipe.workspace), trained=False)
    others = answers(Workspace(recipe.workspace))
    total = 0
    for at in (0, *range(1, 400, 17)):  # 0: not killed
        if at > max(total, 1):
            assert at > 40  # it was killed at several steps
            break
        workspace = Workspace(tmp_path / f"killed-{at}")
        shutil.copytree(recipe.workspace, workspace.path())
        done = 0
        with monkeypatch.context() as dying:
            for name in ("write_bytes", "delete_file", "delete_dir", "upload"):
                step = getattr(Storage, name)

                def counted(self: Storage, *rest: Any, step: Any = step, at: int = at, **named: Any) -> Any:
                    nonlocal done
                    done += 1
                    if done == at:
                        raise KeyboardInterrupt
                    return step(self, *rest, **named)

                dying.setattr(Storage, name, counted)
            with suppress(KeyboardInterrupt):
                forget(workspace, [RAW])
        total = total or done
        workspace.delete_dir("claims")  # whose process would be gone
        assert ID in read_tombstones(workspace)
        report = forget(workspace, [RAW])
        assert report.unknown == (0 if 0 < at < total else 1), at  # the last step lets go of the claim
        assert scan(workspace) == {}, at
        assert answers(workspace) == others, at
        if at % 2 == 0:
            asked.clear()
            run(recipe.model_copy(update={"workspace": workspace.path()}), workspace, "prepare", "publish")
            assert asked == [], at
        shutil.rmtree(workspace.path())


def test_cohorts_go_on_without_a_representative(
    tmp_path: Path, cache: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quoting_all = CohortSettings(factors=FactorSettings(factors=8), profiles=ProfileSettings(common_share=0.05))
    monkeypatch.setattr("owlrec.runs.stages.build_cohorts", partial(build_cohorts, settings=quoting_all))
    write_source(tmp_path / "source")
    extra = """
        cohorts:
          mean_size: {users: 6, items: 8}
        prompts: {mode: both}
        """
    recipe = load_recipe(write_recipe(tmp_path, str(tmp_path / "ws"), extra=extra))
    workspace = Workspace(recipe.workspace)
    run(recipe, workspace, "prepare", "publish")
    folder = needed_stage(workspace, "cohorts", "").outputs["cohorts"]
    profiles = read_profiles(workspace, folder).to_pylist()  # several per cohort, by cut
    naming = {row["id"] for row in profiles if ID in row["representatives"]}
    quoting = {row["id"] for row in profiles if any(MARKER in attribute for attribute in row["attributes"])}
    assert quoting
    assert MARKER in str(workspace.read_table("users").to_pylist())
    others = answers(workspace)
    assert forget(workspace, [RAW]).unknown == 0
    assert scan(workspace) == {}
    assert answers(workspace) == others
    left = read_profiles(workspace, folder).to_pylist()
    all_ids, left_ids = {row["id"] for row in profiles}, {row["id"] for row in left}
    assert quoting <= all_ids - left_ids <= naming
    assert [row for row in left if row["id"] not in naming] == [row for row in profiles if row["id"] not in naming]
    with open_release(workspace) as release:
        texts = release.store.own_knowledge("cohort", sorted(all_ids))
    assert {id_ for id_, text in zip(sorted(all_ids), texts, strict=True) if text} == left_ids
    asked.clear()
    run(recipe, workspace, "prepare", "publish")
    # About cohorts that named the user, a text per cut, and about nobody else.
    assert 0 < len(asked) <= sum(row["id"] in naming for row in profiles)
    assert not any(MARKER in prompt for prompt in asked)
    assert {row["id"] for row in read_profiles(workspace, folder).to_pylist()} >= left_ids
