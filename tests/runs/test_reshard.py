"""Doubling shards: each row at its new home, nothing lost, and a killed run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from owlrec.errors import WorkspaceError
from owlrec.ids import shard_of
from owlrec.recipe import Recipe
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.runs.stages import prepare
from owlrec.runs.upkeep import double_shards
from owlrec.schema import vectors_table
from owlrec.shards import Artifact, Shard, finished_stage
from owlrec.sources.splits import read_samples
from owlrec.storage import Storage
from owlrec.workspace import Workspace

TABLES = ("users", "items", "interactions", "histories")


def workspace_of(path: Path, shard_rows: int = 256) -> Workspace:
    values = {"name": "t", "scenario": "movies", "engine": {"type": "echo"}, "source": {"type": "movielens-100k"}}
    recipe = Recipe.model_validate({**values, "workspace": str(path), "shard_rows": shard_rows})
    prepare(recipe, Workspace(path))
    return Workspace(path)


class Texts(Stage):
    """A text and a vector per user, with a card per shard; every 50th user is dead."""

    name, folder = "texts", "knowledge/0123456789abcdef"

    def run(self, work: Work) -> Result:
        ids = work.workspace.read_shard("users", work.shard.number, ["user_id"])["user_id"].to_numpy()
        text = pa.table({"id": ids[ids % 50 > 0], "text": [f"text of {n}" for n in ids[ids % 50 > 0]]})
        dead = pa.table({"id": ids[ids % 50 == 0]})
        vectors = vectors_table("user", ids, np.c_[ids % 7, ids % 11].astype(np.float16))
        made = {work.shard.file(): text, "dead/" + work.shard.file(): dead}
        files = {path: work.workspace.write_parquet(f"{self.folder}/{path}", table) for path, table in made.items()}
        path = f"vectors/{work.shard.number:08d}.arrow"
        files[path] = work.workspace.write_arrow(f"{self.folder}/{path}", vectors, vectors.schema)
        return Result(files, len(ids), text.num_rows, dead.num_rows, counts={"tokens": len(ids)})


def with_texts(workspace: Workspace) -> None:
    run_stage(workspace, Texts(), {Shard("user", n): "made of" for n in workspace.table_shards("users")})


def content(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    rows = {name: workspace.read_table(name) for name in TABLES}
    rows["samples"] = pa.concat_tables([read_samples(workspace, n) for n in workspace.table_shards("samples")])
    return {name: sorted(table.to_pylist(), key=str) for name, table in rows.items()}


def test_every_row_is_at_its_new_home_and_nothing_is_lost(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path)
    with_texts(workspace)
    before, stage = content(workspace), finished_stage(workspace, "prepare")
    assert double_shards(workspace) == {"user": 8, "item": 16}  # of 943 users and 1,682 items by 256: 4 and 8
    workspace = Workspace(tmp_path)
    assert content(workspace) == before
    for name, key in (("users", "user_id"), ("items", "item_id"), ("samples", "user_id")):
        for number in workspace.table_shards(name):
            ids = workspace.read_shard(name, number, [key])[key].to_numpy()
            assert set(shard_of(ids, len(workspace.table_shards(name)))) == {number}
            assert (np.diff(ids) >= 0).all()
    assert finished_stage(workspace, "prepare") == stage
    assert not workspace.exists("reshard")

    cards = Artifact(workspace, Texts.folder).cards()
    assert list(cards) == [f"user/{n:08d}" for n in range(8)]
    assert sum(card.rows_in for card in cards.values()) == 943
    assert sum(card.rows_dead for card in cards.values()) == 943 // 50
    assert sum(card.counts.get("tokens", 0) for card in cards.values()) == 943  # type: ignore[misc]
    assert all(card.fingerprint == "made of" for card in cards.values())
    for number in range(8):
        ids = workspace.read_parquet(f"{Texts.folder}/user/{number:08d}.parquet")["id"].to_numpy()
        vectors = workspace.map_arrow(f"{Texts.folder}/vectors/{number:08d}.arrow")
        assert set(shard_of(ids, 8)) == {number}
        assert set(ids) <= set(vectors["id"].to_numpy())
        assert vectors["vector"].to_pylist() == [[n % 7, n % 11] for n in vectors["id"].to_pylist()]


def test_prepare_has_nothing_to_do_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double_shards(workspace_of(tmp_path))
    workspace_of(tmp_path)
    assert "already done" in capsys.readouterr().out


def test_one_kind_alone(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path)
    items = Storage(tmp_path).entries("tables", "items")
    assert double_shards(workspace, ["user"]) == {"user": 8}
    assert Workspace(tmp_path).n_shards("item") == 8
    assert Storage(tmp_path).entries("tables", "items") == items
    assert double_shards(Workspace(tmp_path), ["user"]) == {"user": 16}


def test_an_empty_workspace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="Run `prepare` first"):
        double_shards(Workspace(tmp_path))


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_write_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    workspace = workspace_of(tmp_path, 512)
    with_texts(workspace)
    before, random = content(workspace), np.random.default_rng(seed)
    left = 0
    real = Storage._install

    def dying(self: Storage, path: str, *rest: Any) -> Any:
        nonlocal left
        left -= not path.startswith("claims")
        if left == 0:
            raise KeyboardInterrupt
        return real(self, path, *rest)

    monkeypatch.setattr(Storage, "_install", dying)
    kills = 0
    while True:
        left = int(random.integers(1, 35))
        try:
            double_shards(Workspace(tmp_path), ["user"], Pool())
            break
        except KeyboardInterrupt:
            kills += 1
    monkeypatch.undo()
    assert kills
    workspace = Workspace(tmp_path)
    assert workspace.n_shards("user") == 4
    assert content(workspace) == before
    assert len(Artifact(workspace, Texts.folder).cards()) == 4
