"""The report: complete, self-contained, safe against what titles and answers may hold."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from owlrec.ctr.experiment import Metrics, PairedDifference, SliceMetrics, TrialResult
from owlrec.encoding.compression import QuantizationReport
from owlrec.evaluation import GridScores, Interval
from owlrec.ops.report import (
    ArmFigures,
    KnowledgeSample,
    ReportData,
    arm_figures,
    arm_rows,
    comparison_rows,
    heat_rows,
    render_report,
    slice_rows,
)
from owlrec.shards import Card
from owlrec_decoding.controller import DecoderCounters, StepSums

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
            Card(
                stage="generate",
                fingerprint="f",
                seconds=10,
                counts={
                    "user_rows_out": 30,
                    "item_rows_out": 10,
                    "user_prompt_tokens": 2000,
                    "item_output_tokens": 5000,
                },
            ),
            Card(stage="prepare", fingerprint="f", seconds=3),
        ],
        knowledge_tokens={"user": [100, 120, 180], "item": []},
        samples=[KnowledgeSample(kind="item", title=EVIL, inputs=[f"genres: {EVIL}"], text=f"{EVIL} & more")],
        release={"name": "20260102T030400Z-0123abcd"},
        semantic_ids={
            "knowledge-user": QuantizationReport(
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


class Page(HTMLParser):
    """Collects tags, the attributes that load something, and the cells of all tables by the first of their row."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.rows, self._cell = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        self._cell = tag == "td" or (self._cell and tag == "span")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag != "td"

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, *first):
        """The only row that begins with these cells."""
        (row,) = [row for row in self.rows if tuple(row[: len(first)]) == first]
        return row


def test_the_page_is_one_file_without_scripts_or_outside_resources(data):
    page = render_report(data)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert all(target.startswith("#") for target in parsed.loads)  # marks that a chart uses again
    assert not re.search(r"url\((?!#)|@import|<link|<image", page)
    assert set(re.findall(r"https?://[^\"]+", page)) == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert parsed.tags.count("svg") == 4  # AUC, lengths of one kind, seconds, tokens


def test_the_page_reads_well_in_light_and_dark(data):
    page = render_report(data)
    assert "prefers-color-scheme: dark" in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert all("currentColor" in chart and "#000000" not in chart and "#ffffff" not in chart for chart in charts)


def test_the_same_figures_give_the_same_page(data):
    assert render_report(data) == render_report(data.model_copy(deep=True))


def test_untrusted_text_is_escaped_and_shown(data):
    page = render_report(data)
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 3
    for text in ("demo", "2 cores", "split by user", "a small model"):
        assert text in page


def test_tables_show_stages_release_and_lookup(data):
    page = Page(render_report(data))
    assert page.row("generate")[1:] == ["40", "10.0", "2,000", "5,000", "500"]  # 5000 tokens in 10 s
    assert page.row("prepare")[1:] == ["", "3.0", "", "", ""]
    assert page.row("name") == ["name", "20260102T030400Z-0123abcd"]
    assert page.row("knowledge, p99") == ["knowledge, p99", "9 µs"]
    assert page.row("din", "knowledge")[2:6] == ["0.7250 ± 0.0071", "+0.0150", "", "0.6000 ± 0.0000"]


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
    din, dcnv2 = heat_rows(arms)
    assert list(din) == ["test AUC minus none", "knowledge", "shuffled"]
    assert (din["test AUC minus none"], dcnv2["test AUC minus none"], dcnv2["shuffled"]) == ("din", "dcnv2", "")
    for cell, gain, color in (
        (din["knowledge"], "+0.0200", "var(--green) 70%"),
        (din["shuffled"], "-0.0100", "var(--ochre) 35%"),
        (dcnv2["knowledge"], "+0.0100", "var(--green) 12%"),  # a third of 35
    ):
        assert gain in cell
        assert color in cell
    page = render_report(data.model_copy(update={"arms": arms}))
    assert "Which backbones gain from which arms?" in page
    assert din["knowledge"] in page
    assert "Which backbones gain" not in render_report(data)  # no paired differences, no map


def test_slices_stand_side_by_side_for_the_arms(compared):
    cold, short = slice_rows(compared)
    assert list(cold.values()) == ["din", "cold items", "1,234", "", "0.6100 / 0.6500"]
    assert short["knowledge"] == "one class / 0.7000"


def test_the_page_shows_intervals_and_slices_where_there_are_any(data, compared):
    plain = render_report(data)
    assert "Are the differences more than chance?" not in plain
    assert "Where does knowledge help?" not in plain
    page = render_report(data.model_copy(update={"arms": compared}))
    for text in ("95 % interval", "[-0.0021, +0.0251]", "+5.1%", "cold items", "1,234", "one class"):
        assert text in page, text
    assert "fewer than 5 behaviors" in page
    assert "None" not in page


def test_results_and_test_scores_become_the_figures_of_the_arms():
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 2, 200), rng.normal(size=200)
    numbers = {"epochs": 3, "best_epoch": 1, "seconds": 1.0, "samples_per_s": 10.0, "parameters": 5}
    results = [
        TrialResult(backbone="din", arm=arm, seed=0, valid=metrics, test=metrics, slices={}, **numbers)
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
    assert Page(page).row("knowledge-user")[1:] == ["943", "98.8%", "100.0%", "100%, 88%", "0.124", "3.01"]
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
        "2.50 (including steps without",
        "400, 38% accepted",
        "own 7",
        "retrieval 3.3%",
        "up to 16 rows",
        "3.1 x plain",
        "1.4 x plain",
    ):
        assert text in page, text
