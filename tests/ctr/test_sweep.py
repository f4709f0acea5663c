"""Which candidates a sweep tries, and a small one run by Ray Tune."""

from typing import Any

import pytest
from test_training import FINGERPRINT, GRID, SIDES, prepare

from owlrec.ctr.experiment import AdaptorConfig, CTRConfig, SweepGrid
from owlrec.ctr.training import GridJob, encode_once
from owlrec.runs.models import tried
from owlrec.workspace import Workspace


def test_candidates_are_all_combinations_that_the_arm_can_tell_apart() -> None:
    sweep = SweepGrid(learning_rates=(0.1, 0.2), dedicated_experts=(2, 3), hidden_dims=(16, 32))
    assert sweep.candidates(adaptor=False) == [{"learning_rate": 0.1}, {"learning_rate": 0.2}]
    found = [CTRConfig.model_validate(changes) for changes in sweep.candidates(adaptor=True)]
    assert len({(c.learning_rate, c.adaptor.dedicated_experts, c.adaptor.hidden_dim) for c in found}) == 8
    assert found[0].adaptor == AdaptorConfig(shared_experts=2, dedicated_experts=2, hidden_dim=16)


@pytest.mark.ray
def test_the_better_learning_rate_comes_first(ray_local: None, workspace: Workspace, toy_world: Any) -> None:
    prepare(workspace, toy_world)
    job = GridJob(
        settings=CTRConfig(batch_size=256, epochs=3, embed_dim=8, hidden_dims=(16, 8)),
        trials=(GRID[0],),
        knowledge={"knowledge": dict.fromkeys(SIDES, "vectors/abc")},
        fingerprint=FINGERPRINT,
        attributes=("genres",),
        profile=(),
        threads=1,
    )
    encode_once(workspace, job)
    found = tried(workspace, job, SweepGrid(learning_rates=(1e-6, 1e-2)).candidates(adaptor=False))
    assert [f["changes"]["learning_rate"] for f in found] == [1e-2, 1e-6]
    assert found[0]["valid_auc"] > 0.9 > found[1]["valid_auc"]
    assert workspace.names("ctr", "ray") == []
