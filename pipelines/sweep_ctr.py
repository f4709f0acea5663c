"""Learning rate and adaptor of the CTR models, chosen on valid by Ray Tune: `python -m pipelines.sweep_ctr --recipe R`.

Tries every combination of the values that its options name with each backbone of the recipe, its second arm (the first
is "none" as a rule) and its first seed. Only valid figures are reported: who chooses must not see the test split's.
"""

from dataclasses import asdict
from typing import Any

from owlrec.ctr.experiment import ENCODED, SPARSE_ABOVE_ROWS, CTRConfig, SweepGrid, Trial, grid_folder
from owlrec.ctr.knowledge import arm_parts, arm_sources, stored_sources
from owlrec.ctr.pca import reduce_once
from owlrec.ctr.training import GridJob, encode_once, load_data, stage_pool
from owlrec.ops.console import note, table
from owlrec.recipe import Recipe, load_recipe
from owlrec.shards import Card, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, open_workspace, plain_errors, recipe_parser
from pipelines.train_ctr import partitions_read, soft_labels, written_vectors


def run(recipe: Recipe, workspace: Workspace, grid: SweepGrid | None = None) -> Card:
    """Writes ctr/<fingerprint>/sweep.json, best first, and prints it."""
    config, arm = recipe.ctr, recipe.ctr.arms[1] if len(recipe.ctr.arms) > 1 else recipe.ctr.arms[0]
    prepared = needed_stage(workspace, "prepare", "no tables yet")
    encoded = needed_stage(workspace, "encode", "no vectors yet") if arm != "none" else None
    soft = soft_labels(recipe, workspace, prepared)
    made_from = (prepared.fingerprint, encoded and encoded.fingerprint, soft and soft.fingerprint)
    candidates = (grid or SweepGrid()).candidates(adaptor=arm != "none" and arm_parts(arm)[1] != "codes")
    settings = (config, SPARSE_ABOVE_ROWS, candidates)
    named = fingerprint(*made_from, *settings, arm, *partitions_read(recipe, workspace), "sweep")
    folders = written_vectors(recipe, workspace, encoded)
    sources = arm_sources(arm, folders)
    trials = [Trial(backbone=backbone, arm=arm, seed=config.seeds[0]) for backbone in config.backbones]
    path = f"{grid_folder(named)}/sweep.json"

    def body() -> tuple[Counts, Outputs]:
        with ray_session(recipe.ray, workspace.log_path("ray")):
            pool = stage_pool(workspace, int(prepared.counts["samples"]))
            read = reduce_once(workspace, folders, config.knowledge_dim, named, pool)
            job = GridJob(
                settings=config,
                trials=tuple(trials),
                knowledge={source: dict(read[source]) for source in stored_sources(sources)},
                fingerprint=named,
                attributes=recipe.domain.text_fields,
                profile=recipe.domain.profile_fields if config.use_profile else (),
                soft_labels=soft.outputs["soft_labels"] if soft else None,
            )
            encode_once(workspace, job, pool)
            found = tried(workspace, job, candidates)
        workspace.write_json(path, found)
        for folder in (ENCODED, "vectors"):
            workspace.delete_dir(grid_folder(named), folder)
        rows = [(f["backbone"], f["valid_auc"], f["epochs"], str(f["changes"])) for f in found]
        table(f"sweep, arm {arm}", ["backbone", "valid AUC", "epochs", "settings"], rows)
        note(f"best: {found[0]['backbone']} with {found[0]['changes']}; put its settings below `ctr:` in the recipe")
        return {"candidates": len(found), "best_valid_auc": found[0]["valid_auc"]}, {"sweep": path}

    return execute(workspace, "sweep_ctr", named, f"{len(candidates)} settings, {len(trials)} backbones", body)


def tried(workspace: Workspace, job: GridJob, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains each backbone of the job with each candidate; best valid AUC first. Ray must be initialised."""
    from ray import tune

    plain = [{"backbone": trial.backbone, "changes": changes} for changes in candidates for trial in job.trials]
    cpus = {"cpu": job.threads or 1, "gpu": int(job.settings.use_gpu)}
    name = f"sweep-{job.fingerprint[:8]}"
    workspace.delete_dir("ctr", "ray", name)  # of an interrupted sweep
    trainable = tune.with_parameters(_try, workspace=workspace, job=job.model_dump(mode="json"))
    filesystem, path = workspace.arrow("ctr/ray")
    results = tune.Tuner(
        tune.with_resources(trainable, cpus),
        param_space={"candidate": tune.grid_search(plain)},
        run_config=tune.RunConfig(storage_path=path, storage_filesystem=filesystem, name=name, verbose=0),
    ).fit()
    for error in results.errors:
        raise error
    workspace.delete_dir("ctr", "ray", name)
    found = [
        {**r.config["candidate"], "valid_auc": r.metrics["valid_auc"], "epochs": r.metrics["epochs"]} for r in results
    ]
    return sorted(found, key=lambda f: -f["valid_auc"])


def _try(candidate: dict[str, Any], workspace: Workspace, job: dict[str, Any]) -> None:
    from ray import tune

    from owlrec.ctr.trainer import train_one

    tried_, parsed = candidate["candidate"], GridJob.model_validate(job)
    settings = CTRConfig.model_validate({**parsed.settings.model_dump(), **tried_["changes"]})
    trial = next(t for t in parsed.trials if t.backbone == tried_["backbone"])
    result = train_one(trial, load_data(workspace, parsed), settings).result
    tune.report({"valid_auc": result.valid.auc, "epochs": result.epochs})


def main() -> None:
    """The command line."""
    parser = recipe_parser("pipelines.sweep_ctr", __doc__ or "")
    defaults = asdict(SweepGrid())
    for name, values in defaults.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(values[0]), nargs="+", default=values, help="default: %(default)s")
    options = parser.parse_args()
    with plain_errors():
        recipe = load_recipe(options.recipe, workspace=options.workspace, max_replicas=options.max_replicas)
        grid = SweepGrid(**{name: tuple(getattr(options, name)) for name in defaults})
        run(recipe, open_workspace(recipe), grid)


if __name__ == "__main__":
    main()
