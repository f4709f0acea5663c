"""Charts: where marks stand is computed by hand, whatever is written in them is escaped."""

import re
from xml.etree import ElementTree

import pytest

from owlrec.ops.report import _nice_step, bar_chart, histogram, points_chart, standalone, waterfall_chart


@pytest.mark.parametrize(("raw", "step"), [(0.9, 1), (1, 1), (1.2, 2), (2.3, 2.5), (0.003, 0.005), (60, 100)])
def test_steps_are_round_numbers(raw, step):
    assert _nice_step(raw) == pytest.approx(step)


def test_bars_are_proportional_and_start_at_zero():
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', bar_chart({"a": 50, "b": 200}, "s"))]
    assert widths == pytest.approx([widths[1] / 4, widths[1]], rel=0.01)
    assert ">200 s<" in bar_chart({"a": 50, "b": 200}, "s")


def test_a_histogram_counts_each_value_once():
    values = [1, 1, 2, 5, 9, 9, 9, 12]
    counts = [int(n) for n in re.findall(r"to [\d.]+: (\d+)", histogram(values, "tokens", bins=4))]
    # Steps of 5: [0, 5), [5, 10), [10, 15)
    assert counts == [3, 4, 1]
    assert ">median 9<" in histogram(values, "tokens")


def test_a_waterfalls_bars_hang_from_where_the_one_before_ended():
    chart = waterfall_chart("plain", 100.0, {"saves": -60.0, "costs": 10.0}, "cost")
    bars = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)"[^>]*width="([\d.]+)"', chart)]
    left, whole = bars[0]
    ends = [end for x, w in bars for end in ((x - left) / whole, (x + w - left) / whole)]
    assert ends == pytest.approx([0, 1, 0.4, 1, 0.4, 0.5, 0, 0.5], abs=0.01)
    assert re.findall(r'class="(s\d)"', chart) == ["s0", "s3", "s2", "s1"]
    assert [label in chart for label in (">-60<", ">+10<", ">50<")] == [True] * 3


def test_a_standalone_chart_is_a_whole_document():
    picture = ElementTree.fromstring(standalone(waterfall_chart("a", 1.0, {"<b>": -0.5}, "cost")))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert ".s3" in picture.findtext("{http://www.w3.org/2000/svg}style")


def test_points_show_mean_and_spread_and_skip_what_is_not_finite():
    chart = points_chart({"din": {"none": [0.70, 0.72, float("nan")], "broken": [float("nan")]}}, "AUC")
    assert "din, none: 0.7100 ± 0.0141 over 2 seeds" in chart
    assert chart.count('class="seed s0"') == 2
    assert "broken" not in chart


@pytest.mark.parametrize("values", [[7], [7, 7, 7], [0, 100_000]])
def test_degenerate_values_still_draw(values):
    assert "<rect" in histogram(values, "tokens")
    assert "<circle" in points_chart({"din": {"none": values}}, "AUC")


def test_nothing_gives_nothing():
    assert (points_chart({}, "AUC"), bar_chart({}, "s"), histogram([], "tokens")) == ("", "", "")


def test_labels_are_escaped():
    evil = '"><script>x</script>'
    for chart in (
        points_chart({evil: {evil: [1.0]}}, evil),
        bar_chart({evil: 1}, evil),
        histogram([1, 2], evil),
        waterfall_chart(evil, 1.0, {evil: -1.0}, evil),
    ):
        assert "<script" not in chart
        assert "&lt;script&gt;" in chart
