"""A refresh reaches `/v1/rank` of a running server: the benchmark's own flow, on a small MovieLens."""

from pathlib import Path

import pytest

from benchmarks.serving_rank import prepare_live, refresh_while_serving

pytestmark = [pytest.mark.e2e, pytest.mark.ray]


def test_refreshed_users_and_new_items_change_the_scores_of_a_running_server(tmp_path: Path) -> None:
    recipe, workspace, artifact = prepare_live(tmp_path, {"type": "movielens-100k", "max_users": 60, "max_items": 120})
    # Other lanes of the suite want the cores too: a refresh of the lowest priority would wait for them.
    followed = refresh_while_serving(recipe, workspace, artifact, users=10, rate=10, seconds=15, nice=0)
    assert max(followed.changed_after_s) < 5
    assert followed.largest_difference < 1e-5
    assert followed.new_item_scores == followed.new_items == 5
    assert followed.load.statuses == {"200": followed.load.asked}
