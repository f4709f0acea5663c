"""What `make demo` finds and how long it takes: the same command on a workspace of its own that is empty."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pipelines
from benchmarks.arms import arm_figure
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.experiment import finished_trials, summarize, trials
from owlrec.ops.report import REPORTED_STAGES
from owlrec.recipe import Recipe, load_recipe
from owlrec.releases.format import measure_lookup
from owlrec.releases.release import open_release
from owlrec.shards import finished_stage
from owlrec.workspace import Workspace

RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-demo.yaml"


def main() -> None:
    """Runs the demo's recipe, then reads what it left."""
    options = options_parser(__doc__).parse_args()
    recipe = load_recipe(RECIPE)
    source = {"max_users": 60, "max_items": 60} if options.quick else {}
    with tempfile.TemporaryDirectory(prefix="owlrec-demo-") as folder:
        values = recipe.model_dump(mode="json") | {"workspace": folder}
        recipe = Recipe.model_validate(values | {"source": values["source"] | source})
        written = Path(folder) / "recipe.yaml"
        written.write_text(recipe.model_dump_json())  # JSON is YAML
        start = time.monotonic()
        subprocess.run([Path(sys.executable).with_name("owlrec"), "run", written], check=True)
        seconds = time.monotonic() - start
        figures = [Figure(measure="whole run", method="all stages", value=seconds, unit="s")]
        figures += read(recipe, Workspace(folder))
    show("the demo", figures, options)


def read(recipe: Recipe, workspace: Workspace) -> list[Figure]:
    """Seconds of each stage, rows, a lookup, and the table of arms."""
    stages = {stage: manifest for stage in REPORTED_STAGES if (manifest := finished_stage(workspace, stage))}
    figures = [Figure(measure="stage", method=name, value=stage.seconds, unit="s") for name, stage in stages.items()]
    for what in ("users", "items", "samples_train"):
        figures.append(Figure(measure="rows", method=what, value=stages["prepare"].counts[what], unit=""))
    with open_release(workspace, verify=False) as release:
        latencies = measure_lookup(release.store, "user", workspace.read_table("users")["user_id"].to_numpy())
    for what in ("knowledge", "vector"):
        figures.append(Figure(measure="lookup", method=what, value=latencies[f"{what}_p50_us"], unit="µs, p50"))
    results = finished_trials(workspace, stages["train_ctr"].outputs["grid"], trials(recipe.ctr))
    return figures + [arm_figure(row) for row in summarize(results)]


if __name__ == "__main__":
    main()
