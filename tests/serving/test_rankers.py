"""Which adapter and which calibration are used."""

import numpy as np
import pytest

from owlrec.errors import EngineError, WorkspaceError
from owlrec.evaluation import PlattScaling, save_calibration
from owlrec.ranking.lora import TuningProgress, save_adapter
from owlrec.serving.rank_api import open_ranker

MADE_FOR = {"model": "tiny:1", "wording": "w" * 64}
PLATT = PlattScaling(slope=2.0, intercept=-1.0)
FLAT = PlattScaling(slope=0.0, intercept=-1.0)


def opened(workspace, shown="retrieved", **choice):
    return open_ranker(workspace, choice, **MADE_FOR, shown=shown)


@pytest.fixture
def tuned(workspace):
    """A workspace with an adapter, and a calibration for one way of asking beside it."""
    save_adapter(workspace, "ranking/ab/adapter", b"weights", {"r": 8}, **MADE_FOR, progress=TuningProgress())
    save_calibration(workspace, "ranking/ab/calibration-tuned-retrieved.json", PLATT)
    save_calibration(workspace, "ranking/ab/calibration-zero-shot-retrieved.json", FLAT)
    return workspace


def test_what_was_fitted_with_the_adapter_is_found_beside_it(tuned):
    for folder in ("ranking/ab/adapter", "ranking/ab/adapter/"):
        ranker = opened(tuned, adapter=folder)
        assert ranker.adapter.rstrip("/") == tuned.path("ranking/ab/adapter")
        assert ranker.calibration == PLATT


def test_not_where_questions_are_asked_in_another_way(tuned):
    assert opened(tuned, shown="recent", adapter="ranking/ab/adapter").calibration is None


def test_a_named_calibration_stands_in_its_place(tuned):
    file = "ranking/ab/calibration-zero-shot-retrieved.json"
    assert opened(tuned, adapter="ranking/ab/adapter", calibration=file).calibration == FLAT
    as_it_is = opened(tuned, calibration=file)
    assert (as_it_is.adapter, as_it_is.calibration) == (None, FLAT)
    assert opened(tuned, adapter=None).calibration is None


def test_what_is_missing_is_refused(tuned):
    with pytest.raises(WorkspaceError, match="nowhere"):
        opened(tuned, calibration="nowhere.json")
    tuned.write_json("ranking/ab/calibration-tuned-retrieved.json", {"method": "magic"})
    with pytest.raises(WorkspaceError, match="calibrate again"):
        opened(tuned, adapter="ranking/ab/adapter")
    with pytest.raises(EngineError, match="tiny:1"):
        open_ranker(tuned, {"adapter": "ranking/ab/adapter"}, model="other", wording="w" * 64, shown="recent")


def test_scores_become_probabilities_and_what_was_not_scored_stays_so(tuned):
    scores = np.array([0.5, np.nan, 0.9])
    # 1 / (1 + e) and 1 / (1 + e / 81) by hand
    expected = [0.268941, np.nan, 0.967531]
    np.testing.assert_allclose(opened(tuned, adapter="ranking/ab/adapter").probabilities(scores), expected, atol=1e-5)
    np.testing.assert_array_equal(opened(tuned).probabilities(scores), scores)
