"""Charts: what is written in them, escaped; the lengths of bars; the same bytes for the same values."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from owlrec.ops.report import bar_chart, histogram, points_chart, short_number, standalone

SVG = "{http://www.w3.org/2000/svg}"


def texts(chart):
    return [text.text for text in ElementTree.fromstring(standalone(chart)).iter(f"{SVG}text")]


def widths(chart):
    """Of what is filled, in the order drawn."""
    root = ElementTree.fromstring(standalone(chart))
    paths = [p.get("d") for p in root.iter(f"{SVG}path") if "fill: #" in p.get("style", "")]
    corners = [[float(x) for x in re.findall(r"[ML] ([\d.]+) [\d.]+", path)] for path in paths]
    return [max(xs) - min(xs) for xs in corners]


def test_bars_start_at_zero_and_carry_their_values():
    chart = bar_chart({"a": 50, "b": 200}, "s")
    short, long = widths(chart)
    assert long == pytest.approx(4 * short)
    assert {"a", "b", "50 s", "200 s"} <= set(texts(chart))


def test_a_histogram_names_its_median():
    chart = histogram([1, 1, 2, 5, 9, 9, 9, 12], "tokens")
    assert {"median 7", "tokens"} <= set(texts(chart))
    assert len(widths(chart)) == 24


def test_points_show_mean_and_spread_and_skip_what_is_not_finite():
    chart = points_chart({("din", "none"): [0.70, 0.72, float("nan")], ("din", "broken"): [float("nan")]}, "AUC")
    assert {"din: none", "0.7100 ± 0.0141", "AUC"} <= set(texts(chart))
    assert "broken" not in chart


@pytest.mark.parametrize("values", [[7], [7, 7, 7], [0, 100_000]])
def test_degenerate_values_still_draw(values):
    assert "tokens" in texts(histogram(values, "tokens"))
    assert "a: b" in texts(points_chart({("a", "b"): values}, "AUC"))
    assert "a" in texts(bar_chart({"a": 0.0}, "s"))


def test_nothing_gives_nothing():
    assert (points_chart({}, "AUC"), bar_chart({}, "s"), histogram([], "tokens")) == ("", "", "")


def test_labels_are_escaped_and_never_mathematics():
    evil = '"><script>x</script> $x^2$'
    for chart in (points_chart({(evil, ""): [1.0]}, evil), bar_chart({evil: 1}, evil), histogram([1, 2], evil)):
        assert "<script" not in chart
        assert any(evil in text for text in texts(chart))


def test_ink_takes_the_pages_color_and_the_bytes_are_the_same_each_time():
    chart = bar_chart({"a": 1}, "s")
    assert "currentColor" in chart
    assert "#000000" not in chart
    assert chart == bar_chart({"a": 1}, "s")
    assert "prefers-color-scheme: dark" in standalone(chart)


def test_numbers_are_short():
    assert [short_number(n) for n in (0.12345, 99.95, 1234.5, 12_345_678)] == ["0.123", "100", "1,234", "12 M"]


@pytest.mark.process
def test_matplotlib_loads_with_the_first_chart_only():
    code = "import sys, owlrec.ops.report; print('matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
