"""aws.yaml and gcp.yaml by Ray's own schema and preparation, and by what we promise of them."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from manifests import CLUSTER
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

import owlrec

clouds = pytest.mark.parametrize("cloud", ["aws", "gcp"])


@cache
def config(cloud: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    return settings


def workers(cloud: str) -> dict[str, dict[str, Any]]:
    return {n: t for n, t in config(cloud)["available_node_types"].items() if n != "head"}


def is_spot(cloud: str, node_type: dict[str, Any]) -> bool:
    """As the cloud itself will read it."""
    node = node_type["node_config"]
    if cloud == "aws":
        return bool(node.get("InstanceMarketOptions", {}).get("MarketType") == "spot")
    return bool(node.get("scheduling", {}).get("provisioningModel") == "SPOT")


@clouds
def test_rays_own_schema_and_preparation_take_it(cloud: str) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config(cloud), schema)
    validate_config(prepare_config(config(cloud)))


@clouds
def test_no_default_of_rays_installs_another_ray(cloud: str) -> None:
    """Ray's defaults for both clouds set up machines with `pip install` of Ray's nightly build."""
    filled = fillout_defaults(config(cloud))
    commands = [c for key in ("setup_commands", "head_setup_commands", "worker_setup_commands") for c in filled[key]]
    assert commands == []
    assert "pip install" not in json.dumps(filled)


@clouds
def test_the_head_is_on_demand_and_takes_no_tasks(cloud: str) -> None:
    head = config(cloud)["available_node_types"][config(cloud)["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(cloud, head)
    (start,) = [c for c in config(cloud)["head_start_ray_commands"] if "ray start" in c]
    assert "--num-cpus=0" in start.split()
    assert "--dashboard-host" not in start  # 8265 stays on the head's loopback: `ray dashboard` forwards it


@clouds
def test_workers_scale_from_nothing_and_gpus_are_spot(cloud: str) -> None:
    assert config(cloud)["idle_timeout_minutes"] <= 10
    assert not is_spot(cloud, workers(cloud)["cpu"])
    kinds = set()
    for name, node_type in workers(cloud).items():
        assert node_type["min_workers"] == 0
        assert 0 < node_type["max_workers"] <= config(cloud)["max_workers"]
        assert node_type["labels"]["ray.io/market-type"] == ("spot" if is_spot(cloud, node_type) else "on-demand")
        if name.startswith("gpu_"):
            kind = node_type["labels"]["ray.io/accelerator-type"]
            assert is_spot(cloud, node_type)
            assert node_type["resources"][f"accelerator_type:{kind}"] == 1
            kinds.add(kind)
    assert kinds == {"A10G" if cloud == "aws" else "L4", "A100", "H100"}


@clouds
def test_ray_runs_the_image_of_this_version_that_each_machine_needs(cloud: str) -> None:
    read = AutoscalingConfig(config(cloud), skip_content_hash=True)
    for name, node_type in config(cloud)["available_node_types"].items():
        kind = "gpu" if node_type["resources"].get("GPU") else "cpu"
        assert read.get_docker_config(name)["image"] == f"YOUR_REGISTRY/owlrec-{kind}:{owlrec.__version__}"


@clouds
def test_the_token_reaches_every_machine_and_stands_nowhere(cloud: str) -> None:
    assert "-e RAY_AUTH_MODE=token" in config(cloud)["docker"]["run_options"]
    assert config(cloud)["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_TOKEN" not in (CLUSTER / f"{cloud}.yaml").read_text()


@clouds
def test_logs_are_read_where_the_container_writes_them(cloud: str) -> None:
    mounts = [o.removeprefix("-v ").split(":") for o in config(cloud)["docker"]["run_options"] if o.startswith("-v ")]
    host = {inside: outside for outside, inside in mounts}
    (shipper,) = [c for c in config(cloud)["initialization_commands"] if "fluent-bit" in c]
    assert f"-v {host['/tmp/ray']}:" in shipper
    assert f"path={host['/tmp/ray']}/session_" in shipper
    assert any(
        f"install -d -o 1000 -g 1000 {host['/workspace']}" in c for c in config(cloud)["initialization_commands"]
    )


@clouds
def test_shell_commands_are_well_formed(cloud: str) -> None:
    keys = ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in (c for key in keys for c in config(cloud)[key]):
        subprocess.run(["bash", "-n", "-c", command], check=True)
