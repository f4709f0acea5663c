"""Examines a cluster from the inside: a short job that `owlrec submit` runs before the real one, without a GPU.

On the head it checks the nodes and the autoscaler's limits, and writes a file in the workspace. On every node a
task without CPU or GPU reads that file and writes its own, which the head must see. The last line of
output is the report, JSON after MARK. It reads no recipe and imports only the standard library until Python's
version is known, so an old Python can still report itself.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

MARK = "OWLREC-PROBE "
NODE_TIMEOUT_S = 90


def main(workspace: str | None = None) -> None:
    """Prints the report. workspace: a path or URI to test from every node."""
    report: dict[str, Any] = {"python": _python(), "nodes": [], "groups": None, "problem": ""}
    if sys.version_info >= (3, 11):  # noqa: UP036
        try:
            report.update(_look(workspace))
        except Exception as error:  # the caller prints any error
            report["problem"] = f"{type(error).__name__}: {error}"
    print(MARK + json.dumps(report))


def _look(workspace: str | None) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    mark = ".probe-" + uuid.uuid4().hex
    problem = _try(lambda store: store.write_bytes(mark, mark.encode()), workspace)
    nodes = [n for n in ray.nodes() if n["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(_visit)
    visits = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(
            None if problem else workspace, mark, mark + "-" + n["NodeID"]
        )
        for n in nodes
    ]
    ray.wait(visits, num_returns=len(visits), timeout=NODE_TIMEOUT_S)
    reports = []
    for node, visit in zip(nodes, visits, strict=True):
        try:
            seen = ray.get(visit, timeout=0.1)
        except Exception as error:
            seen = {"python": "", "problem": "a task failed there: " + (str(error).strip() or "no answer")[-500:]}
        if not problem and not seen["problem"]:
            seen["problem"] = _try(partial(_take, own=mark + "-" + node["NodeID"]), workspace)
        resources = {k: node["Resources"].get(k, 0) for k in ("CPU", "GPU")}
        reports.append({"address": node["NodeManagerAddress"], "resources": resources, **seen})
    if not problem:
        _try(lambda store: store.delete_file(mark), workspace)
    return {"nodes": reports, "groups": _groups(), "problem": problem}


def _visit(workspace: str | None, theirs: str, own: str) -> dict[str, str]:
    def exchange(store: Any) -> None:
        if store.read_bytes(theirs) != theirs.encode():
            raise OSError(f"the head's file {theirs} has different contents here")
        store.write_bytes(own, own.encode())

    return {"python": _python(), "problem": _try(exchange, workspace)}


def _take(store: Any, own: str) -> None:
    if store.read_bytes(own) != own.encode():
        raise OSError("this node's file has different contents on the head")
    store.delete_file(own)


def _try(action: Callable[[Any], None], workspace: str | None) -> str:
    """The failure of `action` on the workspace; "" for success or without a workspace."""
    if workspace is None:
        return ""
    try:
        from owlrec.workspace import Workspace

        action(Workspace(workspace))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _groups() -> list[dict[str, Any]] | None:
    """Node groups that the head's autoscaler may start, [] without one, None if they are not visible."""
    import psutil
    import yaml

    if "KUBERAY_GEN_RAY_START_CMD" in os.environ:
        return None  # the operator's autoscaler has its own container
    option = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        for word in process.info["cmdline"] or ():
            if word.startswith(option) and os.path.exists(word[len(option) :]):
                with open(word[len(option) :], encoding="utf-8") as file:
                    types = yaml.safe_load(file).get("available_node_types", {})
                return [
                    {"name": n, "resources": t.get("resources") or {}, "most": t.get("max_workers")}
                    for n, t in types.items()
                ]
    return []


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
