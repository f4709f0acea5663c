"""The report: complete, self-contained, safe against what titles and answers may hold."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from owlrec.ctr.experiment import Metrics, PairedDifference, SliceMetrics, TrialResult
from owlrec.decoding.controller import DecoderCounters, StepSums
from owlrec.encoding.semantic_ids import QuantisationReport
from owlrec.evaluation import GridScores, Interval
from owlrec.ops.report import (
    ArmFigures,
    KnowledgeSample,
    ReportData,
    StageFigures,
    arm_figures,
    arm_rows,
    comparison_rows,
    heat_rows,
    render_report,
    slice_rows,
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
        semantic_ids={
            "knowledge-user": QuantisationReport(
                vectors=943,
                unique_rate=0.9876,
                unique_rate_with_digit=1,
                code_usage=(1.0, 0.875),
                relative_error=0.1239,
                bytes_per_entity=3.0124,
            )
        },
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


@pytest.fixture
def compared():
    """Two arms, one of which was compared with two others, and a slice of which one was measured."""
    differences = {
        "none": PairedDifference(seeds=2, auc=0.0112, rela_imp=0.051, interval=Interval(low=-0.0021, high=0.0251)),
        "shuffled": PairedDifference(seeds=1, auc=-0.002, rela_imp=None, interval=None),
    }
    slices = {
        "cold items": SliceMetrics(rows=1234, auc=0.61, log_loss=0.65),
        "history 0": SliceMetrics(rows=2, auc=None, log_loss=0.7),
    }
    knowledge = ArmFigures(
        backbone="din",
        arm="knowledge",
        auc=[0.72, 0.73],
        calibration_error=[0.02, 0.04],
        differences=differences,
        slices=slices,
    )
    return [ArmFigures(backbone="din", arm="none", auc=[0.70, 0.72]), knowledge]


def test_a_difference_is_shown_with_its_interval(compared):
    none, knowledge = arm_rows(compared)
    assert (none.difference, none.interval, none.calibration_error) == ("", "", "")
    assert (knowledge.difference, knowledge.interval) == ("+0.0112", "[-0.0021, +0.0251]")
    assert knowledge.calibration_error == "0.0300 ± 0.0141"
    to_none, to_shuffled = comparison_rows(compared)
    assert (to_none.arm, to_none.base, to_none.seeds) == ("knowledge", "none", 2)
    assert (to_none.interval, to_none.rela_imp) == ("[-0.0021, +0.0251]", "+5.1%")
    assert (to_shuffled.base, to_shuffled.difference) == ("shuffled", "-0.0020")
    assert (to_shuffled.interval, to_shuffled.rela_imp) == ("", "")


def test_heat_follows_the_gain_and_fades_where_it_may_be_chance(data):
    def figures(backbone, arm, gain, low, high):
        interval = Interval(low=low, high=high)
        paired = PairedDifference(seeds=2, auc=gain, rela_imp=None, interval=interval)
        return ArmFigures(backbone=backbone, arm=arm, auc=[0.7], differences={"none": paired})

    arms = [
        ArmFigures(backbone="din", arm="none", auc=[0.7]),
        figures("din", "knowledge", 0.02, 0.01, 0.03),
        figures("din", "shuffled", -0.01, -0.02, -0.005),
        figures("dcnv2", "knowledge", 0.01, -0.01, 0.03),
    ]
    rows = heat_rows(arms)
    assert {backbone: [cell.gain for cell in cells] for backbone, cells in rows.items()} == {
        "din": ["+0.0200", "-0.0100"],
        "dcnv2": ["+0.0100", ""],
    }
    (true, shuffled), (uncertain, missing) = rows.values()
    assert "var(--s3) 70%" in true.style
    assert "var(--s2) 35%" in shuffled.style
    assert "var(--s3) 12%" in uncertain.style  # a third of 35
    assert missing.style == ""
    page = render_report(data.model_copy(update={"arms": arms}))
    assert "Which backbone gains by which arm?" in page
    assert true.style in page
    assert "Which backbone gains" not in render_report(data)  # no paired differences, no map


def test_slices_stand_side_by_side_for_the_arms(compared):
    cold, short = slice_rows(compared)
    assert (cold.backbone, cold.slice, cold.rows) == ("din", "cold items", 1234)
    assert cold.figures == [("", ""), ("0.6100", "0.6500")]
    assert short.figures[1] == ("one class", "0.7000")


def test_the_page_shows_intervals_and_slices_where_there_are_any(data, compared):
    plain = render_report(data)
    assert "Are the differences more than chance?" not in plain
    assert "Where does knowledge help?" not in plain
    page = render_report(data.model_copy(update={"arms": compared}))
    for text in ("95&nbsp;% interval", "[-0.0021, +0.0251]", "+5.1%", "cold items", "1,234", "one class"):
        assert text in page, text
    assert "fewer than 5 behaviours" in page
    assert "None" not in page


def test_results_and_test_scores_become_the_figures_of_the_arms():
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 2, 200), rng.normal(size=200)
    numbers = {"epochs": 3, "best_epoch": 1, "seconds": 1.0, "samples_per_s": 10.0, "parameters": 5}
    results = [
        TrialResult(backbone="din", arm=arm, seed=0, valid=metrics, test=metrics, **numbers)
        for arm, auc in (("none", 0.6), ("knowledge", 0.7))
        for metrics in [Metrics(auc=auc, gauc=None, log_loss=0.5, calibration_error=0.1)]
    ]
    scores = {"din/none/seed-0": noise, "din/knowledge/seed-0": noise + labels}
    none, knowledge = arm_figures(results, GridScores(np.arange(200) // 5, labels, scores))
    assert (none.auc, none.gauc, none.differences) == ([0.6], [], {})
    assert (knowledge.auc, knowledge.calibration_error) == ([0.7], [0.1])
    assert knowledge.differences["none"].interval.low > 0
    assert arm_figures(results)[1].differences["none"].interval is None


def test_semantic_ids_are_shown_with_what_they_are_worth(data):
    page = render_report(data)
    row = page[page.index("<td>knowledge-user</td>") :].split("</tr>")[0]
    cells = [cell.split("<")[0] for cell in row.split('<td class="n">')[1:]]
    assert cells == ["943", "98.8%", "100.0%", "100%, 88%", "0.124", "3.01"]
    assert "Semantic ids" not in render_report(data.model_copy(update={"semantic_ids": {}}))


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
