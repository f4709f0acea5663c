"""The export stage: which trial it takes, that it checks what it wrote, and what it says where it cannot."""

import dataclasses
import shutil
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from worlds import write_samples, write_vectors, write_world

from owlrec.ctr.artifact import Reads, read_card
from owlrec.ctr.experiment import CTRConfig, Trial, grid_folder
from owlrec.ctr.trainer import export_trial, train_one, write_vocabularies
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.recipe import Recipe
from owlrec.runs.models import export_ctr as run
from owlrec.runs.models import going_on_from, vector_folders
from owlrec.shards import finish_stage
from owlrec.sources.splits import read_samples
from owlrec.workspace import Workspace

torch.set_num_threads(1)
GRID = "beef" * 16
# The shuffled trial has the best valid AUC by far: it must not be taken all the same.
VALID = {("din", "none"): 0.6, ("dcnv2", "knowledge"): 0.8, ("din", "knowledge"): 0.7, ("din", "shuffled"): 0.9}


def recipe(workspace: Workspace) -> Recipe:
    ctr = CTRConfig(
        backbones=("din", "dcnv2"),
        arms=("none", "knowledge", "shuffled"),
        seeds=(0,),
        batch_size=256,
        epochs=1,
        embed_dim=8,
        hidden_dims=(16, 8),
    )
    parts = {"source": {"type": "movielens-100k"}, "engine": {"type": "echo"}}
    return Recipe.model_validate(
        {"name": "toy", "scenario": "movies", "workspace": workspace.root, "ctr": ctr.model_dump(), **parts}
    )


@pytest.fixture
def trained(grid: Workspace, workspace: Workspace) -> Workspace:
    """A copy of `grid` for one test."""
    shutil.copytree(grid.path(), workspace.path())
    return workspace


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, toy_world: Any) -> Workspace:
    """What `prepare`, `encode` and `train_ctr` leave, with valid AUCs as VALID has them."""
    workspace = Workspace(tmp_path_factory.mktemp("grid") / "ws")
    write_world(workspace, toy_world, n_shards=2)
    for table, kind in zip(toy_world.vectors, ("user", "item"), strict=True):
        write_vectors(workspace, "vectors/abc", f"knowledge-{kind}", table)
    samples = pa.concat_tables([read_samples(workspace, number) for number in workspace.table_shards("samples")])
    data = dataclasses.replace(toy_world, samples=samples).data
    for (backbone, arm), auc in VALID.items():
        done = train_one(Trial(backbone=backbone, arm=arm, seed=0), data, recipe(workspace).ctr)  # type: ignore[arg-type]
        valid = done.result.valid.model_copy(update={"auc": auc})
        export_trial(workspace, GRID, dataclasses.replace(done, result=done.result.model_copy(update={"valid": valid})))
    write_vocabularies(workspace, grid_folder(GRID), data.features.vocabularies)
    for stage, outputs in (("prepare", {}), ("encode", {"vectors": "vectors/abc"}), ("train_ctr", {"grid": GRID})):
        finish_stage(workspace, stage, stage, outputs=outputs, seconds=1)
    return workspace


def test_the_best_trial_on_valid_is_exported_and_checked(trained: Workspace) -> None:
    manifest = run(recipe(trained), trained)
    assert manifest.outputs["model"] == f"models/{GRID[:16]}-dcnv2-knowledge-seed-0"
    assert trained.names(manifest.outputs["model"]) == [
        "cards",
        "items.safetensors",
        "model.json",
        "model.safetensors",
        "profiles",
        "program.pt2",
        "spec.json",
        "vocabularies.parquet",
    ]
    card = read_card(trained, manifest.outputs["model"])
    assert card.items == 20
    assert card.reads == Reads(user=("knowledge",), item=("knowledge",), encoder="e", codebooks={})
    assert card.valid.auc == 0.8
    for path in ("model", "program"):
        assert float(manifest.counts[f"{path}_difference"]) < 1e-5
    assert run(recipe(trained), trained) == manifest  # done already


def test_a_trial_may_be_named(trained: Workspace) -> None:
    manifest = run(recipe(trained), trained, trial="din/none/seed-0")
    assert manifest.outputs["model"].endswith("din-none-seed-0")
    assert read_card(trained, manifest.outputs["model"]).reads is None
    with pytest.raises(RecipeError, match=r"trial 'din/nono/seed-0' .*Did you mean 'din/none/seed-0'"):
        run(recipe(trained), trained, trial="din/nono/seed-0")
    with pytest.raises(RecipeError, match=r"trial '.*' cannot be exported"):
        run(recipe(trained), trained, trial="din/shuffled/seed-0")


def test_scores_off_the_trainers_are_refused(trained: Workspace) -> None:
    path = f"ctr/{GRID[:16]}/dcnv2/knowledge/seed-0/test_scores.parquet"
    table = trained.read_parquet(path)
    moved = table.set_column(3, "score", pa.array(table["score"].to_numpy() * 0.9))
    trained.write_parquet(path, moved)
    with pytest.raises(WorkspaceError, match=r"trainer's test scores.*train_ctr"):
        run(recipe(trained), trained)
    with pytest.raises(WorkspaceError, match=r"finished artifact"):
        read_card(trained, f"models/{GRID[:16]}-dcnv2-knowledge-seed-0")


def test_other_samples_than_were_scored_are_refused(trained: Workspace) -> None:
    samples = pa.concat_tables([read_samples(trained, number) for number in trained.table_shards("samples")])
    write_samples(trained, samples.filter(pc.greater(samples["user_id"], 131)))
    with pytest.raises(WorkspaceError, match="do not match the current samples"):
        run(recipe(trained), trained)


def test_nothing_trained_is_said(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="train_ctr"):
        run(recipe(workspace), workspace)


def test_only_a_trial_that_the_model_fits_may_go_on_from_it(trained: Workspace) -> None:
    artifact = run(recipe(trained), trained).outputs["model"]  # dcnv2 with knowledge
    same = Trial(backbone="dcnv2", arm="knowledge", seed=3)
    folders = vector_folders(trained, "vectors/abc")
    assert going_on_from(trained, artifact, [same], folders) is None  # its vectors were not reduced
    for other in (Trial(backbone="din", arm="knowledge", seed=0), Trial(backbone="dcnv2", arm="none", seed=0)):
        with pytest.raises(RecipeError, match=f"{other.path} cannot continue from {artifact}"):
            going_on_from(trained, artifact, [same, other], folders)
    card = trained.read_json(f"{artifact}/model.json")
    trained.write_json(f"{artifact}/model.json", card | {"reads": card["reads"] | {"encoder": "another"}})
    with pytest.raises(RecipeError, match="another"):
        going_on_from(trained, artifact, [same], folders)


def test_a_control_is_not_exported(trained: Workspace) -> None:
    with pytest.raises(RecipeError, match="vectors of a release"):
        run(recipe(trained), trained, trial="din/shuffled/seed-0")
