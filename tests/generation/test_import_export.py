"""Imports: the same gate and tables as generated knowledge, no text that knows too much, each kind replaced whole."""

import json
from pathlib import Path

import pytest

from owlrec.errors import SourceError, WorkspaceError
from owlrec.generation.import_export import ImportSource, import_knowledge_file
from owlrec.generation.job import GenerationJob, dead_file, read_knowledge
from owlrec.generation.quality import QualityConfig
from owlrec.runs.exchange import export_knowledge, import_knowledge
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace

GOOD = "The film follows a stubborn sheriff through one long winter, and its slow, wry tone suits patient viewers."
AS_OF = 1_000_000_000_000  # of user 1 in the small world; one later for each further user


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def take_in(workspace: Workspace, **source: object) -> GenerationJob:
    config = ImportSource.model_validate({"format": "jsonl", **source})
    return import_knowledge_file(workspace, get_scenario("movies"), QualityConfig(), config)[0]


def dead_rows(workspace: Workspace, job: GenerationJob) -> dict[int, str]:
    artifact = job.artifact(workspace)
    letters = [artifact.path(dead_file(name)) for name, card in artifact.cards().items() if card.rows_dead]
    tables = [workspace.read_parquet(path) for path in letters]
    return {row["id"]: row["error"] for table in tables for row in table.to_pylist()}


def test_rows_become_knowledge_or_dead_letters(small_world: Workspace, tmp_path: Path) -> None:
    rows = [{"id": i, "text": GOOD} for i in range(100, 109)]
    rows += [{"id": 109, "text": ""}, {"id": 110, "text": "Please provide the names of the movies."}, {"text": GOOD}]
    job = take_in(small_world, kind="item", path=write(tmp_path / "k.jsonl", rows), framework="kar")
    table = read_knowledge(small_world, job.folder, "item")
    assert sorted(table["id"].to_pylist()) == list(range(100, 109))
    assert set(table["framework"].to_pylist()) == {"kar"}
    cards = job.artifact(small_world).cards()
    assert len(cards) == small_world.n_shards("item") == 4
    assert sum(card.rows_in for card in cards.values()) == 12
    assert dead_rows(small_world, job) == {109: "FailedQuality", 110: "FailedQuality", -12: "NoId"}


def test_texts_of_several_moments_are_kept_however_fresh(small_world: Workspace, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "text": GOOD, "as_of": AS_OF * 2},
        {"id": 2, "text": GOOD, "as_of": AS_OF + 2},
        {"id": 1, "text": f"{GOOD} Once more.", "as_of": AS_OF},
        {"id": 2, "text": GOOD, "as_of": AS_OF + 2},
    ]
    job = take_in(small_world, kind="user", path=write(tmp_path / "k.jsonl", rows))
    kept = read_knowledge(small_world, job.folder, "user").sort_by([("id", "ascending"), ("as_of", "ascending")])
    assert list(zip(kept["id"].to_pylist(), kept["as_of"].to_pylist(), strict=True)) == [
        (1, AS_OF),
        (1, AS_OF * 2),
        (2, AS_OF + 2),
    ]
    assert dead_rows(small_world, job) == {2: "DuplicateId"}


def test_import_replaces_its_kind_and_leaves_the_other(small_world: Workspace, tmp_path: Path) -> None:
    many = [{"id": i, "text": GOOD} for i in range(100, 110)]
    take_in(small_world, kind="item", path=write(tmp_path / "a.jsonl", many))
    user = [{"id": 1, "text": GOOD}]
    take_in(small_world, kind="user", as_of_ms=AS_OF, path=write(tmp_path / "b.jsonl", user))
    job = take_in(small_world, kind="item", path=write(tmp_path / "c.jsonl", many[:2]))
    assert sorted(read_knowledge(small_world, job.folder, "item")["id"].to_pylist()) == [100, 101]
    assert read_knowledge(small_world, job.folder, "user")["id"].to_pylist() == [1]


def test_mistaken_file_removes_nothing(small_world: Workspace, tmp_path: Path) -> None:
    rows = [{"id": 100, "text": GOOD}]
    job = take_in(small_world, kind="item", path=write(tmp_path / "a.jsonl", rows))
    with pytest.raises(SourceError, match="file not found"):
        take_in(small_world, kind="item", path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(SourceError, match="kind 'cohort'"):
        take_in(small_world, kind="cohort", path=str(tmp_path / "a.jsonl"))
    assert read_knowledge(small_world, job.folder, "item").num_rows == 1


def test_what_goes_out_comes_back_in(small_world: Workspace, tmp_path: Path, echo_recipe_for: object) -> None:
    recipe = echo_recipe_for(small_world)
    rows = [{"id": i, "text": f"{GOOD} Number {i}."} for i in range(100, 130)]
    path = write(tmp_path / "a.jsonl", rows)
    import_knowledge(recipe, small_world, ImportSource(kind="item", path=path))
    for name in ("out.jsonl", "out.jsonl.gz", "out.parquet"):
        out = str(tmp_path / name)
        assert export_knowledge(small_world, out) == 30
        manifest = import_knowledge(recipe, small_world, ImportSource(kind="item", path=out))
        table = read_knowledge(small_world, manifest.outputs["knowledge"], "item")
        texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
        assert texts == {row["id"]: row["text"] for row in rows}


def test_unprepared_workspace_says_what_to_run(workspace: Workspace, tmp_path: Path, echo_recipe_for: object) -> None:
    with pytest.raises(WorkspaceError, match="Run `prepare` first"):
        import_knowledge(echo_recipe_for(workspace), workspace, ImportSource(kind="item", path="x.jsonl"))
    with pytest.raises(WorkspaceError, match="Run `generate` first"):
        export_knowledge(workspace, str(tmp_path / "x.jsonl"))
