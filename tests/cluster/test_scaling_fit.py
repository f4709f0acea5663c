"""Ray's own autoscaler (v2) decides, from our files, which machines it would start for what recipes and applications
ask for: nothing may be infeasible.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import CLUSTER, OVERLAYS, by_kind, overlay, ray_clusters, serve_config
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
from serving_apps import built, replicas

from owlrec.recipe import load_recipe
from owlrec.runs.stages import engine_cpus

Demand = list[tuple[dict[str, float], int]]


def launched(config: AutoscalingConfig, demand: Demand) -> dict[str, int]:
    """How many machines of each kind Ray would start from an empty cluster, the head aside. Fails on what no machine
    can hold.
    """
    requests = [ResourceRequestByCount(request=ResourceRequestUtil.make(resources), count=n) for resources, n in demand]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=requests,
        )
    )
    assert not reply.infeasible_resource_requests, demand
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def on_vms(cloud: str) -> AutoscalingConfig:
    return AutoscalingConfig(yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text()), skip_content_hash=True)


def on_kubernetes(name: str, cluster: str) -> AutoscalingConfig:
    meta = {"name": cluster, "namespace": "owlrec"}
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": meta, "spec": ray_clusters(overlay(name))[cluster]})
    return AutoscalingConfig(derived, skip_content_hash=True)


def recipe_of(name: str, tmp_path: Path) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(by_kind(overlay(name), "ConfigMap")["owlrec-recipe"]["data"]["recipe.yaml"])
    return load_recipe(path)


def engines(recipe: Any) -> Demand:
    """What `generate` asks for at most, beside a task of Ray Data and the driver of a refresh."""
    one = {"CPU": engine_cpus(recipe.engine, recipe.generate), "GPU": recipe.generate.engine_gpus}
    engine = {k: v for k, v in one.items() if v}
    return [(engine, recipe.generate.most_replicas), ({"CPU": 1}, 2)]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_recipes_engines_fit_the_clusters_machines(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path)
    assert recipe.workspace.startswith("/workspace/")
    assert recipe.generate.engine_cpus is not None  # the default would be the cores of the machine below the head
    started = launched(on_kubernetes(name, "owlrec"), engines(recipe))
    # Tasks take CPUs that engines leave on machines of GPUs, before further machines are started.
    assert started.keys() == ({"cpu"} if name == "dev" else {"gpu-l4"})


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_same_recipe_fits_the_clouds_machines(cloud: str, tmp_path: Path) -> None:
    config, recipe = on_vms(cloud), recipe_of("spot", tmp_path)
    gpus = {name: t.resources.get("GPU", 0) for name, t in config.get_node_type_configs().items()}
    started = launched(config, engines(recipe))
    assert sum(gpus[name] * n for name, n in started.items()) == recipe.generate.most_replicas


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_one_engine_starts_the_smallest_gpu_and_each_kind_can_be_asked_for(cloud: str) -> None:
    config = on_vms(cloud)
    smallest = "gpu_a10g" if cloud == "aws" else "gpu_l4"
    assert launched(config, [({"CPU": 4, "GPU": 1}, 1)]) == {smallest: 1}
    for kind, accelerator in (("gpu_a100", "A100"), ("gpu_h100", "H100")):
        assert launched(config, [({"CPU": 4, "GPU": 1, f"accelerator_type:{accelerator}": 0.001}, 1)]) == {kind: 1}


def test_work_without_gpus_starts_none() -> None:
    for config in (on_vms("aws"), on_vms("gcp"), on_kubernetes("spot", "owlrec")):
        assert launched(config, [({"CPU": 4}, 3)]).keys() == {"cpu"}


def test_what_fits_nowhere_is_noticed() -> None:
    with pytest.raises(AssertionError):
        launched(on_kubernetes("dev", "owlrec"), [({"GPU": 1}, 1)])


@pytest.mark.parametrize("most", [False, True], ids=["least", "most"])
@pytest.mark.parametrize("name", OVERLAYS)
def test_all_replicas_of_the_applications_fit(name: str, most: bool) -> None:
    demand: Demand = []
    for application in serve_config(overlay(name))["applications"]:
        for deployment in built(application):
            low, high = replicas(deployment)
            demand.append(({"CPU": deployment.ray_actor_options["num_cpus"]}, high if most else low))
    started = launched(on_kubernetes(name, "owlrec-apps"), demand)
    group = ray_clusters(overlay(name))["owlrec-apps"]["workerGroupSpecs"][0]
    assert started["serve"] <= (group["maxReplicas"] if most else group["minReplicas"])
