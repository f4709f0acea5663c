"""The tests' own `kustomize build` against RFC 6902's examples, its refusals, and the real program where there is
one.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from kustomize_build import UnknownFeature, apply, build

KUBERNETES = Path(__file__).resolve().parent.parent.parent / "cluster" / "kubernetes"


@pytest.mark.parametrize(
    ("before", "operation", "after"),
    [
        ({"a": "b"}, {"op": "add", "path": "/c", "value": 1}, {"a": "b", "c": 1}),
        ({"a": ["x", "z"]}, {"op": "add", "path": "/a/1", "value": "y"}, {"a": ["x", "y", "z"]}),
        ({"a": ["x"]}, {"op": "add", "path": "/a/-", "value": ["y"]}, {"a": ["x", ["y"]]}),
        ({"a": 1, "b": 2}, {"op": "remove", "path": "/b"}, {"a": 1}),
        ({"a": ["x", "y", "z"]}, {"op": "remove", "path": "/a/1"}, {"a": ["x", "z"]}),
        ({"a": {"b": 1}}, {"op": "replace", "path": "/a/b", "value": 2}, {"a": {"b": 2}}),
        ({"a": [{"b": 1}]}, {"op": "replace", "path": "/a/0/b", "value": 2}, {"a": [{"b": 2}]}),
        ({"x/y": 1, "~": 2}, {"op": "remove", "path": "/x~1y"}, {"~": 2}),
        ({"x/y": 1, "~": 2}, {"op": "replace", "path": "/~0", "value": 3}, {"x/y": 1, "~": 3}),
    ],
)
def test_patches_follow_rfc_6902(before: dict, operation: dict, after: dict) -> None:
    apply(before, operation)
    assert before == after


@pytest.mark.parametrize("op", ["remove", "replace"])
def test_a_patch_of_what_is_not_there_is_refused(op: str) -> None:
    with pytest.raises(KeyError):
        apply({"a": 1}, {"op": op, "path": "/b", "value": 1})


@pytest.mark.parametrize("extra", [{"namePrefix": "x-"}, {"components": ["c"]}, {"patches": [{"patch": "inline"}]}])
def test_a_feature_that_is_not_known_is_refused(tmp_path: Path, extra: dict) -> None:
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "n"} | extra))
    with pytest.raises(UnknownFeature):
        build(tmp_path)


@pytest.mark.parametrize("overlay", ["dev", "spot", "prod"])
def test_the_real_kustomize_builds_the_same(overlay: str) -> None:
    """Debian's package `kustomize` brings it."""
    kustomize = shutil.which("kustomize")
    if kustomize is None:
        pytest.skip("kustomize is not installed; the equivalent is tested without it")
    folder = KUBERNETES / "overlays" / overlay
    text = subprocess.run([kustomize, "build", str(folder)], capture_output=True, text=True, check=True).stdout

    def keyed(objects: list[dict]) -> dict:
        return {(o["kind"], o["metadata"]["name"]): o for o in objects}

    assert keyed(build(folder)) == keyed([o for o in yaml.safe_load_all(text) if o])
