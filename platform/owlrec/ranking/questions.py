"""Writes what a run of the ranker asks: the shots that it is tuned on, and the valid and test rows that judge it."""

from collections.abc import Callable

import numpy as np
import pyarrow.compute as pc

from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.items import ItemVectors
from owlrec.ranking.samples import ask_about, draw_samples, read_users
from owlrec.scenario import Scenario
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace


def write_questions(
    workspace: Workspace,
    folder: str,
    config: RankingConfig,
    scenario: Scenario,
    vectors: ItemVectors,
    count_tokens: Callable[[str], int],
) -> dict[str, int]:
    """Writes train, valid and test.parquet (samples.TUNING_ROWS) into `folder`, from the workspace's tables.

    Valid rows are asked in the ways that are judged and in those that are tuned on, which tell when to stop. Only the
    drawn samples, their users and their items' vectors are read whole. Returns the counts of all three, by split.
    Raises RecipeError as `draw_samples` and SchemaError as `ask_about` does.
    """
    catalog, data, judging = ItemCatalog.load(workspace), config.data, config.judging
    valid_ways = tuple(dict.fromkeys((*judging.shown, *data.shown)))
    draws = {
        "train": (data.shots, data.seed, data.shown),
        "valid": (judging.valid_samples, judging.seed, valid_ways),
        "test": (judging.test_samples, judging.seed, judging.shown),
    }
    counts: dict[str, int] = {}
    for split, (limit, seed, ways) in draws.items():
        samples = draw_samples(workspace, split, limit, seed, catalog.ids, exactly=split == "train")
        items = np.concatenate([pc.list_flatten(samples[name]).to_numpy() for name in ("candidates", "history")])
        asked = ask_about(
            samples,
            read_users(workspace, samples["user_id"].to_numpy()),
            catalog,
            vectors.retriever(items),
            scenario,
            config.prompt,
            count_tokens,
            k=data.behaviours,
            ways=ways,
        )
        workspace.write_parquet(f"{folder}/{split}.parquet", asked.rows)
        counts |= {f"{split}_{name}": count for name, count in asked.counts.items()}
    return counts
