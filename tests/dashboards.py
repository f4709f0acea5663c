"""Reads the dashboards and alerts under cluster/dashboards/ as far as names go: metrics, labels, groupings.

A full PromQL parser is not among our dependencies. This one splits an expression into tokens, refuses what is none,
checks brackets, and tells metrics from functions and keywords. https://prometheus.io/docs/prometheus/latest/querying/
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "cluster" / "dashboards"
BOARDS: dict[str, dict[str, Any]] = {f.stem: json.loads(f.read_text("utf-8")) for f in sorted(FOLDER.glob("*.json"))}
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]  # fmt: skip
_TOKEN = re.compile(
    r"""\s*(?:(?P<name>[a-zA-Z_:][\w:]*) | (?P<number>\d+(?:\.\d+)?(?:e\d+)?(?![\w.])) | (?P<duration>\d+[smhdw])
    | (?P<string>"(?:[^"\\]|\\.)*") | (?P<operator>=~|!~|!=|==|>=|<=|[-+*/%^=<>,(){}\[\]]))""",
    re.VERBOSE,
)
_FUNCTIONS = {
    "absent", "avg", "count", "histogram_quantile", "increase", "last_over_time", "max", "max_over_time", "min", "rate",
    "sum", "time", "vector",
}  # fmt: skip
_GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_KEYWORDS = {"and", "or", "unless", "offset", "bool"}
_CLOSING = {"(": ")", "{": "}", "[": "]"}


@dataclass
class Names:
    """What an expression reads."""

    metrics: dict[str, set[str]] = field(default_factory=dict)  # metric -> the labels that its matchers name
    grouped: set[str] = field(default_factory=set)  # labels that results are grouped or joined by
    counted: set[str] = field(default_factory=set)  # metrics inside rate() or increase()


@dataclass(frozen=True)
class Expression:
    """One query of a dashboard, or one alert's condition."""

    where: str
    text: str
    shown: frozenset[str] = frozenset()  # labels of the legend


def expressions() -> Iterator[Expression]:
    """All of all files."""
    for name, board in BOARDS.items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                legend = frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                yield Expression(f"{name}: {panel['title']}", target["expr"], legend)
    for rule in ALERTS:
        yield Expression(rule["alert"], rule["expr"])


def parse(text: str) -> Names:
    """The names in an expression; raises ValueError where it cannot be one."""
    names, tokens, closing = Names(), _tokens(text), []
    metric = grouping = calling = ""
    for (kind, token), (_, following) in zip(tokens, [*tokens[1:], ("end", "")], strict=True):
        if token in _CLOSING:
            closing.append(_CLOSING[token])
        elif token in _CLOSING.values():
            if not closing or closing.pop() != token:
                raise ValueError(f"{text}: {token!r} closes nothing")
            if token == ")":
                grouping = calling = ""
        elif kind == "name":
            if closing and closing[-1] == "}":
                if not metric or following not in ("=", "!=", "=~", "!~"):
                    raise ValueError(f"{text}: {token!r} is not a label with a matcher")
                names.metrics[metric].add(token)
            elif grouping:
                names.grouped.add(token)
            elif token in _GROUPINGS:
                if following != "(":
                    raise ValueError(f"{text}: {token!r} names no labels")
                grouping = token
            elif token in _FUNCTIONS:
                calling = token
            elif token not in _KEYWORDS:
                if following == "(":
                    raise ValueError(f"{text}: there is no function {token!r}")
                metric = token
                names.metrics.setdefault(metric, set())
                if calling in ("rate", "increase"):
                    names.counted.add(metric)
    if closing:
        raise ValueError(f"{text}: {closing[-1]!r} is missing")
    return names


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise ValueError(f"{text}: cannot read on from {text[at:]!r}")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return tokens
