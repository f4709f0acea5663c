"""Which candidates a sweep tries, and a small one run by Ray Tune."""

from typing import Any

import pytest
from test_training import FINGERPRINT, GRID, KINDS, prepare

from owlrec.ctr.experiment import CTRConfig, SweepGrid
from owlrec.ctr.training import GridSpec, encode_once
from owlrec.runs.models import tried
from owlrec.workspace import Workspace


def test_candidates_are_all_combinations_that_the_arm_can_tell_apart() -> None:
    sweep = SweepGrid(learning_rates=(0.1, 0.2), expert_dims=(16, 32))
    assert sweep.candidates(adaptor=False) == [{"learning_rate": 0.1}, {"learning_rate": 0.2}]
    configs = [CTRConfig.model_validate(changes) for changes in sweep.candidates(adaptor=True)]
    assert {(c.learning_rate, c.expert_dim) for c in configs} == {(0.1, 16), (0.1, 32), (0.2, 16), (0.2, 32)}
    assert len(configs) == 4


@pytest.mark.ray
def test_the_better_learning_rate_comes_first(ray_local: None, workspace: Workspace, toy_world: Any) -> None:
    prepare(workspace, toy_world)
    spec = GridSpec(
        settings=CTRConfig(batch_size=256, epochs=3, embed_dim=8, hidden_dims=(16, 8)),
        trials=(GRID[0],),
        knowledge={"knowledge": dict.fromkeys(KINDS, "vectors/abc")},
        fingerprint=FINGERPRINT,
        features={"items": ("genres",), "users": ()},
        threads=1,
    )
    encode_once(workspace, spec)
    results = tried(workspace, spec, SweepGrid(learning_rates=(1e-6, 1e-2)).candidates(adaptor=False))
    assert [f["changes"]["learning_rate"] for f in results] == [1e-2, 1e-6]
    assert results[0]["valid_auc"] > 0.9 > results[1]["valid_auc"]
    assert workspace.names("ctr", "ray") == []
