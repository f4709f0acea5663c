"""Parts of a split by how much the model can know of the row's user or item: that is where an LLM's knowledge should
pay, and an average over all rows hides it.

Only training data and the row's own history define a slice, nothing that the test split alone tells. A history is
seen cut to the longest one in training (`features.build_features`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

from owlrec.ctr.features import RESERVED
from owlrec.ctr.metrics import auc, log_loss

COLD_USER_BELOW = 5  # behaviours in the row's history
COLD_ITEM_BELOW = 5  # occurrences in the training samples, as target or in a history
_HISTORY_FROM = (0, 1, 3, 6, 11, 21, 51)  # each bucket's least length; the last one is open


class SliceMetrics(BaseModel):
    """Of a part of a split. auc is None where the part has one class only."""

    rows: int
    auc: float | None
    log_loss: float


def slices_of(items: np.ndarray, lengths: np.ndarray, item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> bool [n]: which rows of a split are of cold or warm users, of cold or warm items, and of each history
    length. Slices without a row are left out.

    items: int [n], row numbers of ItemFeatures, and lengths: int [n], of histories as they are read, of each row;
    item_counts: features.Features.item_counts. An item that the items table lacks is cold, however often it occurs.
    """
    cold_user = lengths < COLD_USER_BELOW
    cold_item = (item_counts[items] < COLD_ITEM_BELOW) | (items < RESERVED)
    found = {
        "cold users": cold_user,
        "warm users": ~cold_user,
        "cold items": cold_item,
        "warm items": ~cold_item,
    }
    bucket = np.searchsorted(_HISTORY_FROM, lengths, side="right") - 1
    for number, start in enumerate(_HISTORY_FROM):
        found[_history_name(number, start)] = bucket == number
    return {name: rows for name, rows in found.items() if rows.any()}


def slice_metrics(labels: np.ndarray, scores: np.ndarray, slices: Mapping[str, np.ndarray]) -> dict[str, SliceMetrics]:
    """The metrics of each slice's rows; slices as `slices_of` returns them."""
    found = {}
    for name, rows in slices.items():
        area = auc(labels[rows], scores[rows])
        found[name] = SliceMetrics(
            rows=int(rows.sum()),
            auc=None if np.isnan(area) else area,
            log_loss=log_loss(labels[rows], scores[rows]),
        )
    return found


def mean_slices(seeds: Sequence[Mapping[str, SliceMetrics]]) -> dict[str, SliceMetrics]:
    """The mean over trials that scored the same rows; an auc that is None in one of them is None in all."""
    by_name: dict[str, list[SliceMetrics]] = {}
    for slices in seeds:
        for name, of_seed in slices.items():
            by_name.setdefault(name, []).append(of_seed)
    found = {}
    for name, each in by_name.items():
        aucs = [m.auc for m in each if m.auc is not None]
        found[name] = SliceMetrics(
            rows=each[0].rows,
            auc=float(np.mean(aucs)) if aucs else None,
            log_loss=float(np.mean([m.log_loss for m in each])),
        )
    return found


def _history_name(number: int, start: int) -> str:
    if number + 1 == len(_HISTORY_FROM):
        return f"history {start}+"
    end = _HISTORY_FROM[number + 1] - 1
    return f"history {start}" if start == end else f"history {start}-{end}"
