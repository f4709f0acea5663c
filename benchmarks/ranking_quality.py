"""How well the LLM ranker ranks: test AUC by shots, by how many behaviours it is shown and which, beside CTR models.

MovieLens-100K, the recipe `movielens-100k-ranker`, SmolLM2-135M; the `tune_ranker` stage with other settings each time,
so that a run that was interrupted goes on where it stood. `shots`: tuned on few samples, beside DIN and DCN-V2 trained
on the very same ones. `lengths`: K behaviours, recent, retrieved or mixed, as the model is and tuned. `mixture`: tuned
on recent or retrieved prompts alone, or on both. Differences are paired by row, with 95 % intervals by users drawn
anew. All of it takes half a day on two cores; --quick shows one column.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import pipelines
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr import metrics
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import build_features
from owlrec.ctr.fitting import TrainingData, train_one
from owlrec.ctr.intervals import bootstrap_aucs, percentile_interval
from owlrec.prompting.rella import YES
from owlrec.ranking.samples import draw_shots
from owlrec.recipe import Recipe, load_recipe
from owlrec.workspace import Workspace, fingerprint, finished_stage
from pipelines.prepare import run as prepare
from pipelines.tune_ranker import run as tune_ranker

RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-100k-ranker.yaml"
PARTS = ("shots", "lengths", "mixture")
BACKBONES = ("din", "dcnv2")
_QUICK: dict[str, Any] = {
    "data": {"shots": 16, "behaviours": 5, "shown": ["recent"]},
    "tuning": {"epochs": 1},
    "judging": {"valid_samples": 24, "test_samples": 40},
}


def main() -> None:
    """Runs what is not in the workspace yet, and prints all of it."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shots", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--behaviours", type=int, nargs="+", default=[5, 10, 15, 20, 30])
    parser.add_argument("--length-shots", type=int, default=256, help="that the models of `lengths` are tuned on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--test-samples", type=int, default=1000)
    options = parser.parse_args()
    recipe = load_recipe(RECIPE)
    workspace = Workspace(recipe.workspace)
    if finished_stage(workspace, "prepare") is None:
        prepare(recipe, workspace)
    figures: list[Figure] = []
    if options.quick:
        found = tuned(recipe, workspace, options, 0, shown=["recent"], zero_shot=False, **_QUICK)
        figures = _of_run(found, "16 shots, K = 5")
        show("LLM ranker, test AUC", figures, options)
        return
    if "shots" in options.only:
        figures += by_shots(recipe, workspace, options)
    if "lengths" in options.only:
        figures += by_lengths(recipe, workspace, options)
    if "mixture" in options.only:
        figures += by_mixture(recipe, workspace, options)
    show("LLM ranker, test AUC", figures, options)


def by_shots(recipe: Recipe, workspace: Workspace, options: Any) -> list[Figure]:
    """Zero-shot and tuned, and CTR models on the same samples."""
    figures: list[Figure] = []
    for shots in options.shots:
        for seed in options.seeds:
            first = (shots, seed) == (options.shots[0], options.seeds[0])
            rows = tuned(recipe, workspace, options, seed, shown=["retrieved"], zero_shot=first, data={"shots": shots})
            figures += _of_run(rows, f"{shots} shots, seed {seed}")
            for name, auc in ctr_aucs(workspace, recipe, shots, seed, options.test_samples).items():
                figures.append(Figure(measure=f"{shots} shots, seed {seed}", method=name, value=auc, unit="AUC"))
    return figures


def by_lengths(recipe: Recipe, workspace: Workspace, options: Any) -> list[Figure]:
    """Each K with its own adapter."""
    figures: list[Figure] = []
    for k in options.behaviours:
        data = {"shots": options.length_shots, "behaviours": k}
        ways = ["recent", "retrieved", "mixed"]
        rows = tuned(recipe, workspace, options, options.seeds[0], shown=ways, data=data)
        figures += _of_run(rows, f"K = {k}, {options.length_shots} shots")
        for model in ("zero-shot", "tuned"):
            for way in ways[1:]:
                pair = [_of(rows[model], of) for of in (way, "recent")]
                figures.append(_difference(f"K = {k}", f"{model}: {way} - recent", *pair))
    return figures


def by_mixture(recipe: Recipe, workspace: Workspace, options: Any) -> list[Figure]:
    """As many samples, asked in one way or in both; judged on retrieved behaviours, as ReLLa does."""
    figures: list[Figure] = []
    for seed in options.seeds:
        found = {}
        for name in (["recent", "retrieved"], ["recent"], ["retrieved"]):
            data = {"shots": options.length_shots, "shown": name}
            rows = tuned(recipe, workspace, options, seed, shown=["retrieved"], zero_shot=False, data=data)
            found[" + ".join(name)] = _of(rows["tuned"], "retrieved")
        (_, both), *single = found.items()
        measure = f"tuned on both ways, seed {seed}"
        for name, one in single:
            figures.append(_difference(measure, f"mixture - {name} alone", both, one))
    return figures


def tuned(
    recipe: Recipe,
    workspace: Workspace,
    options: Any,
    seed: int,
    *,
    shown: list[str],
    zero_shot: bool = True,
    **changes: dict[str, Any],
) -> dict[str, pa.Table]:
    """The test rows with their scores, of each model; kept in the workspace, so that nothing is scored twice."""
    values = recipe.model_dump(mode="json")
    usual: dict[str, dict[str, Any]] = {
        "judging": {"shown": shown, "zero_shot": zero_shot, "test_samples": options.test_samples},
        "data": {"seed": seed},
        "tuning": {"seed": seed},
    }
    for section in usual:
        values["ranking"][section] |= {**usual[section], **changes.get(section, {})}
    kept = f"ranking/benchmark-{fingerprint(values)[:16]}"
    models = ["zero-shot", "tuned"] if zero_shot else ["tuned"]
    if not workspace.exists(kept, f"{models[-1]}.parquet"):
        manifest = tune_ranker(Recipe.model_validate(values), workspace)
        folder = manifest.outputs["judgements"].rpartition("/")[0]
        for model in models:
            workspace.write_parquet(
                f"{kept}/{model}.parquet", workspace.read_parquet(f"{folder}/scores-{model}.parquet")
            )
    return {model: workspace.read_parquet(f"{kept}/{model}.parquet") for model in models}


def ctr_aucs(workspace: Workspace, recipe: Recipe, shots: int, seed: int, test_samples: int) -> dict[str, float]:
    """Test AUCs of CTR models on the shots, valid and test samples that the ranker has."""
    samples = workspace.read_table("samples")
    assert recipe.ranking is not None
    limits = {"train": shots, "valid": recipe.ranking.judging.valid_samples, "test": test_samples}
    judged = recipe.ranking.judging.seed
    rows = [
        draw_shots(samples, None, seed if split == "train" else judged, split)[:limit]
        for split, limit in limits.items()
    ]
    items = workspace.read_table("items")
    features = build_features(
        workspace.read_table("users"),
        items,
        samples.take(pa.array(np.concatenate(rows))),
        attributes=[name for name in recipe.domain.text_fields if name in items.column_names],
        profile=recipe.domain.profile_fields,
        min_item_count=2,
    )
    config = CTRConfig(batch_size=64, epochs=60, patience=5, use_profile=True)
    found = {}
    for backbone in BACKBONES:
        trial = Trial(backbone=backbone, arm="none", seed=seed)
        found[backbone] = train_one(trial, TrainingData(features, {}), config).result.test.auc
    return found


def _of_run(rows: dict[str, pa.Table], measure: str) -> list[Figure]:
    figures = []
    for model, table in rows.items():
        for way in dict.fromkeys(table["shown"].to_pylist()):
            users, labels, scores = _of(table, way)
            interval = percentile_interval(bootstrap_aucs(labels, [scores], users)[:, 0])
            unit = f"AUC [{interval.low:.4f}, {interval.high:.4f}]"
            method = f"{model}, {way}"
            figures.append(Figure(measure=measure, method=method, value=metrics.auc(labels, scores), unit=unit))
    return figures


def _of(table: pa.Table, way: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, labels and scores of the rows asked in one way."""
    table = table.filter(pc.and_(pc.equal(table["shown"], way), pc.is_finite(table["score"])))
    labels = np.array([answer == YES for answer in table["answer"].to_pylist()], dtype=np.float64)
    return table["user_id"].to_numpy(), labels, table["score"].to_numpy()


def _difference(measure: str, method: str, ours: Any, base: Any) -> Figure:
    (users, labels, scores), (_, _, others) = ours, base
    columns = bootstrap_aucs(labels, [scores, others], users).T
    interval = percentile_interval(columns[0] - columns[1])
    value = metrics.auc(labels, scores) - metrics.auc(labels, others)
    return Figure(measure=measure, method=method, value=value, unit=f"AUC [{interval.low:+.4f}, {interval.high:+.4f}]")


if __name__ == "__main__":
    main()
