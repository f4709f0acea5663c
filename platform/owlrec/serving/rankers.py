"""Which ranker is in force: an adapter or the model as it is, and the map that makes its scores probabilities.

`owlrec tune-ranker` fits a calibration for each way of asking and leaves it beside the adapter, where it is found
without being named. A score that it was not fitted for would come out wrong but plausible, so the way of asking is part
of the file's name.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from owlrec.config import Config
from owlrec.ranking.adapters import open_adapter
from owlrec.ranking.calibration import IsotonicScaling, PlattScaling, load_calibration
from owlrec.workspace import Workspace

_log = logging.getLogger("owlrec.serving")


class RankerChoice(Config):
    """What is put in force; paths are relative to the workspace."""

    adapter: str | None = None  # a folder that `owlrec tune-ranker` wrote; None = the model as it is
    calibration: str | None = Field(None, min_length=1)  # a file; None = the adapter's own, where it has one


@dataclass(frozen=True)
class RankerInForce:
    """A checked choice."""

    adapter: str | None  # a local folder
    calibration: PlattScaling | IsotonicScaling | None

    def probabilities(self, scores: np.ndarray) -> list[float]:
        """Scores of Yes as probabilities, calibrated where there is a calibration. scores: [n]; nan stays nan."""
        if self.calibration is None:
            return [float(score) for score in scores]
        known = ~np.isnan(scores)
        found = np.full(len(scores), np.nan)
        found[known] = self.calibration.apply(scores[known])
        return found.tolist()


def open_ranker(
    workspace: Workspace, choice: Mapping[str, str | None], *, model: str, wording: str, shown: str
) -> RankerInForce:
    """Opens a RankerChoice. model, wording: that the adapter must be of (see open_adapter); shown: how behaviours are
    shown in questions.

    Raises WorkspaceError for what is missing or damaged, EngineError for an adapter of another model or wording.
    """
    asked = RankerChoice.model_validate(choice)
    adapter, file = None, asked.calibration
    if asked.adapter is not None:
        adapter = open_adapter(workspace, asked.adapter, model=model, wording=wording).folder
        beside = f"{asked.adapter.rstrip('/').rpartition('/')[0]}/calibration-tuned-{shown}.json"
        if file is None and workspace.exists(beside):
            file = beside
    calibration = load_calibration(workspace, file) if file else None
    _log.info("ranker: adapter %s, calibration %s", asked.adapter, file)
    return RankerInForce(adapter, calibration)
