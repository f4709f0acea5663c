"""What Prometheus wakes somebody for: each alert with the section of docs/operations.md that says what to do.

Thresholds are where a healthy system of any size does not come; a budget is the user's own. Expressions name metrics
that the running applications export, which a test checks against their pages.
"""

from dataclasses import dataclass
from typing import Any, Literal

RUNBOOKS = "docs/operations.md"
DAILY_BUDGET = 100.0  # an example, as the currency itself: write the rules with your own
TEXT_STAGES = 'stage=~"generate|refresh"'  # the stages of the runner that write texts
_HARMFUL = (
    "flag_(refusal|asks_for_input|wrong_domain|prompt_echo|template_tokens|language)"  # flags of texts that mislead
)


@dataclass(frozen=True)
class Alert:
    """One rule."""

    name: str
    expr: str
    hold: str  # how long it must be so
    severity: Literal["page", "ticket"]  # page: now; ticket: in working hours
    summary: str
    runbook: str  # the anchor of a section


def alerts(daily_budget: float = DAILY_BUDGET) -> list[Alert]:
    """All rules. daily_budget: what generation may cost a day, in the currency of generate.price_per_replica_hour."""
    texts = f"ray_owlrec_stage_rows_total{{{TEXT_STAGES}}}[1h]"
    dead = f"ray_owlrec_stage_dead_rows_total{{{TEXT_STAGES}}}[1h]"
    requests, in_flight = "ray_owlrec_serving_requests_total", "ray_owlrec_stage_shards_in_flight"
    return [
        Alert(
            "StageStuck",
            f"sum by (stage) ({in_flight}) > 0 unless sum by (stage) (increase(ray_owlrec_stage_shards_total[1h])) > 0",
            "1h",
            "page",
            "Workers have shards in flight, but finished none within the hour",
            "stuck-job",
        ),
        Alert(
            "GenerationRowsDie",
            f"sum(increase({dead})) > 0.02 * (sum(increase({texts})) + sum(increase({dead})))",
            "15m",
            "ticket",
            "More than 2 % of rows end as dead letters",
            "dead-letters",
        ),
        Alert(
            "GenerationTextsHarmful",
            f'sum(increase(ray_owlrec_stage_counts_total{{{TEXT_STAGES},count=~"{_HARMFUL}"}}[1h]))'
            f" > 0.05 * sum(increase({texts}))",
            "15m",
            "ticket",
            "More than 5 % of texts are refusals, echoes or off the subject: do not publish them unseen",
            "poisoned-release",
        ),
        Alert(
            "SpotStorm",
            f"count(last_over_time({in_flight}[1h])) > 2 * count({in_flight})",
            "10m",
            "ticket",
            "More workers were lost within the hour than there are",
            "spot-storm",
        ),
        Alert(
            "CostOverrun",
            f"sum(increase(ray_owlrec_stage_cost_total[1d])) > {daily_budget:g}",
            "5m",
            "page",
            f"Generation has cost more than {daily_budget:g} within a day",
            "cost-overrun",
        ),
        Alert(
            "ReleaseStale",
            "max by (app) (ray_owlrec_serving_release_age_s) > 36 * 3600",
            "15m",
            "ticket",
            "The release in force is older than a day and a half: the nightly refresh did not publish",
            "stale-release",
        ),
        Alert(
            "ReleaseRefused",
            "max by (app) (ray_owlrec_serving_release_error) > 0",
            "2m",
            "page",
            "The current release cannot be opened; the one before it is still served",
            "poisoned-release",
        ),
        Alert(
            "ReleaseShrank",
            "min by (app) (ray_owlrec_serving_release_texts)"
            " < 0.9 * max by (app) (max_over_time(ray_owlrec_serving_release_texts[1d]))",
            "5m",
            "page",
            "The release in force has less than 90 % of the texts that one had within the day",
            "poisoned-release",
        ),
        Alert(
            "CoverageFell",
            f"{coverage('1h')} < 0.8 * {coverage('1h', ' offset 1d')}",
            "15m",
            "ticket",
            "Far fewer of the ids that are asked for are known than a day ago",
            "poisoned-release",
        ),
        Alert(
            "ServingFails",
            f'sum by (app) (rate({requests}{{status=~"5.."}}[5m])) > 0.01 * sum by (app) (rate({requests}[5m]))',
            "5m",
            "page",
            "More than 1 % of requests fail",
            "failing-or-slow-requests",
        ),
        Alert(
            "ServingSlow",
            "histogram_quantile(0.99, sum by (app, le)"
            ' (rate(ray_owlrec_serving_seconds_bucket{app="knowledge",stage="request"}[5m]))) > 0.1',
            "10m",
            "ticket",
            "One lookup in a hundred takes longer than 100 ms",
            "failing-or-slow-requests",
        ),
        Alert(
            "RankingDegraded",
            f'sum(rate(ray_owlrec_serving_degraded_total[10m])) > 0.1 * sum(rate({requests}{{app="rank"}}[10m]))',
            "10m",
            "ticket",
            "More than 10 % of rankings go out without the LLM",
            "failing-or-slow-requests",
        ),
        Alert(
            "KeysRefused",
            f'sum by (app) (rate({requests}{{status="401"}}[10m])) > 0.05 * sum by (app) (rate({requests}[10m]))',
            "10m",
            "ticket",
            "More than 5 % of requests come with no valid API key",
            "key-rotation",
        ),
        Alert(
            "DiskNearlyFull",
            "min by (ip) (ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)) < 0.1",
            "5m",
            "page",
            "A node has less than 10 % of its disk left",
            "disk-full",
        ),
        Alert(
            "HeadLost",
            "absent(ray_gcs_actors_count)",
            "5m",
            "page",
            "Nothing is heard of the cluster's head",
            "losing-the-driver-or-the-head",
        ),
    ]


def coverage(window: str, offset: str = "") -> str:
    """The share of the ids asked for of which something was known, as an expression."""
    hits, misses = (f"sum(rate(ray_owlrec_serving_{name}_total[{window}]{offset}))" for name in ("hits", "misses"))
    return f"({hits} / ({hits} + ({misses} or vector(0))))"


def alert_rules(daily_budget: float) -> dict[str, Any]:
    """A Prometheus rules file."""
    rules = [
        {
            "alert": f"OwlRec{alert.name}",
            "expr": alert.expr,
            "for": alert.hold,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": f"{alert.summary}.", "runbook": f"{RUNBOOKS}#{alert.runbook}"},
        }
        for alert in alerts(daily_budget)
    ]
    return {"groups": [{"name": "owlrec", "interval": "1m", "rules": rules}]}
