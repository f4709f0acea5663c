"""What the LLM ranker reads of a user who comes by id is what a sample of this moment would have held."""

import pyarrow as pa

from owlrec.schema import INTERACTIONS
from owlrec.serving.tables import WorkspaceTables
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import SplitConfig, for_histories
from owlrec.workspace import Workspace


def write(workspace: Workspace, split: SplitConfig) -> WorkspaceTables:
    log = pa.table(
        {
            "user_id": [1] * 6 + [2],
            "item_id": [10, 11, 12, 13, 14, 15, 10],
            "timestamp": [1, 2, 3, 4, 5, 6, 1],
            "label": [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
        }
    )
    table = with_outcomes(log, Labels(rule="column", rating_above=3), "log").select(INTERACTIONS.names)
    workspace.write_table("interactions", for_histories(table, split), key="user_id", n_shards=1)
    return WorkspaceTables(workspace)


def test_the_latest_that_were_taken_come_last(workspace: Workspace) -> None:
    tables = write(workspace, SplitConfig())
    assert tables.recent(1, 4) == [(13, None), (15, None)]  # of the last four two were passed over
    assert tables.recent(2, 4) == []
    assert tables.recent(3, 4) == []


def test_what_was_passed_over_takes_no_place_where_the_split_leaves_it_out(workspace: Workspace) -> None:
    tables = write(workspace, SplitConfig(passed_over=False))
    assert tables.recent(1, 3) == [(11, None), (13, None), (15, None)]


def test_nothing_is_known_before_prepare(workspace: Workspace) -> None:
    assert WorkspaceTables(workspace).recent(1, 4) == []
