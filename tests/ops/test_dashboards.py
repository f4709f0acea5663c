"""Dashboards and alerts read metrics and labels that exist; panels fit the grid; every alert leads to a runbook.

tests/serving/test_dashboard_queries.py looks for the same metrics on the page of a running cluster.
"""

import re
import subprocess
from pathlib import Path

import pytest
import ray.util.metrics
import yaml
from dashboards import ALERTS, BOARDS, FOLDER, expressions, parse

from owlrec.generation.job import DecoderMetrics
from owlrec.runner import StageMetrics

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = "docs/operations.md"
UNITS = {"short", "s", "ms", "bytes", "percent", "percentunit", "reqps"}  # as Grafana names them
_NODE, _SERVE = {"ip", "SessionName"}, {"application", "deployment"}
# Ray's own. https://docs.ray.io/en/latest/ray-observability/reference/system-metrics.html and, for the labels,
# ray/dashboard/modules/reporter/reporter_agent.py; https://docs.ray.io/en/latest/serve/monitoring.html
RAYS_OWN = {
    "ray_node_mem_total": _NODE,
    "ray_node_mem_used": _NODE,
    "ray_node_disk_free": _NODE,
    "ray_node_disk_usage": _NODE,
    "ray_node_cpu_utilization": _NODE,
    "ray_gcs_actors_count": {"State"},
    "ray_object_store_used_memory": {"NodeAddress"},
    "ray_serve_replica_processing_queries": _SERVE,
    "ray_serve_deployment_queued_queries": _SERVE,
    "ray_serve_deployment_replica_healthy": _SERVE,
}


@pytest.fixture
def exported(monkeypatch):
    """Every metric that the code makes, with its labels, under the name that Ray exports it as."""
    metrics = {name: set(labels) for name, labels in RAYS_OWN.items()}

    def recording(suffix, *more_labels):
        def record(name, description="", *arguments, tag_keys=()):
            metrics[f"ray_{name}{suffix}"] = {*(tag_keys or arguments[-1]), *more_labels}

        return record

    kinds = {"Counter": recording("_total"), "Gauge": recording(""), "Histogram": recording("_bucket", "le")}
    import owlrec.apps.knowledge

    for kind, record in kinds.items():
        monkeypatch.setattr(ray.util.metrics, kind, record)  # for those that import it when they are made
        monkeypatch.setattr(owlrec.apps.knowledge, kind, record)
    owlrec.apps.knowledge.RayTelemetry("app")
    StageMetrics("stage", "worker")
    DecoderMetrics("engine")
    return metrics


def test_every_metric_and_label_that_is_read_is_exported(exported):
    assert len([name for name in exported if name.startswith("ray_owlrec_")]) > 20
    for expression in expressions():
        names = parse(expression.text)
        assert names.metrics, expression
        assert names.metrics.keys() <= exported.keys(), expression
        for metric, labels in names.metrics.items():
            assert labels <= exported[metric], (expression, metric)
        known = set().union(*(exported[metric] for metric in names.metrics))
        assert names.grouped | expression.shown <= known, expression
        assert all(metric.endswith(("_total", "_bucket")) for metric in names.counted), expression


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_titles_and_units_and_fill_the_grid_without_overlap(name):
    board = BOARDS[name]
    assert board["uid"] == f"owlrec-{name}"
    taken = set()
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["targets"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${source}"}
    ids = [panel["id"] for panel in board["panels"]]
    titles = [panel["title"] for panel in board["panels"]]
    assert (len(set(ids)), len(set(titles))) == (len(ids), len(titles))


def headings():
    """The anchors of the runbooks' sections, as GitHub makes them."""
    text = (ROOT / RUNBOOKS).read_text(encoding="utf-8")
    return {
        re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_is_complete_and_names_a_runbook_that_exists(rule):
    assert rule["alert"].startswith("OwlRec")
    assert re.fullmatch(r"\d+[mhd]", rule["for"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    page, anchor = rule["annotations"]["runbook"].split("#")
    assert page == RUNBOOKS
    assert anchor in headings()


def test_the_readmes_command_makes_the_operators_resource():
    text = (FOLDER / "README.md").read_text("utf-8")
    command = re.search(r"^(sed .*) \| kubectl -n owlrec apply -f -$", text, re.MULTILINE)[1]
    made = yaml.safe_load(subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True).stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))
    assert len(made["spec"]["groups"][0]["rules"]) == len(ALERTS) > 10


def test_names_are_read_off_expressions():
    names = parse('sum by (le, app) (rate(a_total{x="ray", y!~"5.."}[5m] offset 1d)) / on () group_left () c > 1e6')
    assert names.metrics == {"a_total": {"x", "y"}, "c": set()}
    assert (names.grouped, names.counted) == ({"le", "app"}, {"a_total"})


@pytest.mark.parametrize("text", ["sum(a_total", "rate(a]5m)", "summ(a)", "a{b}", 'a{b="c}', "a ? b", "sum by a (b)"])
def test_what_is_not_an_expression_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        parse(text)
