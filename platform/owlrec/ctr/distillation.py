"""Distillation: a CTR model learns from an LLM's P(yes) beside the labels, also of pairs that have no label.

Of a pair with a label y and a probability p the loss is (1 - a) BCE(y) + a BCE(p), which is the BCE of the blended
label (1 - a) y + a p; of a pair without a label it is a BCE(p). So training needs no second loss: labels lie between 0
and 1, and samples have weights. `owlrec score-pairs` asks the LLM and writes the probabilities (ranking.soft_labels).

Leaks: only pairs at the moment of a train sample of the same user are learned from, so a pair without a label is in
that sample's split, earlier than the threshold of a split by time, and reads that sample's history. Valid and test keep
their labels and are never blended.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.schema import SOFT_LABELS
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

_KEY = ["user_id", "item_id", "timestamp"]
_MOMENT = ["user_id", "timestamp"]


class DistillationConfig(Config):
    """Which pairs the LLM is asked about, and how much its answers count."""

    alpha: float = Field(0.5, gt=0, le=1)  # the share of the LLM's probability in the loss; the label has the rest
    labeled: int | None = Field(None, ge=0)  # train samples of each user, at most; None = all
    unlabeled: int = Field(0, ge=0)  # pairs of each user with items that they never met, at most
    unlabeled_by: Literal["uniform", "popularity"] = "uniform"  # how these items are drawn
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _some_pairs(self) -> "DistillationConfig":
        if self.labeled == 0 and self.unlabeled == 0:
            raise ValueError("labeled and unlabeled are both 0, so the LLM would be asked nothing; raise one of them")
        return self

    @property
    def asks(self) -> dict[str, Any]:
        """The settings that decide which pairs the LLM is asked about."""
        return self.model_dump(mode="json", exclude={"alpha"})

    def made_for(self, tables: str) -> str:
        """Digest of the tables (their fingerprint) and of which of their pairs are asked about."""
        return fingerprint(tables, self.asks)


@dataclass(frozen=True)
class SoftLabels:
    """What `score-pairs` wrote, and how much it counts; picklable."""

    folder: str
    alpha: float

    def read(self, workspace: Workspace, number: int) -> pa.Table:
        """A shard's probabilities (schema.SOFT_LABELS).

        Raises WorkspaceError where the file is missing, SchemaError, naming file and row, for one outside [0, 1].
        """
        path = f"{self.folder}/user/{shard_file(number)}"
        table = workspace.read_parquet(path, SOFT_LABELS.names)
        p = table["p"].to_numpy()
        if (odd := ~((p >= 0) & (p <= 1))).any():
            raise SchemaError(
                f"{workspace.path(path)}, row {odd.argmax()}: p is {p[odd.argmax()]}, but it is a probability. Delete "
                "the file and run `score-pairs` again."
            )
        return table


def blended(samples: pa.Table, soft: pa.Table, alpha: float) -> pa.Table:
    """Samples as they are trained on: those of the train split with blended labels where `soft` has a probability, and
    after all of them the pairs without a label, each with the history of a train sample of its user and moment.

    samples: schema.SAMPLE_ROWS of a shard; soft: schema.SOFT_LABELS of the same users. A pair of a valid or test
    sample, and one at a moment without a train sample, is left out. A pair without a label weighs `alpha`, a sample
    what it weighed.
    """
    keys, probabilities = samples.select(_KEY).to_pandas(), soft.to_pandas().drop_duplicates(_KEY)
    p = keys.merge(probabilities, how="left", on=_KEY)["p"].to_numpy()
    train = (samples["split"].to_numpy() == "train") & ~np.isnan(p)
    label = samples["label"].to_numpy()
    label = np.where(train, (1 - alpha) * label + alpha * p, label).astype(np.float32)
    place = samples.column_names.index("label")
    samples = samples.set_column(place, "label", pa.array(label))

    known = keys.drop_duplicates().assign(known=True)
    of_none = probabilities.merge(known, how="left", on=_KEY)
    of_none = of_none[of_none["known"].isna()].drop(columns="known")
    moments = samples.select([*_MOMENT, "split", "history_start", "history_end"]).to_pandas()
    moments = moments[moments["split"] == "train"].drop_duplicates(_MOMENT)
    drawn = of_none.merge(moments, how="inner", on=_MOMENT)
    drawn = drawn.rename(columns={"p": "label"}).assign(weight=np.float32(alpha))
    added = pa.Table.from_pandas(drawn[samples.column_names], schema=samples.schema, preserve_index=False)
    return pa.concat_tables([samples, added])
