"""Shops whose logs hold no ratings: clicks alone, impressions with what became of them, plays counted.

Each goes from its files to the report by one call; prompts never quote passed-over items as taken.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import owlrec
from owlrec.generation.job import read_knowledge
from owlrec.shards import needed_stage
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
USERS, ITEMS, START = 90, 60, 1_700_000_000_000


def write_shop(folder: Path, outcome: str) -> None:
    """Users who like even or odd items, as a log of clicks, impressions or counted plays."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        shown = rng.permutation(ITEMS)[:30]
        likes = (shown % 2 == user % 2) | (rng.random(30) < 0.1)
        moments = START + 1000 * np.arange(30)
        rows += [
            (f"u{user}", f"i{item}", time, took)
            for item, time, took in zip(shown.tolist(), moments.tolist(), likes.tolist(), strict=True)
        ]
    rows = rows if outcome == "impressions" else [row for row in rows if row[3]]
    user, item, time, took = (list(column) for column in zip(*rows, strict=True))
    log = {"user_id": user, "item_id": item, "timestamp": time}
    if outcome == "impressions":
        log["label"] = [float(t) for t in took]
    if outcome == "plays":
        log["rating"] = rng.geometric(0.05, len(user)).astype(np.float32)
    folder.mkdir()
    items = {"item_id": [f"i{i}" for i in range(ITEMS)], "title": [f"Piece {i}" for i in range(ITEMS)]}
    pq.write_table(pa.table(log), folder / "log.parquet")
    pq.write_table(pa.table(items), folder / "items.parquet")


@pytest.mark.parametrize(
    ("outcome", "scenario", "rule"),
    [("clicks", "news", ""), ("impressions", "ads", ""), ("plays", "music", "labels: {rule: positives_only}")],
)
def test_a_log_without_grades_runs_to_the_report(outcome: str, scenario: str, rule: str, tmp_path: Path) -> None:
    write_shop(tmp_path / "shop", outcome)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: shop
scenario: {scenario}
workspace: {tmp_path / "ws"}
source: {{type: table, items: {tmp_path}/shop/items.parquet, interactions: {tmp_path}/shop/log.parquet}}
{rule}
engine: {{type: echo}}
sampling: {{max_tokens: 40}}
encoder: {{model: hashing}}
ctr: {{backbones: [din], arms: [none, knowledge], seeds: [0], epochs: 2}}
"""
    )
    owlrec.run(recipe, quiet=True)
    workspace = Workspace(tmp_path / "ws")
    assert "AUC" in (tmp_path / "ws" / "reports" / "shop.html").read_text()
    prepared = needed_stage(workspace, "prepare", "").counts
    labels = json.loads(str(prepared["labels"]))
    assert labels["rule"] == ("column" if outcome == "impressions" else "positives_only")
    samples = workspace.read_table("samples")
    shares = np.bincount(samples["label"].to_numpy().astype(int)) / samples.num_rows
    if outcome == "impressions":
        assert 0.4 < shares[1] < 0.7
    else:
        assert shares[1] == pytest.approx(1 / 5)  # four drawn for each
    texts = read_knowledge(workspace, needed_stage(workspace, "generate", "").outputs["knowledge"], "user")
    assert len(texts["id"].unique()) == USERS
    assert texts.num_rows == prepared["texts"] > USERS  # as of half and now
