"""A trained trial, written and read back, scores as before; damage is noticed."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from owlrec.ctr.batches import SplitBatches
from owlrec.ctr.experiment import CTRConfig, Trial, finished_trials, grid_folder, read_grid_scores
from owlrec.ctr.features import Split, encode_items, encode_samples
from owlrec.ctr.trainer import export_trial, load_trial, read_vocabularies, score, train_one, write_vocabularies
from owlrec.errors import WorkspaceError
from owlrec.evaluation import auc, gauc
from owlrec.workspace import Workspace

CONFIG = CTRConfig(batch_size=256, epochs=1, embed_dim=8, hidden_dims=(16, 8))
FINGERPRINT = "0123456789abcdef" * 4


@pytest.mark.parametrize("backbone", ["din", "dcnv2"])
@pytest.mark.parametrize("arm", ["none", "knowledge", "both", "streaming"])
def test_reloaded_model_gives_the_same_scores(workspace: Workspace, toy_world: Any, backbone: str, arm: Any) -> None:
    data, trial = toy_world.data, Trial(backbone=backbone, arm=arm, seed=0)
    trained = train_one(trial, data, CONFIG)
    folder = export_trial(workspace, FINGERPRINT, trained)
    write_vocabularies(workspace, grid_folder(FINGERPRINT), data.features.vocabularies)
    assert folder == f"ctr/0123456789abcdef/{backbone}/{arm}/seed-0"
    assert workspace.names(*folder.split("/")) == [
        "model.safetensors",
        "result.json",
        "spec.json",
        "test_scores.parquet",
    ]

    vocabularies = read_vocabularies(workspace, grid_folder(FINGERPRINT))
    items = encode_items([toy_world.items], vocabularies)
    model = load_trial(workspace, folder, items)
    test = toy_world.samples.filter(pc.equal(toy_world.samples["split"], "test"))
    samples = encode_samples(test, toy_world.users, items, vocabularies, model.spec.features.history_length)
    before = score(trained.model, SplitBatches(data.features.splits["test"], data.tables(trial), "cpu"))
    np.testing.assert_array_equal(score(model, SplitBatches(Split.of(samples), data.tables(trial), "cpu")), before)


def test_result_is_read_back_only_for_finished_trials(workspace: Workspace, toy_world: Any) -> None:
    wanted = [Trial(backbone="dcnv2", arm="none", seed=s) for s in (1, 0)]
    trained = train_one(wanted[1], toy_world.data, CONFIG)
    export_trial(workspace, FINGERPRINT, trained)
    assert finished_trials(workspace, FINGERPRINT, wanted) == [trained.result]
    assert finished_trials(workspace, "f" * 64, wanted) == []


def test_test_scores_are_those_that_the_result_is_of(workspace: Workspace, toy_world: Any) -> None:
    data, trial = toy_world.data, Trial(backbone="dcnv2", arm="knowledge", seed=0)
    trained = train_one(trial, data, CONFIG)
    export_trial(workspace, FINGERPRINT, trained)
    grid = read_grid_scores(workspace, FINGERPRINT, [trial])
    assert grid is not None
    test = toy_world.samples.filter(pc.equal(toy_world.samples["split"], "test"))
    assert grid.user_ids.tolist() == test["user_id"].to_pylist()
    assert grid.labels.tolist() == test["label"].to_pylist()
    assert auc(grid.labels, grid.scores[trial.path]) == trained.result.test.auc
    assert gauc(grid.labels, grid.scores[trial.path], grid.user_ids) == trained.result.test.gauc


def test_weights_of_another_model_are_refused(workspace: Workspace, toy_world: Any) -> None:
    data = toy_world.data
    folders = [
        export_trial(workspace, FINGERPRINT, train_one(Trial(backbone=b, arm="none", seed=0), data, CONFIG))
        for b in ("din", "dcnv2")
    ]
    other = workspace.read_bytes(f"{folders[1]}/model.safetensors")
    workspace.write_bytes(f"{folders[0]}/model.safetensors", other)
    with pytest.raises(WorkspaceError, match=r"do not match(.|\n)*train_ctr"):
        load_trial(workspace, folders[0], data.features.items)
    workspace.write_bytes(f"{folders[0]}/model.safetensors", other[:20])
    with pytest.raises(WorkspaceError, match="train_ctr"):
        load_trial(workspace, folders[0], data.features.items)
