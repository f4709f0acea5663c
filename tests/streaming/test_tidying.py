"""Long chains are merged, short ones left alone; readers see no difference."""

import numpy as np
import pytest
from streaming_world import DAY, START, carry_out, log_events, plan_refresh, watched  # type: ignore[import-not-found]

from owlrec.errors import ReleaseError
from owlrec.releases import open_release
from owlrec.releases.manifest import chain
from owlrec.releases.release import current_release
from owlrec.streaming import tidying
from owlrec.streaming.tidying import TidyConfig, tidy
from owlrec.workspace import Workspace

IDS = np.arange(1, 41)


def refresh(world: Workspace, times: int) -> None:
    """A delta each: user n watches eight films."""
    for n in range(1, times + 1):
        log_events(world, watched(n, range(115, 123), START + n * DAY), name=f"day-{n}")
        carry_out(world, plan_refresh(world))


def depth(world: Workspace) -> int:
    current = current_release(world)
    assert current is not None
    return len(chain(world, current)) - 1


def texts(world: Workspace) -> list[str]:
    with open_release(world) as release:
        return [k.text if k else "" for k in release.store.get("user", IDS)]


def test_a_chain_is_merged_once_it_is_long_enough(world: Workspace) -> None:
    refresh(world, 3)
    before = texts(world)
    assert depth(world) == 3
    assert tidy(world, TidyConfig(compact_after=4)) == ""
    assert tidy(world, TidyConfig(compact_after=None)) == ""
    assert "deltas merged into release" in tidy(world, TidyConfig(compact_after=3))
    assert depth(world) == 0
    assert texts(world) == before
    assert sum("Renewed" in text for text in before) == 3


def test_refreshes_go_on_after_a_merge(world: Workspace) -> None:
    refresh(world, 2)
    tidy(world, TidyConfig(compact_after=1))
    log_events(world, watched(9, range(115, 123), START + 9 * DAY), name="day-9")
    carry_out(world, plan_refresh(world))
    assert depth(world) == 1
    assert sum("Renewed" in text for text in texts(world)) == 3


def test_what_cannot_be_tidied_is_said_and_stops_nothing(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    refresh(world, 1)

    def overtaken(*_: object) -> None:
        raise ReleaseError("release x became current while y was being compacted.")

    monkeypatch.setattr(tidying, "compact", overtaken)
    assert tidy(world, TidyConfig(compact_after=1)).startswith("not tidied: release x became current")
