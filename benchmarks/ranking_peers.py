"""CTR models on exactly the samples that an LLM ranker was tuned, stopped and judged on."""

import numpy as np
import pyarrow as pa

from benchmarks.samples import all_samples
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import Features, build_features
from owlrec.ctr.trainer import Trained, TrainingData, train_one
from owlrec.ranking.question_sets import RankerResult, write_results
from owlrec.ranking.samples import RankerRun, RankingConfig, draw_shots
from owlrec.scenario import Scenario
from owlrec.workspace import Workspace

BACKBONES = ("din", "dcnv2")


def ctr_results(workspace: Workspace, scenario: Scenario, ranking: RankingConfig, run: RankerRun) -> list[RankerResult]:
    """Each model's, stopped on valid; the report shows them beside the ranker's."""
    samples, shots, seed = all_samples(workspace), ranking.data.shots, run.seed
    limits = {"train": shots, "valid": run.valid_samples, "test": run.test_samples}
    seeds = {"train": seed, "valid": run.evaluation_seed, "test": run.evaluation_seed}
    rows = [draw_shots(samples, None, seeds[split], split)[:limit] for split, limit in limits.items()]
    features = features_of(workspace, scenario, samples.take(pa.array(np.concatenate(rows))))
    few = CTRConfig(batch_size=64, epochs=60, patience=5)
    results = []
    for name in BACKBONES:
        auc = train(name, features, few, seed).result.test.auc
        results.append(RankerResult(model=name, shots=shots, behaviors=None, shown="", seed=seed, auc=auc))
    write_results(workspace, f"ctr-{shots}-{seed}", results)
    return results


def features_of(workspace: Workspace, scenario: Scenario, samples: pa.Table) -> Features:
    """Of samples of all three splits; vocabularies are those of their train rows."""
    users, items = (workspace.read_table(name) for name in ("users", "items"))
    return build_features(
        users,
        items,
        samples,
        features={
            "items": tuple(name for name in scenario.text_fields if name in items.column_names),
            "users": tuple(name for name in scenario.profile_fields if name in users.column_names),
        },
        min_item_count=2,
    )


def train(backbone: str, features: Features, config: CTRConfig, seed: int) -> Trained:
    """Without knowledge."""
    trial = Trial(backbone=backbone, arm="none", seed=seed)
    return train_one(trial, TrainingData(features, {}), config)
