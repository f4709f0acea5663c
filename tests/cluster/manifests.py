"""The objects of cluster/kubernetes as `kustomize build` makes them, with their pods and Ray clusters found."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "cluster"
OVERLAYS = ("dev", "spot", "prod")


@cache
def overlay(name: str) -> tuple[Object, ...]:
    """What is applied for an overlay, with the jobs that are created on it. Skips the test without kustomize."""
    if (kustomize := shutil.which("kustomize")) is None:
        pytest.skip("kustomize is not installed (Debian's package `kustomize` has it)")
    folder = CLUSTER / "kubernetes" / "overlays" / name
    built = subprocess.run([kustomize, "build", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    jobs = (path.read_text() for path in sorted((CLUSTER / "kubernetes" / "jobs").glob("*.yaml")))
    return tuple(o for text in (built.stdout, *jobs) for o in yaml.safe_load_all(text) if o)


def name_of(o: Object) -> str:
    """An object's name, or how it begins."""
    return str(o["metadata"].get("name") or o["metadata"]["generateName"])


def by_kind(objects: tuple[Object, ...], kind: str) -> dict[str, Object]:
    """Objects of a kind by name."""
    return {name_of(o): o for o in objects if o["kind"] == kind}


def ray_clusters(objects: tuple[Object, ...]) -> dict[str, Object]:
    """The specs of Ray clusters by the name of the object that holds them."""
    clusters = {name: o["spec"] for name, o in by_kind(objects, "RayCluster").items()}
    return clusters | {name: o["spec"]["rayClusterConfig"] for name, o in by_kind(objects, "RayService").items()}


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Every pod template, with where it stands."""
    for name, o in by_kind(objects, "StatefulSet").items():
        yield name, o["spec"]["template"]
    for name, spec in ray_clusters(objects).items():
        yield f"{name}/head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}/{group['groupName']}", group["template"]


def containers(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object, Object]]:
    """Every container, with where it stands and its pod's spec."""
    for where, template in pods(objects):
        for container in template["spec"]["containers"]:
            yield f"{where}/{container['name']}", container, template["spec"]


def serve_config(objects: tuple[Object, ...]) -> Object:
    """The Serve configuration of an overlay."""
    (service,) = by_kind(objects, "RayService").values()
    config: Object = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def quantity(value: Any) -> float:
    """A Kubernetes quantity as a number."""
    match = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi|Ti|)", str(value))
    assert match, value
    factor = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[match[2]]
    return float(match[1]) * factor


def documented_inputs() -> set[str]:
    """What cluster/README.md lists as inputs: the first column of its tables, in backquotes."""
    rows = re.findall(r"^\| (`[^|]+) \|", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
