"""What the LLM ranker reads of a user who comes by id is what a sample of this moment would have held."""

import numpy as np
import pyarrow as pa
import pytest
from served_world import served_behaviors

from owlrec.schema import INTERACTIONS
from owlrec.serving.guard import Problem
from owlrec.serving.questions import Recent, recent_of
from owlrec.serving.served import ServedReleases, WorkspaceReleases
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import SplitConfig
from owlrec.workspace import Workspace, write_tombstones


def recent(workspace: Workspace, split: SplitConfig) -> Recent:
    """Of a release that was published from a small log."""
    log = pa.table(
        {
            "user_id": [1] * 6 + [2],
            "item_id": [10, 11, 12, 13, 14, 15, 10],
            "timestamp": [1, 2, 3, 4, 5, 6, 1],
            "label": [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
        }
    )
    table = with_outcomes(log, Labels(rule="column", rating_above=3), "log").select(INTERACTIONS.names)
    return recent_of(served_behaviors(workspace, table, split))


def test_of_a_forgotten_user_nothing_is_told(workspace: Workspace) -> None:
    recent(workspace, SplitConfig())
    write_tombstones(workspace, np.array([1]))
    served = ServedReleases(WorkspaceReleases(workspace))
    assert served.refresh()
    assert recent_of(served)(1) == []


def test_the_latest_that_were_taken_come_last(workspace: Workspace) -> None:
    recent_of_user = recent(workspace, SplitConfig(history_length=4))
    assert recent_of_user(1) == [(13, None), (15, None)]  # of the last four two were passed over
    assert recent_of_user(2) == []
    assert recent_of_user(3) == []


def test_what_was_passed_over_takes_no_place_where_the_split_leaves_it_out(workspace: Workspace) -> None:
    recent_of_user = recent(workspace, SplitConfig(history_length=3, passed_over=False))
    assert recent_of_user(1) == [(11, None), (13, None), (15, None)]


def test_nothing_is_told_before_a_release_is_there(workspace: Workspace) -> None:
    with pytest.raises(Problem):
        recent_of(ServedReleases(WorkspaceReleases(workspace)))(1)
