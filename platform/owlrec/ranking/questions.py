"""Writes what a run of the ranker asks: the shots that it is tuned on, and the valid and test rows that judge it."""

from collections.abc import Callable

import pyarrow as pa

from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.retrieval import BehaviourRetriever
from owlrec.ranking.samples import ask_about, build_tuning_data, draw_shots
from owlrec.scenario import Scenario
from owlrec.schema import SAMPLES, conform
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace


def write_questions(
    workspace: Workspace,
    folder: str,
    config: RankingConfig,
    scenario: Scenario,
    retriever: BehaviourRetriever,
    count_tokens: Callable[[str], int],
) -> dict[str, int]:
    """Writes train, valid and test.parquet (samples.TUNING_ROWS) into `folder`, from the workspace's tables.

    Valid rows are asked in the ways that are judged and in those that are tuned on, which tell when to stop. Returns
    the counts of all three, by split. Raises RecipeError and SchemaError as `build_tuning_data` does.
    """
    users, catalog = workspace.read_table("users"), ItemCatalog.load(workspace)
    samples = conform(workspace.read_table("samples"), SAMPLES, name="samples").select(SAMPLES.names)
    data, judging = config.data, config.judging
    built = {
        "train": build_tuning_data(samples, users, catalog, retriever, scenario, data, config.prompt, count_tokens)
    }
    ways = {"valid": (*judging.shown, *data.shown), "test": judging.shown}
    for split, limit in (("valid", judging.valid_samples), ("test", judging.test_samples)):
        drawn = draw_shots(samples, None, judging.seed, split)[:limit]
        built[split] = ask_about(
            samples.take(pa.array(drawn)),
            users,
            catalog,
            retriever,
            scenario,
            config.prompt,
            count_tokens,
            k=data.behaviours,
            ways=tuple(dict.fromkeys(ways[split])),
        )
    for split, asked in built.items():
        workspace.write_parquet(f"{folder}/{split}.parquet", asked.rows)
    return {f"{split}_{name}": count for split, asked in built.items() for name, count in asked.counts.items()}
