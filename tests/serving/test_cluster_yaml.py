"""serve_apps/cluster.yaml: Serve's own schema, what the applications are made of, and a deployment of it with keys, a
workspace and an artifact put in.
"""

import copy
import importlib
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from processes import free_port
from served_world import publish_world
from test_rank_serve import ITEMS, own_scores, write_artifacts

from owlrec import Client
from owlrec.serving.keys import new_key
from owlrec.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "serve_apps" / "cluster.yaml").read_text())
KEY, LINE = new_key("tests", ["admin"])


def test_serves_own_schema_takes_it():
    from ray.serve.schema import ServeDeploySchema

    checked = ServeDeploySchema.model_validate(CONFIG)
    assert {a.name: a.route_prefix for a in checked.applications} == {
        "knowledge": "/", "rank": "/rank", "explorer": "/explorer",
    }  # fmt: skip
    assert checked.logging_config.enable_access_log is False  # paths hold ids


@pytest.mark.parametrize("application", CONFIG["applications"], ids=lambda a: a["name"])
def test_every_deployment_is_named_and_scales_for_itself(application, monkeypatch):
    """Built as Serve builds it: an unknown argument, or a deployment that there is not, would be an error."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app

    monkeypatch.chdir(ROOT)  # the recipe's path is relative
    module, _, name = application["import_path"].partition(":")
    builder = getattr(importlib.import_module(module), name)
    app = call_user_app_builder_with_args_if_necessary(builder, application["args"])
    built = {d.name: d for d in build_app(app, name=application["name"]).deployments}
    assert built.keys() == {d["name"] for d in application["deployments"]}
    for override in application["deployments"]:
        scaling = override["autoscaling_config"]
        assert 1 <= scaling["min_replicas"] < scaling["max_replicas"]
        deployment = built[override["name"]]
        # Scaled up well before requests are refused: at no more than half of what a replica takes at once.
        assert scaling["target_ongoing_requests"] <= deployment.max_ongoing_requests / 2
        deployment.options(**{k: v for k, v in override.items() if k != "name"})


def filled_in(workspace, artifact, keys_file):
    """The configuration for one small machine: one replica each, no LLM."""
    config = copy.deepcopy(CONFIG)
    for application in config["applications"]:
        application["args"] |= {"workspace": workspace.path(), "keys_file": str(keys_file), "num_cpus": 0.1}
        for deployment in application["deployments"]:
            deployment["autoscaling_config"]["min_replicas"] = 1
    rank = next(a for a in config["applications"] if a["name"] == "rank")
    del rank["args"]["recipe"]
    rank["args"]["artifact"] = artifact
    rank["deployments"] = [d for d in rank["deployments"] if d["name"] != "LlmScorer"]
    by_name = {d["name"]: d for d in rank["deployments"]}
    by_name["Rank"]["user_config"] = {"artifact": artifact}
    return config


@pytest.mark.ray
def test_it_deploys_and_a_changed_user_config_restarts_nothing(ray_local, tmp_path):
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    workspace = Workspace(tmp_path / "ws")
    folders, release = write_artifacts(workspace), publish_world(workspace, "first")  # which is current then
    (tmp_path / "keys.txt").write_text(LINE)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    config = filled_in(workspace, folders[0], tmp_path / "keys.txt")

    def deploy():
        # What `serve deploy` has the dashboard call; the tests' cluster has none.
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)

    try:
        deploy()
        address = f"http://127.0.0.1:{port}"
        with Client(address, rank_url=f"{address}/rank", api_key=KEY) as owl:
            assert owl.get("user", 1).text == "first likes films"
            assert order(owl) == expected(workspace, folders[0])
            pages = httpx.Client(base_url=f"{address}/explorer", auth=("anybody", KEY), timeout=20)
            assert release in pages.get("/user/1").text
            ranking = pages.get(f"/rank?user=55&candidates={','.join(map(str, range(ITEMS)))}").text
            assert "The LLM did not rank: no LLM is deployed." in ranking
            assert httpx.get(f"{address}/rank/v1/rank").status_code == 401
            before = replicas()
            next(a for a in config["applications"] if a["name"] == "rank")["deployments"][0]["user_config"] = {
                "artifact": folders[1]
            }
            deploy()
            end = time.monotonic() + 30
            while order(owl) != expected(workspace, folders[1]):
                assert time.monotonic() < end
                time.sleep(0.1)
            assert replicas() == before
            del config["applications"][1]
            deploy()
            end = time.monotonic() + 30
            while "no ranking application is deployed" not in pages.get("/rank?user=55&candidates=1,2").text:
                assert time.monotonic() < end
                time.sleep(0.2)
    finally:
        serve.shutdown()


def order(owl):
    return [r.id for r in owl.rank(range(ITEMS), user_id=55, top_k=ITEMS, deadline_ms=5000).results]


def expected(workspace, artifact):
    return np.argsort(-own_scores(workspace, artifact), kind="stable").tolist()


def replicas():
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return {a["name"] for a in actors if a["name"].startswith("SERVE_REPLICA::")}
