"""What `kustomize build` makes of cluster/kubernetes, for the few features that are used there.

The real program is no dependency of the tests. This equivalent refuses every feature that it does not know, so that
the manifests cannot grow past it unnoticed; test_kustomize_build.py holds it against the real program where that is
installed.

Known: resources (files and folders), namespace, configMapGenerator from files without name suffixes, JSON patches
(RFC 6902: add, replace, remove) chosen by kind and name, images.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "generatorOptions", "configMapGenerator", "patches", "images"
}  # fmt: skip


class UnknownFeature(Exception):
    """A kustomization uses more than this module knows."""


def build(folder: Path) -> list[Object]:
    """The objects of a folder with a kustomization.yaml. Raises UnknownFeature."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    _only(spec, _KNOWN, str(folder))
    objects: list[Object] = []
    for name in spec.get("resources", []):
        path = (folder / name).resolve()
        objects += build(path) if path.is_dir() else load(path)
    objects += [_config_map(folder, spec, c) for c in spec.get("configMapGenerator", [])]
    for patch in spec.get("patches", []):
        _only(patch, {"path", "target"}, f"{folder}: patches")
        _only(patch["target"], {"kind", "name"}, f"{folder}: patches.target")
        targets = [o for o in objects if (o["kind"], o["metadata"]["name"]) == tuple(patch["target"].values())]
        if len(targets) != 1:
            raise UnknownFeature(f"{folder}: {patch['target']} names {len(targets)} objects")
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            apply(targets[0], operation)
    for o in objects:
        if o["kind"] != "Namespace":
            o["metadata"]["namespace"] = spec["namespace"]
        for image in spec.get("images", []):
            _only(image, {"name", "newName", "newTag"}, f"{folder}: images")
            _rename_image(o, image["name"], f"{image['newName']}:{image['newTag']}")
    keys = [(o["kind"], o["metadata"]["name"]) for o in objects]
    if len(set(keys)) != len(keys):
        raise UnknownFeature(f"{folder}: an object occurs twice")
    return objects


def load(path: Path) -> list[Object]:
    """A file's YAML documents. Each tree is its own: anchors must not make patches change two places."""
    return [copy_tree(o) for o in yaml.safe_load_all(path.read_text()) if o]


def apply(target: Any, operation: Object) -> None:
    """One operation of a JSON patch, in place. Raises KeyError or IndexError where its path does not exist."""
    _only(operation, {"op", "path", "value"}, "patch")
    *parents, last = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    op, value = operation["op"], copy_tree(operation.get("value"))
    if isinstance(target, list):
        if op == "add" and last == "-":
            target.append(value)
        elif op == "add":
            target.insert(int(last), value)
        elif op == "replace":
            target[int(last)] = value
        elif op == "remove":
            del target[int(last)]
    elif op == "add":
        target[last] = value
    elif op in ("replace", "remove"):
        target.pop(last)  # both want it to be there
        if op == "replace":
            target[last] = value
    if op not in ("add", "replace", "remove"):
        raise UnknownFeature(f"patch operation {op}")


def copy_tree(value: Any) -> Any:
    """A copy in which nothing is shared; `copy.deepcopy` keeps what anchors share shared."""
    if isinstance(value, dict):
        return {k: copy_tree(v) for k, v in value.items()}
    return [copy_tree(v) for v in value] if isinstance(value, list) else copy.copy(value)


def _config_map(folder: Path, spec: Object, config: Object) -> Object:
    _only(config, {"name", "files"}, f"{folder}: configMapGenerator")
    if spec.get("generatorOptions") != {"disableNameSuffixHash": True}:
        raise UnknownFeature(f"{folder}: generated names must have no suffix, which Ray's resources could not follow")
    data = {Path(name).name: (folder / name).read_text() for name in config["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config["name"]}, "data": data}


def _rename_image(value: Any, name: str, new: str) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            if key in ("containers", "initContainers"):
                for container in child:
                    if container["image"].partition(":")[0] == name:
                        container["image"] = new
            _rename_image(child, name, new)
    elif isinstance(value, list):
        for child in value:
            _rename_image(child, name, new)


def _only(value: Object, known: set[str], where: str) -> None:
    if unknown := value.keys() - known:
        raise UnknownFeature(f"{where}: {sorted(unknown)} is not known to tests/cluster/kustomize_build.py")
