"""How well the LLM ranker ranks: test AUC by shots, by how many behaviors it is shown and which, beside CTR models.

MovieLens-100K, the recipe `movielens-100k-ranker`, SmolLM2-135M; the `tune_ranker` stage with other settings each time.
`shots`: tuned on few samples, beside DIN and DCN-V2 trained on the very same ones. `lengths`: K behaviors, recent,
retrieved or mixed, as the model is and tuned. `longer`: the ranker of the most shots, asked with more behaviors than
it was tuned on. `mixture`: tuned on recent or retrieved prompts alone, or on both. `sets`: behaviors retrieved once for
a set of candidates, or for each candidate, on as many shots.
`cascade`: DIN, trained on the whole train split, orders held-out lists, and the ranker of the most shots re-orders
their heads. Differences are paired by row, with 95 % intervals by resampling users.

What is done stays in the workspace, to the tuning step, so the same command goes on where it was interrupted. Before it
begins it says what is left to do and how long that should take here. --quick fills the same tables from a few samples:
it shows that all of it works, and its figures mean nothing.
"""

import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import pipelines
from benchmarks.ranking_cascade import cascade_figures
from benchmarks.ranking_peers import ctr_results
from benchmarks.ranking_scores import Scored, ask_ranker, auc_figure, scored
from benchmarks.table import Figure, options_parser, show
from owlrec.generation.engines import PACKAGED, resolve_model
from owlrec.ops.console import note
from owlrec.ranking.question_sets import Evaluation
from owlrec.ranking.samples import RankerRun, RankingConfig, Shown, TuningSettings, draw_samples
from owlrec.recipe import Recipe, load_recipe
from owlrec.runs.models import tune_ranker
from owlrec.runs.stages import prepare
from owlrec.shards import finished_stage
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-100k-ranker.yaml"
PARTS = ("shots", "lengths", "longer", "mixture", "sets", "cascade")
WAYS = ("recent", "retrieved", "mixed")
_FIXED_TOKENS, _BEHAVIOR_TOKENS = 115, 17.5  # of a prompt, about: without behaviors, and for each
_START_S = 60  # of Ray, an engine and their models, for each run
_QUICK = {
    "shots": [16],
    "behaviors": [5],
    "shown": 5,
    "length_shots": 16,
    "seeds": [0],
    "epochs": 1,
    "valid_samples": 24,
    "test_samples": 40,
    "lists": 4,
    "longer_rows": 40,
}


@dataclass(frozen=True)
class Run:
    """A ranker that is tuned, and how it is judged."""

    seed: int
    shots: int
    behaviors: int
    ways: tuple[Shown, ...]
    zero_shot: bool = False
    asked: tuple[str, ...] = ("recent", "retrieved")  # how its samples are asked while it is tuned
    retrieved_for: str = "set"


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    recipe: Recipe
    workspace: Workspace
    options: Namespace

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe with a run's settings."""
        o, values = self.options, self.recipe.model_dump(mode="json")
        changed: dict[str, dict[str, Any]] = {
            "data": {"shots": run.shots, "behaviors": run.behaviors, "shown": run.asked},
            "tuning": {"epochs": o.epochs},
        }
        for section, changes in changed.items():
            values["ranking"][section] |= changes
        values["ranking"]["retrieved_for"] = run.retrieved_for
        return Recipe.model_validate(values)

    def settings_of(self, run: Run) -> RankerRun:
        """What a run changes besides the recipe."""
        return RankerRun(
            tuning=TuningSettings(seed=run.seed, epochs=self.options.epochs),
            seed=run.seed,
            ways=run.ways,
            valid_samples=self.options.valid_samples,
            test_samples=self.options.test_samples,
            zero_shot=run.zero_shot,
        )

    def kept(self, run: Run) -> str:
        """Where a run's scored test rows stay."""
        return f"ranking/benchmark-{fingerprint(self.recipe_of(run), self.settings_of(run))[:16]}"

    def is_done(self, run: Run) -> bool:
        """Whether nothing of a run is left to do."""
        return self.workspace.exists(self.kept(run), "run.json")

    def tuned(self, run: Run) -> tuple[dict[str, pa.Table], str]:
        """The test rows with their scores, of each model, and the folder of the run's ranker."""
        kept, models = self.kept(run), ["zero-shot", "tuned"] if run.zero_shot else ["tuned"]
        if not self.is_done(run):
            card = tune_ranker(self.recipe_of(run), self.workspace, self.settings_of(run))
            folder = card.outputs["evaluations"].rpartition("/")[0]
            for model in models:
                rows = self.workspace.read_parquet(f"{folder}/scores-{model}.parquet")
                self.workspace.write_parquet(f"{kept}/{model}.parquet", rows)
            for to, name in (("calibration", f"calibration-tuned-{run.ways[0]}"), ("evaluations", "evaluations")):
                self.workspace.write_json(f"{kept}/{to}.json", self.workspace.read_json(f"{folder}/{name}.json"))
            self.workspace.write_json(f"{kept}/run.json", {"folder": folder})
        tables = {model: self.workspace.read_parquet(f"{kept}/{model}.parquet") for model in models}
        return tables, self.workspace.read_json(f"{kept}/run.json")["folder"]

    def figures(self, run: Run, measure: str) -> list[Figure]:
        """What a run's models were judged to be worth."""
        self.tuned(run)
        evaluations = map(Evaluation.model_validate, self.workspace.read_json(f"{self.kept(run)}/evaluations.json"))
        return [
            Figure(
                measure=measure,
                method=f"{j.model}, {j.shown}",
                value=j.auc,
                unit="AUC"
                + (f" [{j.interval.low:.4f}, {j.interval.high:.4f}]" if j.interval else "")
                + f", log-loss {j.log_loss:.4f}, accuracy {j.accuracy:.4f}",
            )
            for j in evaluations
        ]


def main() -> None:
    """Runs what is not in the workspace yet, and prints all of it."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shots", type=int, nargs="+", default=[64, 256, 1024], help="any number: 4096 takes hours")
    parser.add_argument("--shown", type=int, default=5, help="behaviors that a prompt of `shots` and `cascade` shows")
    parser.add_argument("--behaviors", type=int, nargs="+", default=[5, 10, 15, 20, 30], help="K of lengths, longer")
    parser.add_argument("--longer-rows", type=int, default=500, help="test rows of `longer`")
    parser.add_argument("--length-shots", type=int, default=256, help="that `lengths` and `mixture` tune on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--valid-samples", type=int, default=200)
    parser.add_argument("--test-samples", type=int, default=1000, help="drawn at random, the same for all")
    parser.add_argument("--lists", type=int, default=60, help="of `cascade`, 20 candidates each")
    parser.add_argument("--estimate", action="store_true", help="say what is left to do, and end")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(_QUICK)
    recipe = load_recipe(RECIPE)
    bench = Bench(recipe, Workspace(recipe.workspace + ("-quick" if options.quick else "")), options)
    if finished_stage(bench.workspace, "prepare") is None:
        prepare(recipe, bench.workspace)
    announce(bench)
    if options.estimate:
        return
    figures = [figure for part in options.only for figure in FIGURES[part](bench)]
    show("LLM ranker, test AUC", figures, options)


def runs_of(part: str, o: Namespace) -> list[Run]:
    """The runs that a part compares."""
    few = [
        Run(seed, shots, o.shown, ("retrieved",), zero_shot=(shots, seed) == (o.shots[-1], o.seeds[0]))
        for shots in o.shots
        for seed in o.seeds
    ]
    by_part = {
        "shots": few,
        "cascade": [run for run in few if run.zero_shot],
        "longer": [run for run in few if run.zero_shot],
        "lengths": [Run(o.seeds[0], o.length_shots, k, WAYS, zero_shot=True) for k in o.behaviors],
        "mixture": [
            Run(seed, o.length_shots, o.shown, ("retrieved",), asked=asked)
            for seed in o.seeds
            for asked in (("recent", "retrieved"), ("recent",), ("retrieved",))
        ],
        "sets": [
            Run(seed, o.length_shots, o.shown, ("retrieved",), retrieved_for=retrieved_for)
            for seed in o.seeds
            for retrieved_for in ("candidate", "set")
        ],
    }
    return by_part[part]


def announce(bench: Bench) -> None:
    """Says what is left to do, and about how long it takes at the speed that this machine tunes and scores with now."""
    o = bench.options
    left = [run for run in dict.fromkeys(r for part in o.only for r in runs_of(part, o)) if not bench.is_done(run)]
    if not left:
        note("nothing is left to tune: all of it is in the workspace")
        return
    read, tuned = 0.0, 0.0
    for run in left:
        prompt = _FIXED_TOKENS + _BEHAVIOR_TOKENS * run.behaviors
        tuned += prompt * o.epochs * run.shots * len(run.asked)
        stops = o.epochs * o.valid_samples * len(run.asked)
        scoring = (1 + run.zero_shot) * (o.valid_samples + o.test_samples) * len(run.ways)
        read += prompt * (stops + scoring)
    if "longer" in o.only:
        read += sum(4 * o.longer_rows * (_FIXED_TOKENS + _BEHAVIOR_TOKENS * k) for k in o.behaviors)
    if "cascade" in o.only:
        read += 20 * o.lists * (_FIXED_TOKENS + _BEHAVIOR_TOKENS * o.shown)
    tuning, reading = tokens_per_s(bench.recipe.ranking or RankingConfig())
    seconds = tuned / tuning + read / reading + _START_S * len(left)
    note(
        f"{len(left)} rankers to tune: {tuned / 1e6:.2f} million tokens at {tuning:,.0f}/s, and {read / 1e6:.2f} "
        f"million to read at {reading:,.0f}/s: about {seconds / 60:.0f} minutes"
    )


def tokens_per_s(config: RankingConfig) -> tuple[float, float]:
    """Of a gradient and of a forward pass of the packaged model, as fast as it is right now."""
    import torch

    from owlrec.ranking.lora import answer_logits, load_model

    model = load_model(resolve_model(PACKAGED), None, config.tuning.settings())
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)  # a gradient goes all the way down, as an adapter's does
    prompts = [np.arange(100, 400, dtype=np.int32)] * 3
    answer_logits(model, prompts, "cpu").sum().backward()
    start = time.perf_counter()
    answer_logits(model, prompts, "cpu").sum().backward()
    tuned = time.perf_counter()
    with torch.no_grad():
        answer_logits(model, prompts, "cpu")
    return 900 / (tuned - start), 900 / (time.perf_counter() - tuned)


def by_shots(bench: Bench) -> list[Figure]:
    """Zero-shot and tuned, and CTR models on the same samples."""
    figures: list[Figure] = []
    for run in runs_of("shots", bench.options):
        measure = f"{run.shots} shots, seed {run.seed}"
        figures += bench.figures(run, measure)
        ranking = bench.recipe_of(run).ranking
        assert ranking is not None
        for result in ctr_results(bench.workspace, bench.recipe.domain, ranking, bench.settings_of(run)):
            figures.append(Figure(measure=measure, method=result.model, value=result.auc, unit="AUC"))
    return figures


def by_lengths(bench: Bench) -> list[Figure]:
    """Each K with its own adapter."""
    figures: list[Figure] = []
    for run in runs_of("lengths", bench.options):
        figures += bench.figures(run, f"K = {run.behaviors}, {run.shots} shots")
        rows, _ = bench.tuned(run)
        for model in ("zero-shot", "tuned"):
            for way in WAYS[1:]:
                pair = [scored(rows[model], shown) for shown in (way, "recent")]
                figures.append(auc_figure(f"K = {run.behaviors}", f"{model}: {way} - recent", *pair))
    return figures


def by_longer(bench: Bench) -> list[Figure]:
    """The ranker of the most shots, and the model as it is; the scores stay beside the run's own."""
    run, rows = runs_of("longer", bench.options)[0], bench.options.longer_rows
    _, folder = bench.tuned(run)
    recipe, workspace = bench.recipe_of(run), bench.workspace
    catalog = ItemCatalog.load(workspace).ids
    asked = draw_samples(workspace, "test", rows, RankerRun.evaluation_seed, catalog, exactly=True)
    figures = []
    for k in bench.options.behaviors:
        file = f"{bench.kept(run)}/longer-{k}-{rows}.parquet"
        if not workspace.exists(file):
            rows_asked = ask_ranker(recipe, workspace, folder, asked, k=k, ways=("recent", "retrieved"), zero_shot=True)
            workspace.write_parquet(file, rows_asked)
        table = workspace.read_parquet(file)
        for model in ("zero-shot", "tuned"):
            measure = f"K = {k}, {rows} test rows, {model}"
            recent, retrieved = (scored(table, way, model) for way in ("recent", "retrieved"))
            figures.append(auc_figure(measure, "recent", recent))
            figures.append(auc_figure(measure, "retrieved", retrieved))
            figures.append(auc_figure(measure, "retrieved - recent", retrieved, recent))
    return figures


def by_mixture(bench: Bench) -> list[Figure]:
    """As many samples, asked in one way or in both; judged on retrieved behaviors, as ReLLa does."""
    figures: list[Figure] = []
    seed_scores: dict[int, dict[str, Scored]] = {}
    for run in runs_of("mixture", bench.options):
        figures += bench.figures(run, f"tuned on {' + '.join(run.asked)}, {run.shots} shots, seed {run.seed}")
        rows, _ = bench.tuned(run)
        seed_scores.setdefault(run.seed, {})[" + ".join(run.asked)] = scored(rows["tuned"], "retrieved")
    for seed, scores in seed_scores.items():
        (_, both), *single = scores.items()
        for name, one in single:
            figures.append(auc_figure(f"tuned on both - on one, seed {seed}", f"both - {name}", both, one))
    return figures


def by_sets(bench: Bench) -> list[Figure]:
    """The same samples, asked with behaviors for each candidate or for its set."""
    figures: list[Figure] = []
    for seed in bench.options.seeds:
        scores = {}
        for run in runs_of("sets", bench.options):
            if run.seed == seed:
                measure = f"retrieved for each {run.retrieved_for}, {run.shots} shots, seed {seed}"
                figures += bench.figures(run, measure)
                scores[run.retrieved_for] = scored(bench.tuned(run)[0]["tuned"], "retrieved")
        figures.append(auc_figure(f"for a set, seed {seed}", "set - candidate", scores["set"], scores["candidate"]))
    return figures


def by_cascade(bench: Bench) -> list[Figure]:
    """Blends of DIN and the ranker of the most shots."""
    run = runs_of("cascade", bench.options)[0]
    _, folder = bench.tuned(run)
    return cascade_figures(bench.recipe_of(run), bench.workspace, folder, bench.kept(run), bench.options.lists)


FIGURES = {
    "shots": by_shots,
    "lengths": by_lengths,
    "longer": by_longer,
    "mixture": by_mixture,
    "sets": by_sets,
    "cascade": by_cascade,
}


if __name__ == "__main__":
    main()
