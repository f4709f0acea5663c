"""Grafana's dashboards and Prometheus' rules, built from here: `make dashboards` writes them to cluster/dashboards/.

Three dashboards answer three questions. generation: how far is the job, what does it cost, does the decoder pay?
serving: is it fast, whole and up? release: is what is served new, complete and sound? A test compares the files with
what this module builds, another looks for every metric on the pages of running applications.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from owlrec.ops.alerts import DAILY_BUDGET, TEXT_STAGES, alert_rules, coverage

FOLDER = "cluster/dashboards"
RULES, OPERATOR_RULES = "alerts.yaml", "prometheus-rule.yaml"
_WIDTH = 24  # Grafana's grid
_HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """A chart of one or more expressions, by legend."""

    title: str
    queries: dict[str, str]  # legend, with {{label}}, -> PromQL
    unit: str = "short"  # as Grafana names it
    stat: bool = False  # the last value as a number, in place of a chart
    about: str = ""


def _rate(metric: str, by: str = "", where: str = "") -> str:
    # Counters of a stage move when a shard ends, those of an application with each request.
    window = "5m" if metric.startswith("serving_") else "15m"
    return f"sum{f' by ({by}) ' if by else ''}(rate(ray_owlrec_{metric}_total{where}[{window}]))"


def _share(part: str, of: str, by: str = "") -> str:
    return f"{_rate(part, by)} / {_rate(of, by)}"


def _quantile(q: float, by: str, where: str = "") -> str:
    return f"histogram_quantile({q}, sum by ({by}, le) (rate(ray_owlrec_serving_seconds_bucket{where}[5m])))"


def _by_deployment(metric: str) -> dict[str, str]:
    return {"{{application}} {{deployment}}": f"sum by (application, deployment) (ray_serve_{metric})"}


def _tokens(which: str, by: str = "") -> str:
    return _rate("stage_counts", by, f'{{{TEXT_STAGES},count="{which}_tokens"}}')


_TEXTS = f"{{{TEXT_STAGES}}}"
_FLAGS = _rate("stage_counts", "count", f'{{{TEXT_STAGES},count=~"flag_.*"}}')
_GENERATION = [
    Panel("Rows written", {"rows": f"sum(ray_owlrec_stage_rows_total{_TEXTS})"}, stat=True),
    Panel("Dead letters", {"rows": f"sum(ray_owlrec_stage_dead_rows_total{_TEXTS})"}, stat=True),
    Panel("Engines", {"engines": f"count(ray_owlrec_stage_shards_in_flight{_TEXTS})"}, stat=True),
    Panel(
        "Cost so far",
        {"cost": f"sum(ray_owlrec_stage_cost_total{_TEXTS})"},
        stat=True,
        about="On nodes that are there, in the currency of generate.price_per_replica_hour, if the recipe has one.",
    ),
    Panel(
        "Rows a second",
        {"written": _rate("stage_rows", where=_TEXTS), "dead": _rate("stage_dead_rows", where=_TEXTS)},
    ),
    Panel("Output tokens a second, by engine", {"{{worker}}": _tokens("output", "worker")}),
    Panel("Prompt tokens a second", {"prompts": _tokens("prompt")}),
    Panel(
        "Shards",
        {
            "{{stage}} in flight": "sum by (stage) (ray_owlrec_stage_shards_in_flight)",
            "{{stage}} finished in an hour": "sum by (stage) (increase(ray_owlrec_stage_shards_total[1h]))",
        },
    ),
    Panel(
        "Cost of a million output tokens",
        {"cost": f"1e6 * {_rate('stage_cost', where=_TEXTS)} / {_tokens('output')}"},
    ),
    Panel(
        "Output tokens a second of an engine",
        {"{{worker}}": f"{_tokens('output', 'worker')} / {_rate('stage_worker_seconds', 'worker', _TEXTS)}"},
    ),
    Panel("Texts by quality flag", {"{{count}}": _FLAGS}),
    Panel(
        "Decoder: tokens a row and step",
        {"{{engine}}": _share("decoder_tokens", "decoder_rows", "engine")},
        about="1 is plain decoding.",
    ),
    Panel(
        "Decoder: share of drafts accepted",
        {
            "accepted": _share("decoder_accepted", "decoder_drafted"),
            "by the relaxed rule alone": _share("decoder_relaxed", "decoder_drafted"),
        },
        unit="percentunit",
    ),
    Panel("Decoder: drafts by source", {"{{source}}": _rate("decoder_hits", "source")}),
    Panel(
        "Decoder: milliseconds a step beside the model",
        {name: "1e3 * " + _share(f"decoder_{name}_seconds", "decoder_steps") for name in ("retrieval", "verification")},
        unit="ms",
    ),
    Panel(
        "Decoder: what went wrong",
        {
            "pools that are not there": _rate("decoder_unknown_pools"),
            "rules refused": _rate("decoder_bad_rules"),
        },
    ),
]
_CLUSTER = [
    Panel("Nodes", {"nodes": "count(ray_node_mem_total)"}),
    Panel("Actors", {"{{State}}": "sum by (State) (ray_gcs_actors_count)"}),
    Panel("Memory in use", {"{{ip}}": "ray_node_mem_used / ray_node_mem_total"}, unit="percentunit"),
    Panel(
        "Disk left",
        {"{{ip}}": "ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)"},
        unit="percentunit",
    ),
    Panel(
        "Object store in use", {"{{NodeAddress}}": "sum by (NodeAddress) (ray_object_store_used_memory)"}, unit="bytes"
    ),
    Panel("CPU in use", {"{{ip}}": "ray_node_cpu_utilization"}, unit="percent"),
]
_SERVING = [
    Panel("Requests a second", {"{{app}}": _rate("serving_requests", "app")}, unit="reqps"),
    Panel("By route", {"{{app}} {{route}}": _rate("serving_requests", "app, route")}, unit="reqps"),
    Panel(
        "Refused or failed",
        {"{{app}} {{status}}": _rate("serving_requests", "app, status", where='{status!~"2.."}')},
        unit="reqps",
    ),
    Panel(
        "Time of a request",
        {f"{{{{app}}}} p{round(100 * q)}": _quantile(q, "app", '{stage="request"}') for q in (0.5, 0.95, 0.99)},
        unit="s",
    ),
    Panel("Time of a stage, p99", {"{{app}} {{stage}}": _quantile(0.99, "app, stage")}, unit="s"),
    Panel("Rankings without the LLM", {"{{reason}}": _rate("serving_degraded", "reason")}, unit="reqps"),
    Panel("Requests at work", _by_deployment("replica_processing_queries")),
    Panel("Requests in Serve's queue", _by_deployment("deployment_queued_queries")),
    Panel("Replicas that are well", _by_deployment("deployment_replica_healthy")),
]
_RELEASE = [
    Panel("Age of the release", {"{{app}}": "max by (app) (ray_owlrec_serving_release_age_s)"}, unit="s", stat=True),
    Panel("Texts in the release", {"{{app}}": "min by (app) (ray_owlrec_serving_release_texts)"}, stat=True),
    Panel(
        "Coverage", {"known": coverage("1h")}, unit="percentunit", stat=True, about="Of the ids that were asked for."
    ),
    Panel("Current release refused", {"{{app}}": "max by (app) (ray_owlrec_serving_release_error)"}, stat=True),
    Panel("Age", {"{{app}}": "max by (app) (ray_owlrec_serving_release_age_s)"}, unit="s"),
    Panel("Texts", {"{{app}}": "min by (app) (ray_owlrec_serving_release_texts)"}),
    Panel(
        "Known and unknown ids",
        {"known {{kind}}": _rate("serving_hits", "kind"), "unknown {{kind}}": _rate("serving_misses", "kind")},
    ),
    Panel("Swaps in an hour", {"{{app}}": "sum by (app) (increase(ray_owlrec_serving_swaps_total[1h]))"}),
    Panel(
        "Texts on their way: share flagged",
        {"{{count}}": f"{_FLAGS} / on () group_left () {_rate('stage_rows', where=_TEXTS)}"},
        unit="percentunit",
        about="Of what is being generated now, before it is published.",
    ),
    Panel(
        "Texts on their way: share of dead letters",
        {"dead": f"{_rate('stage_dead_rows', where=_TEXTS)} / {_rate('stage_rows', where=_TEXTS)}"},
        unit="percentunit",
    ),
]
DASHBOARDS: dict[str, tuple[str, Sequence[Panel]]] = {
    "generation": ("OwlRec generation", [*_GENERATION, *_CLUSTER]),
    "serving": ("OwlRec serving", _SERVING),
    "release": ("OwlRec release health", _RELEASE),
}


def build_dashboard(name: str) -> dict[str, Any]:
    """A dashboard as Grafana imports it; it asks for the Prometheus to read from."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"owlrec-{name}",
        "title": title,
        "tags": ["owlrec"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(number, panel, place) for number, (panel, place) in enumerate(_places(panels), start=1)],
    }


def _places(panels: Sequence[Panel]) -> list[tuple[Panel, dict[str, int]]]:
    """Four numbers or two charts a row."""
    found, x, y, row = [], 0, 0, 0
    for panel in panels:
        width, height = (_WIDTH // 4, _HEIGHT // 2) if panel.stat else (_WIDTH // 2, _HEIGHT)
        if x + width > _WIDTH or (row and height != row):
            x, y = 0, y + row
        found.append((panel, {"x": x, "y": y, "w": width, "h": height}))
        x, row = x + width, height
    return found


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def build_files(daily_budget: float = DAILY_BUDGET) -> dict[str, str]:
    """Every file of the folder, by name."""
    files = {f"{name}.json": json.dumps(build_dashboard(name), indent=2) + "\n" for name in DASHBOARDS}
    rules = alert_rules(daily_budget)
    of_operator = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "owlrec", "labels": {"release": "prometheus"}},  # what your Prometheus selects rules by
        "spec": rules,
    }
    return files | {RULES: _yaml(rules), OPERATOR_RULES: _yaml(of_operator)}


def _yaml(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
    return "# Built by owlrec.ops.dashboards (`make dashboards`): change it there.\n" + text


def metrics_in(expr: str) -> set[str]:
    """The metrics that an expression reads."""
    return set(re.findall(r"\bray_\w+", expr))


def main() -> None:
    """The command line of `python -m owlrec.ops.dashboards`."""
    parser = argparse.ArgumentParser(prog="python -m owlrec.ops.dashboards", description=__doc__)
    parser.add_argument("folder", nargs="?", default=FOLDER, type=Path)
    parser.add_argument("--daily-budget", type=float, default=DAILY_BUDGET, help="of generation, for its alert")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, text in build_files(given.daily_budget).items():
        (given.folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
