"""Tuning on Ray Train workers, one of which is killed, and the adapter that is left.

What a worker complains of arrives as in tests/ctr/test_training.py: both run on `fit_workers`.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from toy_taste import toy_examples, toy_rows, toy_texts  # type: ignore[import-not-found]

from owlrec.ctr.experiment import WorkersConfig
from owlrec.generation.engines import model_identity
from owlrec.ranking.lora import TuningSpec, load_model, tune, tune_adapter
from owlrec.ranking.samples import TuningSettings
from owlrec.workspace import Workspace

pytestmark = pytest.mark.ray
FAST: dict[str, Any] = {
    "dtype": "float32",
    "learning_rate": 0.02,
    "dropout": 0.0,  # it differs between one worker and two
    "batch_rows": 8,
    "epochs": 4,
    "patience": 9,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_ranker(tmp_path_factory.mktemp("ranker"), toy_texts())


def tuning_spec(
    workspace: Workspace, model: str, max_failures: int, num_workers: int = 1, **changes: Any
) -> TuningSpec:
    for split, n, seed in (("train", 48, 0), ("valid", 20, 1)):
        workspace.write_parquet(f"ranking/abc/{split}.parquet", toy_rows(n, seed))
    settings = TuningSettings(**FAST | changes)
    return TuningSpec(
        folder="ranking/abc",
        model=model,
        revision=None,
        wording="w" * 64,
        settings=settings,
        workers=WorkersConfig(num_workers=num_workers),
        threads=1,
        max_failures=max_failures,
    )


def test_two_workers_of_which_one_is_killed_tune_as_one_does(
    ray_local: None, workspace: Workspace, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = tuning_spec(workspace, model, num_workers=2, max_failures=2, checkpoint_steps=1)
    killed: list[int] = []

    def kill() -> None:
        progress = Path(workspace.path("ranking/abc/progress.json"))
        while not killed:
            time.sleep(0.02)
            if progress.exists():
                about = workspace.read_json("ranking/abc/progress.json")
                if about["step"] >= 3:
                    os.kill(about["pid"], signal.SIGKILL)
                    killed.append(about["step"])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    reported: list[int] = []
    adapter = tune_adapter(workspace, spec, reported.append)
    killer.join(5)
    assert killed
    assert 3 <= killed[0] < 24
    alone = tune(
        load_model(model, None, spec.settings), toy_examples(model, 48), toy_examples(model, 20, 1), spec.settings
    )
    tuned_progress, expected = adapter.manifest.progress, alone.progress
    assert tuned_progress.step == expected.step == sum(reported) == 24
    assert tuned_progress.losses == pytest.approx(expected.losses, abs=2e-3)
    assert tuned_progress.best_step == expected.best_step
    assert adapter.manifest.model == model_identity(model)

    assert sorted(workspace.names("ranking/abc")) == ["adapter", "ray", "train.parquet", "valid.parquet"]
    assert workspace.names("ranking/abc/ray") == []
    before = workspace.read_bytes("ranking/abc/adapter/adapter_model.safetensors")
    assert tune_adapter(workspace, spec, reported.append) == adapter  # tuned already: no worker starts
    assert workspace.read_bytes("ranking/abc/adapter/adapter_model.safetensors") == before
    assert capfd.readouterr().err == ""
