"""Test scores are read back to the bit, row by row alike for all trials, and hold nothing beside ids and scores."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from owlrec.ctr.experiment import SCORES_FILE, ScoredRows, Trial, read_grid_scores
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

FINGERPRINT = "fedcba9876543210" * 4
FIRST, SECOND, MISSING = (Trial(backbone="din", arm="none", seed=seed) for seed in range(3))


def write(workspace: Workspace, trial: Trial, items: list[int], scores: list[float]) -> str:
    users, labels = np.array([2**60, 1, 1]), np.array([1, 0, 1], dtype=np.float32)
    path = f"ctr/{FINGERPRINT[:16]}/{trial.path}/{SCORES_FILE}"
    workspace.write_parquet(path, ScoredRows(users, np.array(items), labels, np.array(scores)).to_table())
    return path


def test_scores_come_back_to_the_bit_for_the_trials_that_left_them(workspace: Workspace) -> None:
    path = write(workspace, FIRST, [5, 6, 7], [0.1, 1 / 3, 1e-300])
    write(workspace, SECOND, [5, 6, 7], [0.3, 0.2, 0.1])
    assert pq.read_schema(workspace.local_path(path)).names == ["user_id", "item_id", "label", "score"]
    grid = read_grid_scores(workspace, FINGERPRINT, [FIRST, MISSING, SECOND])
    assert grid is not None
    assert grid.user_ids.tolist() == [2**60, 1, 1]
    assert grid.labels.tolist() == [1, 0, 1]
    assert {path: scores.tolist() for path, scores in grid.scores.items()} == {
        "din/none/seed-0": [0.1, 1 / 3, 1e-300],
        "din/none/seed-1": [0.3, 0.2, 0.1],
    }
    assert read_grid_scores(workspace, FINGERPRINT, [MISSING]) is None


def test_scores_of_other_rows_are_not_paired(workspace: Workspace) -> None:
    write(workspace, FIRST, [5, 6, 7], [0.1, 0.2, 0.3])
    write(workspace, SECOND, [5, 7, 6], [0.1, 0.2, 0.3])
    with pytest.raises(WorkspaceError, match=r"seed-1/test_scores.parquet .* different rows .* run `train_ctr` again"):
        read_grid_scores(workspace, FINGERPRINT, [FIRST, SECOND])
