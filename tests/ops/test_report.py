"""The report: complete, self-contained, safe against what titles and answers may hold."""

import re
from html.parser import HTMLParser

import pytest

from owlrec.decoding.counters import DecoderCounters, StepSums
from owlrec.ops.report import (
    ArmFigures,
    KnowledgeSample,
    ReportData,
    StageFigures,
    arm_rows,
    render_report,
)

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def data():
    return ReportData(
        run="demo",
        finished="2026-01-02 03:04 UTC",
        hardware="2 cores",
        protocol="split by user",
        facts={"users": "40"},
        arms=[
            ArmFigures(backbone="din", arm="none", auc=[0.70, 0.72]),
            ArmFigures(backbone="din", arm="knowledge", auc=[0.72, 0.73], gauc=[0.6, 0.6]),
        ],
        stages=[
            StageFigures(stage="generate", seconds=10, prompt_tokens=2000, output_tokens=5000, rows=40),
            StageFigures(stage="prepare", seconds=3, skipped=True),
        ],
        knowledge_tokens={"user": [100, 120, 180], "item": []},
        samples=[KnowledgeSample(kind="item", title=EVIL, inputs=[f"genres: {EVIL}"], text=f"{EVIL} & more")],
        release={"name": "20260102T030400Z-0123abcd"},
        lookup={"knowledge, p99": "9 µs"},
        notes=["a small model"],
    )


class Tags(HTMLParser):
    """Collects tags and the attributes that load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action")]


def test_the_page_is_one_file_without_scripts_or_outside_resources(data):
    page = render_report(data)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert tags.loads == []
    assert not re.search(r"url\(|@import|https?://", page)
    assert tags.tags.count("svg") == 4  # AUC, lengths of one kind, seconds, tokens


def test_untrusted_text_is_escaped_and_shown(data):
    page = render_report(data)
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 3
    for text in (
        "demo",
        "2 cores",
        "split by user",
        "20260102T030400Z-0123abcd",
        "9 µs",
        "a small model",
        "done before",
    ):
        assert text in page
    assert ">500</td>" in page  # output tokens a second: 5000 in 10 s


def test_arms_are_compared_with_none_of_their_backbone(data):
    none, knowledge = arm_rows(data.arms)
    assert (none.auc, none.difference, none.gauc) == ("0.7100 ± 0.0141", "", "")
    assert (knowledge.auc, knowledge.difference) == ("0.7250 ± 0.0071", "+0.0150")
    [alone] = arm_rows([ArmFigures(backbone="din", arm="knowledge", auc=[0.7])])
    assert (alone.auc, alone.difference, alone.seeds) == ("0.7000", "", 1)


def test_a_run_that_ended_early_still_has_a_page():
    page = render_report(ReportData(run="r", finished="now", hardware="2 cores"))
    assert "<h2>" not in page
    assert "None" not in page


def test_the_decoder_is_shown_by_its_counts_and_its_speed_up_by_batch_size(data):
    assert "Speculative decoding" not in render_report(data)
    counts = {
        "rows": 100,
        "tokens": 250,
        "drafted": 400,
        "accepted": 150,
        "relaxed": 5,
        "hits_own": 7,
        "retrieval_s": 0.1,
    }
    sums = {1: StepSums(steps=9, tokens=20, seconds=2.0, plain_s=6.2), 16: StepSums(steps=3, seconds=1.0, plain_s=1.4)}
    page = render_report(data.model_copy(update={"decoder": DecoderCounters(counts=counts, by_rows=sums)}))
    for text in (
        "2.50 (steps without",
        "400, 38% accepted",
        "own 7",
        "retrieval 3.3%",
        "up to 16 rows",
        "3.1 x plain",
        "1.4 x plain",
    ):
        assert text in page, text
