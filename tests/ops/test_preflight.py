"""What a cluster must be refused for, before any GPU is held: each found out, and said with what mends it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from owlrec.errors import ClusterError
from owlrec.ops import submission as preflight
from owlrec.ops.preflight_probe import MARK
from owlrec.ops.submission import GpuDemand, check_gpus, check_head, check_report, gpu_demand, http_address, refuse
from owlrec.recipe import load_recipe

NODE = {"address": "10.0.0.1", "resources": {"CPU": 4, "GPU": 0}, "python": "3.11.7", "problem": ""}
REPORT = {"python": "3.11.7", "nodes": [NODE], "groups": [], "problem": ""}


@contextmanager
def server(status: int, body: str) -> Iterator[str]:
    """Answers everything so; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "name", "problem"),
    [
        (200, '{"ray_version": "2.59.1"}', "Ray", "runs Ray 2.59.1"),
        (200, '{"ray_version": "2.60.1"}', "Ray", "runs Ray 2.60.1"),
        (200, "<html>", "head", "not a Ray head"),
        (200, "[]", "head", "not a Ray head"),
        (404, "{}", "head", "not a Ray head"),
        (401, "Unauthorized", "token", "requires a token"),
        (403, "Forbidden", "token", "rejects this token"),
    ],
)
def test_a_head_that_will_not_do_is_named(status, body, name, problem):
    with server(status, body) as url:
        last = check_head(url, {})[-1]
    assert (last.name, last.ok) == (name, "fail")
    assert problem in last.found
    with pytest.raises(ClusterError, match="To fix it, "):
        refuse([last])


def test_the_right_head_passes():
    with server(200, '{"ray_version": "2.60.0", "ray_commit": "x"}') as url:
        assert [(c.name, c.ok) for c in check_head(url, {})] == [("head", "ok"), ("Ray", "ok")]


def test_an_address_that_nothing_answers_at_is_no_head():
    with server(200, "") as url:
        pass
    [check] = check_head(url, {})
    assert "no Ray head answers" in check.found
    assert "8265" in check.fix
    assert check_head("http://no such host", {})[0].ok == "fail"


def test_addresses():
    assert http_address("head:8265") == "http://head:8265"
    assert http_address("https://head/ray/") == "https://head/ray"
    for wrong in ("ray://head:10001", "auto://", ""):
        with pytest.raises(ClusterError, match="over HTTP"):
            http_address(wrong)


@pytest.mark.parametrize(
    ("pipeline", "changes", "expected"),
    [
        ("generate", {"generate": {"engine_gpus": 0.5, "replicas": [3, 9]}}, GpuDemand(0.5, 3, "generate.engine_gpus")),
        ("refresh", {"generate": {"engine_gpus": 2}}, GpuDemand(2, 1, "generate.engine_gpus")),
        ("prepare", {"generate": {"engine_gpus": 2}}, None),
        ("generate", {}, None),
        ("train_ctr", {"training": {"use_gpu": True, "num_workers": 4}}, GpuDemand(1, 4, "training.use_gpu")),
        ("tune_ranker", {"training": {"use_gpu": True, "num_workers": 2}}, GpuDemand(1, 2, "training.use_gpu")),
        ("train_ctr", {"training": {"num_workers": 2}}, None),
        ("tune_ranker", {}, None),
    ],
)
def test_what_a_recipe_asks_for(tmp_path: Path, pipeline, changes, expected):
    values = {"name": "shop", "scenario": "books", "workspace": "/w", "source": {"type": "movielens-100k"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**values, "engine": {"type": "echo"}, **changes}))
    assert gpu_demand(load_recipe(tmp_path / "r.yaml"), pipeline) == expected


def gpu_nodes(*counts: float) -> list[dict[str, Any]]:
    return [{**NODE, "resources": {"CPU": 4, "GPU": n}} for n in counts]


@pytest.mark.parametrize(
    ("each", "workers", "nodes", "groups", "expected"),
    [
        (1, 1, [0], [], "fail"),
        (1, 1, [1], [], "ok"),
        (2, 1, [1, 1], [], "fail"),  # an engine stands on one machine
        (2, 2, [4], [], "ok"),
        (0.5, 4, [1, 1], [], "ok"),
        (1, 1, [0], [{"name": "gpu", "resources": {"GPU": 1}, "most": 2}], "ok"),
        (1, 3, [0], [{"name": "gpu", "resources": {"GPU": 1}, "most": 2}], "fail"),
        (1, 3, [0], [{"name": "gpu", "resources": {"GPU": 1}, "most": None}], "ok"),
        (1, 1, [0], [{"name": "cpu", "resources": {"CPU": 8}, "most": 99}], "fail"),
        (1, 1, [0], None, "warn"),
    ],
)
def test_gpus_there_are_or_can_come(each, workers, nodes, groups, expected):
    check = check_gpus(GpuDemand(each, workers, "generate.engine_gpus"), {"nodes": gpu_nodes(*nodes), "groups": groups})
    assert check.ok == expected
    if expected == "fail":
        assert f"generate.engine_gpus asks for {workers} x {each:g} GPU" in check.found


def test_a_good_report_passes():
    checks = check_report(REPORT, "s3://b/w", None)
    assert [(c.name, c.ok) for c in checks] == [("Python", "ok"), ("nodes", "ok"), ("workspace", "ok")]


def test_another_python_is_refused():
    [check] = check_report({**REPORT, "python": "3.10.4", "nodes": []}, None, None)
    assert "runs Python 3.10.4" in check.found
    mixed = check_report({**REPORT, "nodes": [NODE, {**NODE, "python": "3.12.1"}]}, None, None)
    assert "3.11.7 and 3.12.1" in mixed[0].found
    assert mixed[0].ok == "fail"


def test_a_workspace_that_one_node_cannot_reach_is_refused_with_the_node():
    lonely = {**NODE, "address": "10.0.0.2", "problem": "WorkspaceError: /w/.probe-1 does not exist."}
    with pytest.raises(ClusterError, match=r"/w cannot be used from 1 of its machines; on 10\.0\.0\.2: WorkspaceError"):
        refuse(check_report({**REPORT, "nodes": [NODE, lonely]}, "/w", None))
    with pytest.raises(ClusterError, match="on the head: WorkspaceError: no bucket"):
        refuse(check_report({**REPORT, "problem": "WorkspaceError: no bucket"}, "s3://b", None))


class Jobs:
    """One probe's job, which ends at once."""

    def __init__(self, log: str, status: str = "SUCCEEDED") -> None:
        self.log, self.status, self.message, self.stopped = log, status, "", False

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, **options: Any) -> str:
        self.options = options
        return str(options["submission_id"])

    def get_job_info(self, job_id: str) -> "Jobs":
        return self

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def stop_job(self, job_id: str) -> bool:
        self.stopped = True
        return True


def test_the_probe_asks_for_no_gpu_and_its_report_is_read():
    jobs: Any = Jobs(f"chatter\n{MARK}{json.dumps(REPORT)}\n")
    assert preflight.probe(jobs, {"working_dir": "/x"}, "/w w", timeout_s=1) == REPORT
    assert jobs.options["entrypoint"] == "python -m owlrec.ops.preflight_probe '/w w'"
    assert not jobs.options["entrypoint_num_gpus"]


def test_a_cluster_without_our_dependencies_is_told_by_the_end_of_its_log():
    jobs: Any = Jobs("Traceback\nModuleNotFoundError: No module named 'pyarrow'\n", "FAILED")
    with pytest.raises(ClusterError, match=r"(?s)cannot run OwlRec.*No module named 'pyarrow'.*--runtime-env"):
        preflight.probe(jobs, {}, None, timeout_s=1)


def test_a_probe_that_never_runs_is_stopped():
    jobs: Any = Jobs("", "PENDING")
    with pytest.raises(ClusterError, match="within 0 s"):
        preflight.probe(jobs, {}, None, timeout_s=0)
    assert jobs.stopped
