"""The deployments that a Serve configuration's application comes to, built as Serve builds them but on no cluster."""

import importlib
from typing import Any

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.deployment import Deployment


def built(application: dict[str, Any]) -> list[Deployment]:
    """The deployments, with the configuration's own options over those of the code."""
    module, _, name = application["import_path"].partition(":")
    builder = getattr(importlib.import_module(module), name)
    app = call_user_app_builder_with_args_if_necessary(builder, application.get("args", {}))
    deployments = {d.name: d for d in build_app(app, name=application["name"]).deployments}
    for override in application.get("deployments", []):
        options = {k: v for k, v in override.items() if k != "name"}
        deployments[override["name"]] = deployments[override["name"]].options(**options)
    return list(deployments.values())


def replicas(deployment: Deployment) -> tuple[int, int]:
    """How many run at least and at most."""
    scaling = deployment._deployment_config.autoscaling_config
    if scaling is None:
        return deployment.num_replicas, deployment.num_replicas
    return scaling.min_replicas, scaling.max_replicas
