"""The files on disk are what the source builds; every alert leads to a runbook."""

import json
import re
from pathlib import Path

import pytest
import yaml

from owlrec.ops.alerts import RUNBOOKS, alert_rules, alerts
from owlrec.ops.dashboards import DASHBOARDS, FOLDER, build_dashboard, build_files, metrics_in

ROOT = Path(__file__).resolve().parents[2]


def test_the_files_on_disk_are_what_the_source_builds():
    built = build_files()
    on_disk = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / FOLDER).iterdir()}
    assert set(on_disk) == {*built, "README.md"}
    for name, text in built.items():
        assert on_disk[name] == text, f"{FOLDER}/{name} is out of date: run `make dashboards`"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_fill_the_grid_without_overlap_and_each_reads_something(name):
    board = json.loads(build_files()[f"{name}.json"])
    assert board == build_dashboard(name)
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            assert metrics_in(target["expr"])
            assert target["datasource"]["uid"] == "${source}"
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


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_every_alert_names_a_runbook_that_exists(alert):
    assert alert.runbook in headings()
    assert metrics_in(alert.expr)


def test_rules_are_what_prometheus_reads():
    rules = yaml.safe_load(build_files(daily_budget=7)["alerts.yaml"])
    assert rules == alert_rules(7)
    assert yaml.safe_load(build_files(daily_budget=7)["prometheus-rule.yaml"])["spec"] == rules
    of = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}
    assert of["OwlRecCostOverrun"]["expr"].endswith("> 7")
    assert of["OwlRecStageStuck"]["annotations"]["runbook"] == f"{RUNBOOKS}#stuck-job"
    for rule in of.values():
        assert re.fullmatch(r"\d+[mhd]", rule["for"])
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_metrics_are_read_off_expressions():
    assert metrics_in('sum(rate(ray_a_total[5m])) / on () x_ray_b + ray_c{d="ray"}') == {"ray_a_total", "ray_c"}
