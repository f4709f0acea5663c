"""Manifests of every overlay: fields, references, security, and KubeRay's own rules."""

import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from manifests import (
    CLUSTER,
    OVERLAYS,
    ROOT,
    by_kind,
    containers,
    documented_inputs,
    overlay,
    pods,
    quantity,
    ray_clusters,
)

import owlrec
from owlrec.cli import SUBMITTED

KUBERNETES = CLUSTER / "kubernetes"
# Ray's and Prometheus' operators; RayCronJob is younger than the catalog, so -ignore-missing-schemas.
OPERATORS_SCHEMAS = "https://raw.githubusercontent.com/datreeio/CRDs-catalog/main/{{.Group}}/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json"
THIRD_PARTY = {"fluent/fluent-bit:4.2.2", "valkey/valkey:8.1.3-alpine"}
overlays = pytest.mark.parametrize("name", OVERLAYS)


def test_kustomizations_name_files_that_are_there() -> None:
    """Holds without kustomize as well; the other tests here skip themselves there."""
    for path in KUBERNETES.rglob("kustomization.yaml"):
        spec = yaml.safe_load(path.read_text())
        named = [*spec.get("resources", []), *(patch["path"] for patch in spec.get("patches", []))]
        named += [file for config in spec.get("configMapGenerator", []) for file in config["files"]]
        assert [name for name in named if not (path.parent / name).exists()] == []
    for path in KUBERNETES.rglob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text())), path


@overlays
def test_kubeconform_finds_no_wrong_field(name: str) -> None:
    """Against the schemas of Kubernetes and of the operators' resources, which kubeconform downloads."""
    if (kubeconform := shutil.which("kubeconform")) is None:
        pytest.skip("kubeconform is not installed")
    ran = subprocess.run(
        [kubeconform, "-strict", "-ignore-missing-schemas", "-kubernetes-version", "1.34.0",
         "-schema-location", "default", "-schema-location", OPERATORS_SCHEMAS],
        input=yaml.safe_dump_all(overlay(name)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    complaints = (ran.stdout + ran.stderr).splitlines()
    assert [line for line in complaints if " is invalid: " in line] == []
    if ran.returncode:
        pytest.skip(f"kubeconform could not read its schemas: {complaints[:1]}")


@overlays
def test_images_are_ours_of_this_version_or_pinned(name: str) -> None:
    ours = {f"YOUR_REGISTRY/owlrec-{kind}:{owlrec.__version__}" for kind in ("cpu", "gpu")}
    images = {c["image"] for _, c, _ in containers(overlay(name))}
    assert images <= ours | THIRD_PARTY
    assert all((CLUSTER / f"Dockerfile.{i.partition('owlrec-')[2].partition(':')[0]}").exists() for i in images & ours)
    for _, container, _ in containers(overlay(name)):
        wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert ("owlrec-gpu" in container["image"]) == wants_gpu


@overlays
def test_what_pods_refer_to_is_there_or_a_documented_input(name: str) -> None:
    objects, inputs = overlay(name), documented_inputs()
    for where, template in pods(objects):
        spec = template["spec"]
        if account := spec.get("serviceAccountName"):
            assert account in by_kind(objects, "ServiceAccount"), where
        volumes = {v["name"]: v for v in spec.get("volumes", [])}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in by_kind(objects, "PersistentVolumeClaim")
            elif "configMap" in volume:
                assert volume["configMap"]["name"] in by_kind(objects, "ConfigMap")
            elif "secret" in volume:
                assert volume["secret"]["secretName"] in inputs
        (state,) = [o for o in by_kind(objects, "StatefulSet").values()]
        claimed = {c["metadata"]["name"] for c in state["spec"]["volumeClaimTemplates"]}
        for container in spec["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} <= volumes.keys() | claimed, where
            secrets = [e["valueFrom"]["secretKeyRef"] for e in container.get("env", []) if "valueFrom" in e]
            secrets += [e["secretRef"] for e in container.get("envFrom", [])]
            assert {s["name"] for s in secrets} <= inputs, where
        for key, value in spec.get("nodeSelector", {}).items():
            assert f"{key}={value}" in inputs, where
    for claim in by_kind(objects, "PersistentVolumeClaim").values():
        assert claim["spec"].get("storageClassName", "owlrec-shared") in inputs
    for spec in ray_clusters(objects).values():
        host, _, port = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
        service = by_kind(objects, "Service")[host]["spec"]
        assert int(port) in {p["port"] for p in service["ports"]}
        assert service["selector"].items() <= state["spec"]["template"]["metadata"]["labels"].items()
        assert {spec["authOptions"]["secretName"], host} <= inputs


@overlays
def test_no_secret_stands_in_plain(name: str) -> None:
    assert "Secret" not in {o["kind"] for o in overlay(name)}
    for where, container, _ in containers(overlay(name)):
        for entry in container.get("env", []):
            if re.search("PASSWORD|SECRET|TOKEN|KEY|CREDENTIAL", entry["name"]):
                assert "valueFrom" in entry, where


@overlays
def test_pods_satisfy_the_restricted_standard(name: str) -> None:
    """Pod Security Standards' profile `restricted`, which the namespace enforces on these pods."""
    (namespace,) = by_kind(overlay(name), "Namespace").values()
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    contexts = [c["securityContext"] for _, c, _ in containers(overlay(name))]
    contexts += [spec["autoscalerOptions"]["securityContext"] for spec in ray_clusters(overlay(name)).values()]
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
    for where, template in pods(overlay(name)):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, where
        assert min(security["runAsUser"], security["runAsGroup"]) > 0, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        # Only the head may ask Kubernetes for anything: its autoscaler does.
        assert template["spec"].get("automountServiceAccountToken") is (None if where.endswith("/head") else False)


@overlays
def test_every_container_says_what_it_needs(name: str) -> None:
    for where, container, _ in containers(overlay(name)):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= requests.keys(), where
        assert requests["memory"] == limits["memory"], where  # the kernel must not end Ray's workers for a neighbor
        assert all(quantity(requests[k]) <= quantity(limits[k]) for k in limits), where
        if container["name"] == "ray-worker":
            assert requests == limits, where
            assert quantity(limits["cpu"]).is_integer(), where  # KubeRay would round up, and tasks share what is not


@overlays
def test_ray_clusters_keep_kuberays_rules_and_ours(name: str) -> None:
    """KubeRay 1.7.0's validation of RayCluster, as far as it reaches these fields."""
    pinned = next(d for d in _project()["optional-dependencies"]["ray"] if d.startswith("ray[")).partition("==")[2]
    for spec in ray_clusters(overlay(name)).values():
        assert spec["rayVersion"] == pinned
        head = spec["headGroupSpec"]
        assert head["rayStartParams"] == {"num-cpus": "0"}
        assert head["template"]["spec"].get("nodeSelector", {}).get("owlrec.dev/market", "on-demand") == "on-demand"
        assert head["template"]["spec"]["containers"][0]["name"] == "ray-head"
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert group["template"]["spec"]["containers"][0]["name"] == "ray-worker"
            market = group["template"]["spec"].get("nodeSelector", {}).get("owlrec.dev/market", "on-demand")
            assert group["labels"]["ray.io/market-type"] == market


def test_gpus_are_spot_machines_that_start_from_none() -> None:
    groups = {g["groupName"]: g for g in ray_clusters(overlay("spot"))["owlrec"]["workerGroupSpecs"]}
    gpus = {n: g for n, g in groups.items() if n.startswith("gpu-")}
    assert {g["labels"]["ray.io/accelerator-type"] for g in gpus.values()} == {"L4", "A100", "H100"}
    for group in gpus.values():
        pod = group["template"]["spec"]
        assert group["minReplicas"] == group["replicas"] == 0
        assert group["maxReplicas"] > 0
        assert group["idleTimeoutSeconds"] <= 600
        accelerator = group["labels"]["ray.io/accelerator-type"].lower()
        assert pod["nodeSelector"] == {"owlrec.dev/market": "spot", "owlrec.dev/accelerator": accelerator}
        assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu", "owlrec.dev/market"}


@overlays
def test_jobs_run_a_stages_command_on_the_cluster_with_the_mounted_recipe(name: str) -> None:
    objects = overlay(name)
    jobs = {n: o["spec"] for n, o in by_kind(objects, "RayJob").items()}
    jobs |= {n: o["spec"]["jobTemplate"] for n, o in by_kind(objects, "RayCronJob").items()}
    assert {"generate-", "refresh-"} <= jobs.keys()
    for job in jobs.values():
        cluster = ray_clusters(objects)[job["clusterSelector"]["ray.io/cluster"]]
        head = cluster["headGroupSpec"]["template"]["spec"]
        command, *words, recipe = job["entrypoint"].split()
        assert command == "owlrec"
        assert tuple(words) in SUBMITTED.values()
        (mount,) = [m for m in head["containers"][0]["volumeMounts"] if recipe.startswith(m["mountPath"] + "/")]
        (volume,) = [v for v in head["volumes"] if v["name"] == mount["name"]]
        assert (
            recipe.removeprefix(mount["mountPath"] + "/")
            in by_kind(objects, "ConfigMap")[volume["configMap"]["name"]]["data"]
        )
        assert {r["condition"]["jobStatus"] for r in job["deletionStrategy"]["deletionRules"]} == {
            "SUCCEEDED",
            "FAILED",
        }


def test_the_nightly_refresh_is_the_refresh() -> None:
    objects = overlay("prod")
    assert (
        by_kind(objects, "RayCronJob")["nightly-refresh"]["spec"]["jobTemplate"]
        == (by_kind(objects, "RayJob")["refresh-"]["spec"])
    )


@overlays
def test_network_policies_open_ports_that_pods_have_and_nothing_else(name: str) -> None:
    objects = overlay(name)
    policies = {n: o["spec"] for n, o in by_kind(objects, "NetworkPolicy").items()}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {p["containerPort"] for _, c, _ in containers(objects) for p in c.get("ports", [])}
    for policy, spec in policies.items():
        for rule in spec.get("ingress", []):
            within = all("podSelector" in peer for peer in rule["from"])
            assert within or "ports" in rule, policy  # any port only among Ray's own nodes
            assert {p["port"] for p in rule.get("ports", [])} <= ports, policy
            for peer in rule["from"]:
                if "namespaceSelector" in peer:
                    ((key, value),) = peer["namespaceSelector"]["matchLabels"].items()
                    assert f"{key}={value}" in documented_inputs(), policy


def test_budgets_and_monitors_select_pods_and_ports_that_exist() -> None:
    objects = overlay("prod")
    labels = [
        {"ray.io/cluster": "owlrec", "ray.io/node-type": "head"},  # which KubeRay adds
        *(t.get("metadata", {}).get("labels", {}) for _, t in pods(objects)),
    ]
    for budget in by_kind(objects, "PodDisruptionBudget").values():
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod_labels.items() for pod_labels in labels)
    (heads,) = by_kind(objects, "ServiceMonitor").values()
    (workers,) = by_kind(objects, "PodMonitor").values()
    for where, template in pods(objects):
        named = {p["name"] for c in template["spec"]["containers"] for p in c.get("ports", [])}
        if where.endswith("/head"):
            assert {e["port"] for e in heads["spec"]["endpoints"]} <= named
        elif "/" in where:
            assert {e["port"] for e in workers["spec"]["podMetricsEndpoints"]} <= named


def test_every_placeholder_is_documented_and_every_documented_one_is_used() -> None:
    files = [p for p in CLUSTER.rglob("*.yaml") if "dashboards" not in p.parts]
    used = {name for path in files for name in re.findall(r"YOUR_[A-Z_]+", path.read_text())}
    assert used == {name for name in documented_inputs() if name.startswith("YOUR_")}


def test_the_readmes_commands_name_files_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"cluster/[A-Za-z][A-Za-z./-]*[A-Za-z]", text)) | set(
        re.findall(r"kubernetes/[a-z./-]+yaml", text)
    )
    missing = [n for n in named if not (ROOT / n).exists() and not (CLUSTER / n).exists()]
    assert not missing


def test_the_operators_values_name_the_features_that_are_used() -> None:
    values = yaml.safe_load((CLUSTER / "kubernetes" / "kuberay-values.yaml").read_text())
    on = {f["name"] for f in values["featureGates"] if f["enabled"]}
    assert {"RayCronJob", "RayJobDeletionPolicy"} <= on


def _project() -> dict:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
