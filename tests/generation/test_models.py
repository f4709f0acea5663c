"""What `model` may name, and how a bad one is explained."""

from pathlib import Path

import pytest

from owlrec.errors import EngineError
from owlrec.generation.engines import model_identity, resolve_model


def folder(tmp_path: Path, *names: str) -> str:
    for name in names:
        (tmp_path / name).write_text("{}")
    return str(tmp_path)


def test_whole_folder_and_hub_name_pass(tmp_path: Path) -> None:
    path = folder(tmp_path, "config.json", "model.safetensors", "tokenizer.json")
    assert resolve_model(path) == path
    assert resolve_model("org/model") == "org/model"


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (("model.safetensors", "tokenizer.json"), "config.json"),
        (("config.json", "tokenizer.json"), "weights"),
        (("config.json", "model.safetensors"), "tokenizer"),
    ],
)
def test_incomplete_folder_is_named_with_what_it_lacks(tmp_path: Path, names: tuple[str, ...], lacks: str) -> None:
    with pytest.raises(EngineError, match=f"has no {lacks}"):
        resolve_model(folder(tmp_path, *names))


def test_absent_folder_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the folder"):
        resolve_model(str(tmp_path / "absent"))


def test_identity_changes_with_the_folder_and_the_revision(tmp_path: Path) -> None:
    path = folder(tmp_path, "config.json", "model.safetensors", "tokenizer.json")
    before = model_identity(path)
    (tmp_path / "model.safetensors").write_text("other weights")
    assert model_identity(path) != before
    assert model_identity("org/m", "a") != model_identity("org/m", "b")
