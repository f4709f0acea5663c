"""Which pairs of user and item an LLM is asked about, for CTR models to learn from: train samples, and items that their
users never met, at the moments of train samples.

A pair without a label takes the moment of a train sample of its user, and with it that sample's split and history:
nothing is asked, or learned, about a moment of valid or test; nor, in a split by item, about the items of these. All
draws are hashes of a row's own keys, so a pair stays whatever else is prepared with it.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from owlrec.ctr.distillation import DistillationConfig
from owlrec.ranking.samples import in_hash_order
from owlrec.schema import SAMPLE_ROWS, SAMPLES
from owlrec.sources.outcomes import POSITIVE, Labels, drawn_negatives
from owlrec.sources.splits import SplitConfig, id_values, in_histories, with_histories
from owlrec.workspace import Workspace

_KEY = ["user_id", "item_id", "timestamp"]
_HISTORY = ["history_start", "history_end"]


def asked_pairs(
    workspace: Workspace, number: int, config: DistillationConfig, split: SplitConfig, catalog: np.ndarray
) -> pa.Table:
    """The pairs of a shard of users (schema.SAMPLES, every label 0), by user, timestamp and item.

    split: by which `prepare` split; catalog: all item ids, ascending. Raises WorkspaceError where it has not run.
    """
    samples = workspace.read_shard("samples", number, SAMPLE_ROWS.names).to_pandas()
    train = samples[samples["split"] == "train"].drop_duplicates(_KEY)
    if split.method == "item":  # values divide the items: up to one of train, all are of train
        of_train = train["item_id"].to_numpy()[train["label"].to_numpy() >= POSITIVE]
        catalog = catalog[id_values(catalog, split) <= id_values(of_train, split).max(initial=-1)]
    train = train[[*_KEY, *_HISTORY]]
    met = workspace.read_shard("interactions", number, ["user_id", "item_id"]).to_pandas()
    met = pd.concat([met, samples[["user_id", "item_id"]]]).drop_duplicates()
    pairs = pd.concat([_first(train, config), _unlabeled(train, met, config, catalog)])
    pairs = pairs.sort_values(["user_id", "timestamp", "item_id"]).assign(label=0.0, split="train", weight=1.0)
    rows = pa.Table.from_pandas(pairs[SAMPLE_ROWS.names], schema=SAMPLE_ROWS, preserve_index=False)
    return with_histories(rows, in_histories(workspace, number, ["item_id", "rating", "label"])).select(SAMPLES.names)


def _first(train: pd.DataFrame, config: DistillationConfig) -> pd.DataFrame:
    """At most `labeled` samples of each user."""
    if config.labeled is None:
        return train
    order = in_hash_order([train[name].to_numpy() for name in _KEY], config.seed)
    return train.iloc[order].groupby("user_id").head(config.labeled)


def _unlabeled(train: pd.DataFrame, met: pd.DataFrame, config: DistillationConfig, catalog: np.ndarray) -> pd.DataFrame:
    """At most `unlabeled` pairs of each user of `train`, spread evenly over the moments of their samples.

    met: user_id and item_id of all that users took, passed over, or have a sample of in any split, each once.
    """
    moments = train.drop_duplicates(["user_id", "timestamp"])
    keys = [moments[name].to_numpy() for name in ("user_id", "timestamp")]
    moments = moments.iloc[in_hash_order(keys, config.seed)].sort_values("user_id", kind="stable")
    users, start, n = np.unique(moments["user_id"].to_numpy(), return_index=True, return_counts=True)
    draw = np.tile(np.arange(config.unlabeled), len(users))
    of_user = np.repeat(np.arange(len(users)), config.unlabeled)
    drawn = moments.iloc[(start[of_user] + draw % n[of_user]).astype(np.int64)]
    labels = Labels(
        rule="positives_only", rating_above=0, negatives=1, negatives_by=config.unlabeled_by, seed=config.seed
    )
    items = drawn_negatives(
        drawn["user_id"].to_numpy(),
        drawn["timestamp"].to_numpy(),
        draw // n[of_user],  # in place of a positive's item: two draws at one moment differ
        labels,
        took=(met["user_id"].to_numpy(), met["item_id"].to_numpy()),
        catalog=catalog,
    )[:, 0]
    drawn = drawn.assign(item_id=items)[items >= 0]
    return drawn.drop_duplicates(["user_id", "item_id"])
