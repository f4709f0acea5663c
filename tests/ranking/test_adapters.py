"""The adapter's folder: what peft makes of it, and what it is refused for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from toy_taste import toy_examples, toy_texts  # type: ignore[import-not-found]

from owlrec.ctr.trainer import ALONE
from owlrec.errors import EngineError, WorkspaceError
from owlrec.ranking.lora import TuningProgress, load_model, open_adapter, save_adapter, score, tune
from owlrec.ranking.samples import TuningSettings
from owlrec.workspace import Workspace

MADE_FOR = {"model": "tiny:1", "wording": "w" * 64}


def save_zeros(workspace: Workspace) -> None:
    weights = save({"a": torch.zeros(2)})
    save_adapter(workspace, "r/adapter", weights, {"r": 8}, **MADE_FOR, progress=TuningProgress())


def test_peft_loads_what_was_tuned(workspace: Workspace, tmp_path: Path) -> None:
    from peft import PeftModel

    model = write_tiny_ranker(tmp_path / "model", toy_texts())
    config = TuningSettings(dtype="float32", learning_rate=0.02, epochs=1, batch_rows=16)
    net, valid = load_model(model, None, config), toy_examples(model, 30, 1)
    tuned = tune(net, toy_examples(model, 64), valid, config)
    save_adapter(workspace, "r/adapter", save(tuned.weights), tuned.settings, **MADE_FOR, progress=tuned.progress)
    adapter = open_adapter(workspace, "r/adapter", **MADE_FOR)
    assert adapter.manifest.progress == tuned.progress
    assert adapter.manifest.rank == 8
    fresh = load_model(model, None, config)
    plain = score(fresh, valid, 2048, ALONE)
    loaded = score(PeftModel.from_pretrained(fresh, adapter.folder), valid, 2048, ALONE)
    net.eval()
    np.testing.assert_allclose(loaded, score(net, valid, 2048, ALONE), atol=1e-5)
    assert np.abs(loaded - plain).max() > 0.05


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "large:2"}, "adapter for tiny:1, but the ranker's model is large:2"),
        ({"wording": "v" * 64}, "different wording"),
    ],
)
def test_an_adapter_of_another_model_or_wording_is_refused(
    workspace: Workspace, other: dict[str, Any], message: str
) -> None:
    save_zeros(workspace)
    with pytest.raises(EngineError, match=message):
        open_adapter(workspace, "r/adapter", **MADE_FOR | other)


def test_missing_and_damaged_adapters_are_refused(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="does not exist"):
        open_adapter(workspace, "r/adapter", **MADE_FOR)
    save_zeros(workspace)
    workspace.write_bytes("r/adapter/adapter_model.safetensors", b"x")
    with pytest.raises(WorkspaceError, match="weights do not match"):
        open_adapter(workspace, "r/adapter", **MADE_FOR)
    workspace.write_json("r/adapter/ranker.json", {"rank": 8})
    with pytest.raises(WorkspaceError, match="is damaged"):
        open_adapter(workspace, "r/adapter", **MADE_FOR)


def test_an_adapter_on_an_object_store_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWLREC_CACHE", str(tmp_path))
    workspace = Workspace("memory://ranker-adapters")
    save_zeros(workspace)
    folder = Path(open_adapter(workspace, "r/adapter", **MADE_FOR).folder)
    assert folder.is_relative_to(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert open_adapter(workspace, "r/adapter", **MADE_FOR).folder == str(folder)
