"""The fields of Kubernetes and KubeRay 1.7.0 resources that cluster/kubernetes uses, and their types.

Written by hand after the custom resource definitions of KubeRay's tag v1.7.0, Kubernetes 1.34's API and Prometheus'
operator: a field that is mistyped, misplaced or of a wrong type is found without a cluster. A field that is right but
new here must be added, which is the moment to read what it does.
"""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Map:
    """A mapping with free keys."""

    of: Any


@dataclass(frozen=True)
class Either:
    """Any of several shapes."""

    shapes: tuple[Any, ...]


def problems(value: Any, shape: Any, where: str = "") -> list[str]:
    """What keeps `value` from having a shape; empty where nothing does.

    A shape is a type, a pattern that a string matches, a set of strings, a list of one shape, a mapping of fields
    (`name?` may be absent, all others must be there), Map or Either.
    """
    if isinstance(shape, type):
        right = isinstance(value, shape) and not (shape is not bool and isinstance(value, bool))
        return [] if right else [f"{where}: {value!r} is no {shape.__name__}"]
    if isinstance(shape, re.Pattern):
        right = isinstance(value, str) and shape.fullmatch(value) is not None
        return [] if right else [f"{where}: {value!r} does not match {shape.pattern}"]
    if isinstance(shape, frozenset):
        return [] if isinstance(value, str) and value in shape else [f"{where}: {value!r} is none of {sorted(shape)}"]
    if isinstance(shape, Either):
        tried = [problems(value, s, where) for s in shape.shapes]
        return [] if [] in tried else min(tried, key=len)
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: {value!r} is no list with something in it"]
        return [p for i, v in enumerate(value) for p in problems(v, shape[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no mapping"]
    if isinstance(shape, Map):
        return [p for k, v in value.items() for p in problems(k, str, where) + problems(v, shape.of, f"{where}.{k}")]
    fields = {name.removesuffix("?"): s for name, s in shape.items()}
    mistakes = [f"{where}.{k}: is no field here" for k in value.keys() - fields.keys()]
    mistakes += [f"{where}.{k}: is missing" for k in shape if not k.endswith("?") and k not in value]
    return mistakes + [p for k, v in value.items() if k in fields for p in problems(v, fields[k], f"{where}.{k}")]


NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = Either((int, re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?")))
VERSION = re.compile(r"\d+\.\d+\.\d+")
PORT_OR_NAME = Either((int, NAME))

_LABELS = Map(str)
_SELECTOR = {"matchLabels": _LABELS}
_META = {"name": NAME, "namespace": NAME, "labels?": _LABELS}
_CREATED = {"generateName": re.compile(r"[a-z0-9][-a-z0-9]{0,40}-"), "namespace": NAME}
_RESOURCES = {"requests": Map(QUANTITY), "limits": Map(QUANTITY)}
_SECRET_KEY = {"secretKeyRef": {"name": NAME, "key": str}}

_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": bool,
    "readOnlyRootFilesystem?": bool,
    "capabilities": {"drop": [frozenset({"ALL"})]},
}
_CONTAINER = {
    "name": NAME,
    "image": str,
    "command?": [str],
    "args?": [str],
    "ports?": [{"name": NAME, "containerPort": int}],
    "env?": [Either(({"name": str, "value": str}, {"name": str, "valueFrom": _SECRET_KEY}))],
    "envFrom?": [{"secretRef": {"name": NAME, "optional": bool}}],
    "readinessProbe?": {"tcpSocket": {"port": PORT_OR_NAME}},
    "resources": _RESOURCES,
    "securityContext": _CONTAINER_SECURITY,
    "volumeMounts": [{"name": NAME, "mountPath": re.compile("/.+"), "readOnly?": bool}],
}
_VOLUME = Either(
    (
        {"name": NAME, "persistentVolumeClaim": {"claimName": NAME}},
        {"name": NAME, "configMap": {"name": NAME}},
        {"name": NAME, "secret": {"secretName": NAME}},
        {"name": NAME, "emptyDir": Map(str)},
    )
)
_POD = {
    "serviceAccountName?": NAME,
    "automountServiceAccountToken?": bool,
    "terminationGracePeriodSeconds?": int,
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "fsGroupChangePolicy?": frozenset({"OnRootMismatch"}),
        "seccompProfile": {"type": frozenset({"RuntimeDefault"})},
    },
    "nodeSelector?": _LABELS,
    "tolerations?": [
        {"key": str, "operator?": frozenset({"Exists", "Equal"}), "value?": str, "effect": frozenset({"NoSchedule"})}
    ],
    "topologySpreadConstraints?": [
        {
            "maxSkew": int,
            "topologyKey": str,
            "whenUnsatisfiable": frozenset({"ScheduleAnyway", "DoNotSchedule"}),
            "labelSelector": _SELECTOR,
        }
    ],
    "containers": [_CONTAINER],
    "volumes?": [_VOLUME],
}
_POD_TEMPLATE = {"metadata?": {"labels": _LABELS}, "spec": _POD}

_RAY_CLUSTER = {
    "rayVersion": VERSION,
    "authOptions": {"mode": frozenset({"token"}), "secretName": NAME},
    "gcsFaultToleranceOptions": {"redisAddress": str, "redisPassword": {"valueFrom": _SECRET_KEY}},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": frozenset({"v2"}),
        "upscalingMode": frozenset({"Default", "Aggressive", "Conservative"}),
        "idleTimeoutSeconds": int,
        "resources": _RESOURCES,
        "securityContext": _CONTAINER_SECURITY,
    },
    "headGroupSpec": {"rayStartParams": Map(str), "template": _POD_TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": NAME,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "idleTimeoutSeconds?": int,
            "priority?": int,
            "labels": _LABELS,
            "rayStartParams": Map(str),
            "template": _POD_TEMPLATE,
        }
    ],
}
_RAY_JOB = {
    "submissionMode": frozenset({"HTTPMode"}),
    "clusterSelector": {"ray.io/cluster": NAME},
    "entrypoint": str,
    "entrypointNumCpus?": Either((int, float)),
    "deletionStrategy": {
        "deletionRules": [
            {
                "policy": frozenset({"DeleteSelf"}),  # with a clusterSelector the cluster is not the job's to delete
                "condition": {"jobStatus": frozenset({"SUCCEEDED", "FAILED"}), "ttlSeconds": int},
            }
        ]
    },
}

_NETWORK_PEER = Either(
    (
        {"podSelector": _SELECTOR},
        {"namespaceSelector": _SELECTOR},
        {"ipBlock": {"cidr": re.compile(r"[0-9.]+/\d+"), "except?": [re.compile(r"[0-9.]+/\d+")]}},
    )
)
_NETWORK_PORTS = [{"port": int, "protocol?": frozenset({"TCP", "UDP"})}]
_RELABELLED = [{"port": NAME, "relabelings": [{"sourceLabels": [str], "targetLabel": str}]}]

SHAPES: dict[tuple[str, str], Any] = {
    ("v1", "Namespace"): {"metadata": {"name": NAME, "labels": _LABELS}},
    ("v1", "ServiceAccount"): {"metadata": _META, "automountServiceAccountToken?": bool},
    ("v1", "ConfigMap"): {"metadata": _META, "data": Map(str)},
    ("v1", "PersistentVolumeClaim"): {
        "metadata": _META,
        "spec": {
            "accessModes": [frozenset({"ReadWriteMany", "ReadWriteOnce"})],
            "storageClassName?": NAME,
            "resources": {"requests": {"storage": QUANTITY}},
        },
    },
    ("v1", "Service"): {
        "metadata": _META,
        "spec": {"clusterIP": frozenset({"None"}), "selector": _LABELS, "ports": [{"name": NAME, "port": int}]},
    },
    ("apps/v1", "StatefulSet"): {
        "metadata": _META,
        "spec": {
            "serviceName": NAME,
            "replicas": int,
            "selector": _SELECTOR,
            "template": {"metadata": {"labels": _LABELS}, "spec": _POD},
            "volumeClaimTemplates": [
                {
                    "metadata": {"name": NAME},
                    "spec": {
                        "accessModes": [frozenset({"ReadWriteOnce"})],
                        "resources": {"requests": {"storage": QUANTITY}},
                    },
                }
            ],
        },
    },
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "metadata": _META,
        "spec": {
            "podSelector": Either(({}, _SELECTOR)),
            "policyTypes": [frozenset({"Ingress", "Egress"})],
            "ingress?": [{"from": [_NETWORK_PEER], "ports?": _NETWORK_PORTS}],
            "egress?": [{"to": [_NETWORK_PEER], "ports?": _NETWORK_PORTS}],
        },
    },
    ("policy/v1", "PodDisruptionBudget"): {"metadata": _META, "spec": {"minAvailable": int, "selector": _SELECTOR}},
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {
        "metadata": _META,
        "spec": {"selector": _SELECTOR, "endpoints": _RELABELLED},
    },
    ("monitoring.coreos.com/v1", "PodMonitor"): {
        "metadata": _META,
        "spec": {"selector": _SELECTOR, "podMetricsEndpoints": _RELABELLED},
    },
    ("ray.io/v1", "RayCluster"): {"metadata": _META, "spec": _RAY_CLUSTER},
    ("ray.io/v1", "RayJob"): {"metadata": _CREATED, "spec": _RAY_JOB},
    ("ray.io/v1", "RayCronJob"): {
        "metadata": _META,
        "spec": {"schedule": re.compile(r"(\S+ ){4}\S+"), "timeZone": str, "jobTemplate": _RAY_JOB},
    },
    ("ray.io/v1", "RayService"): {
        "metadata": _META,
        "spec": {
            "upgradeStrategy": {"type": frozenset({"NewCluster"})},
            "rayClusterDeletionDelaySeconds": int,
            "excludeHeadPodFromServeSvc": bool,
            "serveConfigV2": str,
            "rayClusterConfig": _RAY_CLUSTER,
        },
    },
}
