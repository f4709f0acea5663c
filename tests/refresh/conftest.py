"""The small world of refresh_world.py, published."""

import pytest
from refresh_world import WordEncoder, publish_world, write_interactions  # type: ignore[import-not-found]

from owlrec.encoding import vectors
from owlrec.workspace import Workspace


@pytest.fixture
def world(small_world: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace after a whole run, before any refresh; deltas are encoded without a model."""
    monkeypatch.setattr(vectors, "Encoder", WordEncoder)
    write_interactions(small_world)
    publish_world(small_world)
    return small_world
