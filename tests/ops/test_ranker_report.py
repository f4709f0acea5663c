"""The LLM ranker in the report of a run: gathered from all its runs, a row and a point for each way of asking."""

import pytest

from owlrec.evaluation import Interval
from owlrec.ops.report import ReportData, ranker_rows, render_report
from owlrec.ranking.question_sets import Evaluation, RankerResult, read_results, results_of, write_results
from owlrec.ranking.samples import RankingConfig
from owlrec.workspace import Workspace


def evaluation(model: str, shown: str, auc: float, interval: Interval | None = None) -> Evaluation:
    return Evaluation(
        model=model,
        shown=shown,
        rows=10,
        unscored=0,
        auc=auc,
        interval=interval,
        gauc=None,
        accuracy=0.5,
        log_loss=0.7,
        raw_log_loss=0.8,
        calibration_error=0.1,
        raw_calibration_error=0.2,
    )


def config(shots: int | None, behaviors: int) -> RankingConfig:
    return RankingConfig.model_validate({"data": {"shots": shots, "behaviors": behaviors}})


@pytest.fixture
def results(workspace: Workspace) -> list[RankerResult]:
    """Two seeds of 256 shots, one of all samples with more behaviors, and DIN; one run was done twice."""
    low = Interval(low=0.6, high=0.68)
    for name, auc in (("again", 0.1), ("b", 0.66)):
        write_results(workspace, name, results_of(config(256, 5), [evaluation("tuned", "recent", auc)], seed=1))
    first = [evaluation("zero-shot", "recent", 0.5), evaluation("tuned", "recent", 0.64, low)]
    write_results(workspace, "c", results_of(config(256, 5), first))
    write_results(workspace, "d", results_of(config(None, 30), [evaluation("tuned", "retrieved", 0.7)]))
    din = RankerResult(model="din", shots=256, behaviors=None, shown="", seed=0, auc=0.55)
    write_results(workspace, "e", [din])
    return read_results(workspace)


def test_rows_are_grouped_by_what_is_shown_and_seeds_are_averaged(results: list[RankerResult]) -> None:
    assert [tuple(row.values()) for row in ranker_rows(results)] == [
        ("CTR models", "din, 256 shots", "1", "0.5500", ""),
        ("recent, K = 5", "zero-shot", "1", "0.5000", ""),
        ("recent, K = 5", "tuned, 256 shots", "2", "0.6500 ± 0.0141", "[0.6000, 0.6800]"),
        ("retrieved, K = 30", "tuned, all samples", "1", "0.7000", ""),
    ]


def test_page_has_the_table_and_the_plot_where_a_ranker_ran(results: list[RankerResult]) -> None:
    about = {"run": "r", "finished": "now", "hardware": "here"}
    page = render_report(ReportData(**about, ranker=results))
    assert "The LLM ranker" in page
    assert "0.6500 ± 0.0141" in page
    assert ">recent, K = 5: tuned, 256 shots</text>" in page  # a row of the plot
    assert "The LLM ranker" not in render_report(ReportData(**about))


def test_a_workspace_without_a_ranker_has_no_results(workspace: Workspace) -> None:
    assert read_results(workspace) == []
