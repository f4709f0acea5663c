"""serveConfigV2 of every overlay: Serve's own schema, import paths, arguments, keys, and what survives a machine."""

import pytest
from manifests import OVERLAYS, overlay, ray_clusters, serve_config
from ray.serve.schema import ServeDeploySchema
from serving_apps import built, replicas

overlays = pytest.mark.parametrize("name", OVERLAYS)


@overlays
def test_serves_own_schema_takes_it(name: str) -> None:
    config = ServeDeploySchema.model_validate(serve_config(overlay(name)))
    routes = [a.route_prefix for a in config.applications]
    assert len(set(routes)) == len(routes)
    assert config.http_options.port == 8000
    assert config.logging_config is not None
    assert config.logging_config.enable_access_log is False  # paths hold ids of users


@overlays
def test_import_paths_build_with_their_arguments(name: str) -> None:
    """The builders check their arguments by pydantic models that refuse unknown keys; overrides name deployments."""
    apps = {a["name"]: {d.name for d in built(a)} for a in serve_config(overlay(name))["applications"]}
    assert apps["knowledge"] == {"Knowledge"}
    assert apps["explorer"] == {"Explorer"}
    assert apps.get("rank", {"Rank"}) == {"Rank"}
    assert ("rank" in apps) == (name == "prod")


def test_a_wrong_argument_does_not_build() -> None:
    application = serve_config(overlay("dev"))["applications"][0]
    with pytest.raises(ValueError, match="keyfile"):
        built(application | {"args": application["args"] | {"keyfile": "x"}})


@overlays
def test_every_application_asks_for_keys_from_the_mounted_secret(name: str) -> None:
    """Off loopback an application without keys refuses to start; see owlrec.serving.guard."""
    pod_specs = [g["template"]["spec"] for g in ray_clusters(overlay(name))["owlrec-apps"]["workerGroupSpecs"]]
    for application in serve_config(overlay(name))["applications"]:
        folder, _, file = application["args"]["keys_file"].rpartition("/")
        assert file == "keys.txt"
        for pod in pod_specs:
            (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == folder]
            (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
            assert volume["secret"]["secretName"] == "owlrec-api-keys"


def test_knowledge_and_ranking_survive_the_loss_of_a_machine() -> None:
    group = ray_clusters(overlay("prod"))["owlrec-apps"]["workerGroupSpecs"][0]
    assert group["minReplicas"] >= 2
    for application in serve_config(overlay("prod"))["applications"]:
        for deployment in built(application):
            if deployment.name != "Explorer":
                assert replicas(deployment)[0] >= 2
                assert deployment._replica_config.max_replicas_per_node == 1
