"""Pages of figures: RESULTS.md and the README's tables say what the benchmarks found, and nothing else."""

import pytest

from benchmarks.pages import HERE, README, Result, read_results, readme_with, results_page
from benchmarks.plan import LONG_PARTS, PARTS
from benchmarks.table import Figure


def result(*figures: Figure) -> Result:
    return Result(
        command="python -m benchmarks.lookup", hardware="2 CPU cores", day="2026-11-25", seconds=90, figures=figures
    )


def figure(value: float, **changes: object) -> Figure:
    return Figure(measure="text", method="owlrec", value=value, unit="µs").model_copy(update=changes)


def test_the_pages_are_those_that_the_figures_render():
    results = read_results()
    assert (HERE / "RESULTS.md").read_text() == results_page(results)
    assert README.read_text() == readme_with(README.read_text(), results)


def test_every_part_of_a_full_round_was_measured():
    assert {part.name for part in PARTS} <= set(read_results())


def test_names_of_parts_are_unique():
    names = [part.name for part in (*PARTS, *LONG_PARTS)]
    assert len(names) == len(set(names))


def test_a_table_of_the_readme_takes_the_rows_that_it_asks_for():
    results = {"lookup": result(figure(4.25), figure(1234.5, method="SQLite", ratio=0.5, ratio_to="SQLite"))}
    page = "before\n<!-- results lookup: SQLite -->\nold\n<!-- end of results -->\nbehind"
    filled = readme_with(page, results)
    assert "| text | SQLite | 1,234 µs | 0.50x SQLite |" in filled
    assert "4.25" not in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("behind")
    assert readme_with(filled, results) == filled


def test_a_table_of_a_part_that_never_ran_is_refused():
    with pytest.raises(KeyError):
        readme_with("<!-- results lookup: . -->\n<!-- end of results -->", {})


def test_the_page_names_what_is_missing_and_what_was_skipped():
    page = results_page({"lookup": result(figure(float("nan"), unit="skipped"))})
    assert "| text | owlrec | skipped |  |" in page
    assert "Not measured yet: `demo`, `generation`," in page
    assert "90 s, 2 CPU cores, 2026-11-25" in page
