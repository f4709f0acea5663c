"""Encoding, reduction, training, export and scoring on an object store: the same figures as on a local disk."""

from typing import Any

import numpy as np
from worlds import write_vectors, write_world

from owlrec.ctr.artifact import CtrScorer, LiveState, TableKnowledge, write_artifact
from owlrec.ctr.dataset import encode_tables, open_features, open_tables, reduce_once
from owlrec.ctr.experiment import CTRConfig, Trial, grid_folder, read_grid_scores
from owlrec.ctr.trainer import TrainingData, export_trial, train_one
from owlrec.workspace import Workspace

CONFIG = CTRConfig(batch_size=128, learning_rate=0.01, epochs=1, embed_dim=8, hidden_dims=(16, 8))
GRID, KINDS = "cafe" * 16, ("user", "item")
TRIAL = Trial(backbone="din", arm="knowledge", seed=0)


def figures(workspace: Workspace, world: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """Test metrics, the scores that were stored, and scores of the artifact."""
    write_world(workspace, world, n_shards=4)
    for kind, table in zip(KINDS, world.vectors, strict=True):
        write_vectors(workspace, "vectors/abc", f"knowledge-{kind}", table)
    encode_tables(workspace, grid_folder(GRID), min_item_count=1)
    folders = reduce_once(workspace, {"knowledge": dict.fromkeys(KINDS, "vectors/abc")}, 0.95, GRID)
    data = TrainingData(open_features(workspace, grid_folder(GRID)), open_tables(workspace, folders, held=False))
    trained = train_one(TRIAL, data, CONFIG)
    export_trial(workspace, GRID, trained)
    stored = read_grid_scores(workspace, GRID, [TRIAL])
    assert stored is not None
    tables = data.tables(TRIAL)
    assert tables is not None
    folder = write_artifact(workspace, GRID, TRIAL, data.features.items, projection=folders["knowledge"]["user"])
    assert workspace.exists(folder, "projection.json")
    assert len(workspace.names(folder, "profiles")) == 4
    scorer = CtrScorer.open(workspace, folder)
    scores = scorer.score(3, range(20), LiveState(scorer.model, TableKnowledge(tables)))
    return trained.result.test, stored.scores[TRIAL.path], scores


def test_an_object_store_gives_the_figures_of_a_local_disk(workspace: Workspace, s3_root: str, toy_world: Any) -> None:
    local, remote = (figures(where, toy_world) for where in (workspace, Workspace(s3_root)))
    assert local[0] == remote[0]
    np.testing.assert_array_equal(local[1], remote[1])
    np.testing.assert_array_equal(local[2], remote[2])
