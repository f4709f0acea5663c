"""CTR models: what knowledge is worth to each backbone, how fast gAUC is taken, and how fast a request is scored.

`planted`: a world whose answer is known (benchmarks.planted): what each backbone gains by knowledge that is true, as
vectors and as sentences, and by the same knowledge shuffled, which must be nothing. `leaderboard`: all backbones and
arms on the workspace of a finished run (--recipe), through the real stage, with 95 % intervals over users and the
slice of cold items. `gauc`: 385,000 rows in 192,000 groups beside the definition as a loop. `export`: a request of one
user and 200 items, on models of MovieLens-100K's size, and how far both paths are from the trainer's. `workers`: DIN
and DCN-V2 on MovieLens-100K, the same global batch on one Ray Train worker and shared by two.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

import pipelines
from benchmarks.arms import arm_figure
from benchmarks.planted import PlantedWorld, plant, sentence_vectors, trait_vectors
from benchmarks.samples import all_samples
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.artifact import CtrScorer, LiveState, TableKnowledge, User, export_program, load_program
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.batches import SplitTensors
from owlrec.ctr.experiment import (
    COLD_ITEM_BELOW,
    CTRConfig,
    Trial,
    WorkersConfig,
    finished_trials,
    read_grid_scores,
    slices_of,
    summarize,
    trials,
)
from owlrec.ctr.features import build_features
from owlrec.ctr.knowledge_tables import Arm, KnowledgeTable, OwnArm
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.encoding.vectors import Encoder, EncoderConfig
from owlrec.evaluation import GridScores, Interval, auc, compare_arms, gauc
from owlrec.ids import BEHAVIOR
from owlrec.ops.console import note
from owlrec.recipe import Recipe, load_recipe
from owlrec.releases.parts import encode_behaviors
from owlrec.shards import finished_stage
from owlrec.sources.splits import last_behaviors
from owlrec.workspace import Workspace

RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-100k.yaml"
ARMS: tuple[Arm, ...] = ("none", "knowledge", "shuffled", "metadata")
ORACLE = OwnArm(users=("truth",), items=("truth",))  # the planted traits themselves, as categories
# Large enough that what is not there is measured as nothing: a test split of 32,000 rows, three seeds.
PLANTED_USERS, PLANTED_ITEMS, SEEDS = 4000, 200, (0, 1, 2)
PLANTED = CTRConfig(embed_dim=8, hidden_dims=(32, 16), batch_size=512, learning_rate=5e-3, epochs=10)
GAUC_ROWS, GAUC_GROUPS = 385_000, 192_000
CANDIDATES, REQUESTS = 200, 200


def main() -> None:
    """Runs what is asked for."""
    parser = options_parser(__doc__)
    parts = {
        "planted": _planted,
        "gauc": _gauc,
        "export": _export,
        "leaderboard": _leaderboard,
        "workers": _workers,
    }
    parser.add_argument("--only", choices=tuple(parts))
    parser.add_argument("--backbones", nargs="+", choices=tuple(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--recipe", default=str(RECIPE), help="of a finished run, for the leaderboard")
    parser.add_argument("--workspace", help="in place of the recipe's own")
    parser.add_argument("--forms", nargs="+", choices=("vectors", "sentences"), default=["vectors", "sentences"])
    options = parser.parse_args()
    if options.quick:
        options.backbones, options.seeds, options.forms = options.backbones[:2], options.seeds[:1], ["vectors"]
    figures = [f for name, part in parts.items() if options.only in (None, name) for f in part(options)]
    show("CTR models", figures, options)


def _planted(options: argparse.Namespace) -> Iterator[Figure]:
    """Shares are of what can be found: the AUC of the true probabilities less that of the genre, on the same rows."""
    users = PLANTED_USERS // 4 if options.quick else PLANTED_USERS
    world = plant(users, PLANTED_ITEMS)
    best, blind = world.ceiling()
    for form in options.forms:
        data = _planted_data(world, form)
        for number, backbone in enumerate(options.backbones):
            arms = {arm: None for arm in ARMS[:3]} | ({"oracle": ORACLE} if number == 0 else {})
            arm_aucs: dict[str, list[float]] = {}
            for arm, own in arms.items():
                for seed in options.seeds:
                    trial = Trial(backbone=backbone, arm=arm, seed=seed, own=own)
                    arm_aucs.setdefault(arm, []).append(train_one(trial, data, PLANTED).result.test.auc)
            none = statistics.fmean(arm_aucs["none"])
            for arm in list(arms)[1:]:
                gains = [a - b for a, b in zip(arm_aucs[arm], arm_aucs["none"], strict=True)]
                each = ", ".join(f"{g:+.4f}" for g in gains)
                share = (statistics.fmean(arm_aucs[arm]) - blind) / (best - blind)
                note(f"{backbone}, {form}, {arm}: {each}; {share:.0%} of what can be found")
                found = "" if arm == "shuffled" else f", {share:.1%} of what can be found"
                beside = f"none {none:.4f}, ceiling {best:.4f}, genre alone {blind:.4f}"
                yield Figure(
                    measure=f"planted traits as {form}, {users:,} users: {arm} to none",
                    method=backbone,
                    value=round(statistics.fmean(gains), 4),
                    unit=f"test AUC{found} (seeds {each}; {beside})",
                )


def _planted_data(world: PlantedWorld, form: str) -> TrainingData:
    if form == "vectors":
        return world.data(trait_vectors(world.user_traits, seed=1), trait_vectors(world.item_traits, seed=2))
    encoder = Encoder(EncoderConfig())
    kind_tables = (("user", world.user_traits, 1), ("item", world.item_traits, 2))
    return world.data(*(sentence_vectors(traits, kind, encoder, seed=seed) for kind, traits, seed in kind_tables))


def _gauc(options: argparse.Namespace) -> Iterator[Figure]:
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.r_[np.arange(GAUC_GROUPS), rng.integers(GAUC_GROUPS, size=GAUC_ROWS - GAUC_GROUPS)])
    labels, scores = rng.integers(0, 2, GAUC_ROWS).astype(float), np.round(rng.random(GAUC_ROWS), 2)
    seconds = []
    for _ in range(3 if options.quick else 7):
        start = time.perf_counter()
        fast = gauc(labels, scores, groups)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    plain = _gauc_by_definition(labels, scores, groups)
    measure = f"gAUC of {GAUC_ROWS:,} rows in {GAUC_GROUPS:,} groups"
    took = time.perf_counter() - start
    yield Figure(measure=measure, method="a loop over groups", value=round(took, 3), unit=f"s ({plain:.12f})")
    middle = statistics.median(seconds)
    unit = f"s ({fast:.12f}, {abs(fast - plain):.1e} off the loop)"
    yield Figure(
        measure=measure, method="owlrec", value=round(middle, 3), unit=unit, ratio_to="the loop", ratio=took / middle
    )


def _gauc_by_definition(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """Each group's share of (positive, negative) pairs in order, ties half, weighted by the group's rows."""
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    total = weight = 0.0
    for rows in np.split(order, ends):
        positives, negatives = scores[rows][labels[rows] == 1], scores[rows][labels[rows] == 0]
        if len(positives) and len(negatives):
            above = (positives[:, None] > negatives).sum() + 0.5 * (positives[:, None] == negatives).sum()
            total += len(rows) * above / (len(positives) * len(negatives))
            weight += len(rows)
    return total / weight


def _export(options: argparse.Namespace) -> Iterator[Figure]:
    """Random weights: a score costs the same whatever the weights are."""
    from owlrec.runs.stages import prepare

    with tempfile.TemporaryDirectory() as folder:
        recipe, workspace = load_recipe(RECIPE, workspace=folder), Workspace(folder)
        prepare(recipe, workspace)
        users, items = (workspace.read_table(name) for name in ("users", "items"))
        samples = all_samples(workspace)
        attributes = [f for f in recipe.domain.text_fields if f in items.column_names]
        features = build_features(users, items, samples, features={"items": attributes, "users": ()}, min_item_count=2)
        rng = np.random.default_rng(0)
        kind_tables = {
            kind: KnowledgeTable(np.sort(ids), rng.normal(size=(len(ids), 384)).astype(np.float16))
            for kind, ids in (("user", users["user_id"].to_numpy()), ("item", items["item_id"].to_numpy()))
        }
        data = TrainingData(features, {"knowledge": kind_tables})
        tables = data.tables(Trial(backbone="din", arm="knowledge", seed=0))
        assert tables is not None
        length = features.spec.history_length
        store = _Behaviors(workspace, length)
        for backbone in options.backbones:
            torch.manual_seed(0)
            model = CTRModel(ModelSpec.of(features.spec, backbone, 384, recipe.ctr), features.items).eval()
            live = LiveState(model, TableKnowledge(tables), store)
            scorer = CtrScorer(model, features.items, features.vocabularies)
            example = scorer.batch(int(users["user_id"][0].as_py()), features.items.ids[:3], live)
            program = load_program(export_program(model, example))
            by_program = CtrScorer(model, features.items, features.vocabularies, program=program)
            trainer = SplitTensors(features.splits["test"].whole(), tables, "cpu")
            for method, path in (("model", scorer), ("program", by_program)):
                off = _off_the_trainer(path, live, trainer, samples)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    requests = 50 if options.quick else REQUESTS
                    label = f"{backbone}, {method}"
                    yield _latency(path, live, users["user_id"].to_numpy(), label, threads, off, requests)


class _Behaviors:
    """In the place of a release: the interactions' last behaviors."""

    def __init__(self, workspace: Workspace, length: int) -> None:
        shards = (workspace.read_shard("interactions", n) for n in workspace.table_shards("interactions"))
        tables = [last_behaviors(shard, length) for shard in shards]
        self._rows = {id_: v for t in tables for id_, v in zip(t["id"].to_pylist(), encode_behaviors(t), strict=True)}

    def behaviors(self, ids: Sequence[int]) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        values = (self._rows.get(id_) for id_ in ids)
        return [None if value is None else np.frombuffer(value, BEHAVIOR) for value in values]


def _latency(
    scorer: CtrScorer, live: LiveState, users: np.ndarray, method: str, threads: int, off: float, requests: int
) -> Figure:
    rng, took = np.random.default_rng(1), []
    for number in range(requests + 20):
        user, candidates = int(rng.choice(users)), rng.choice(scorer.items.ids, CANDIDATES)
        start = time.perf_counter()
        scorer.score(user, candidates, live)
        if number >= 20:  # the first ones warm caches
            took.append((time.perf_counter() - start) * 1e3)
    p50, p99 = np.percentile(took, [50, 99])
    return Figure(
        measure=f"request of 1 user x {CANDIDATES} items, {threads} threads",
        method=method,
        value=round(float(p50), 2),
        unit=f"ms, p50 (p99 {p99:.2f}; scores {off:.0e} off the trainer's)",
    )


def _off_the_trainer(
    scorer: CtrScorer, live: LiveState, trainer: SplitTensors, samples: pa.Table, rows: int = 50
) -> float:
    """The largest difference over the first test samples, each asked for as a request of its own."""
    test = samples.filter(pc.equal(samples["split"], "test")).slice(0, rows).to_pylist()
    asked = [scorer.score(User.from_sample(r), [r["item_id"]], live)[0] for r in test]
    with torch.inference_mode():
        trained = live.model(trainer.batch(torch.arange(len(test)))).double().sigmoid().numpy()
    return float(np.abs(np.array(asked) - trained).max())


def _leaderboard(options: argparse.Namespace) -> Iterator[Figure]:
    """Trains through the stage itself, so that what a run has trained already is not trained again."""
    from owlrec.runs.models import train_ctr as train

    recipe = load_recipe(options.recipe, workspace=options.workspace)
    workspace = Workspace(recipe.workspace)
    if finished_stage(workspace, "encode") is None:
        note(f"leaderboard skipped: {recipe.workspace} holds no finished run. First `owlrec run {options.recipe}`.")
        return
    changes = {"backbones": tuple(options.backbones), "arms": ARMS, "seeds": tuple(options.seeds)}
    recipe = recipe.model_copy(update={"ctr": recipe.ctr.model_copy(update=changes)})
    grid = train(recipe, workspace).outputs["grid"]
    wanted = trials(recipe.ctr)
    scores = read_grid_scores(workspace, grid, wanted)
    for row in summarize(finished_trials(workspace, grid, wanted), scores):
        yield arm_figure(row, f"{row.backbone}, all test rows")
        for base, paired in row.differences.items():
            yield _gain(f"{row.backbone}, all test rows", f"{row.arm} to {base}", paired.auc, paired.interval)
    if scores is not None:
        yield from _cold_items(recipe, workspace, scores, options)


def _workers(options: argparse.Namespace) -> Iterator[Figure]:
    from owlrec.runs.models import train_ctr as train
    from owlrec.runs.stages import prepare

    one: dict[str, float] = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            recipe, workspace = load_recipe(RECIPE, workspace=folder), Workspace(folder)
            prepare(recipe, workspace)
            changes = {"backbones": ("din", "dcnv2"), "arms": ("none",), "seeds": (0,)}
            training = WorkersConfig(num_workers=workers)
            recipe = recipe.model_copy(update={"ctr": recipe.ctr.model_copy(update=changes), "training": training})
            grid = train(recipe, workspace).outputs["grid"]
            for result in finished_trials(workspace, grid, trials(recipe.ctr)):
                off = result.test.auc - one.setdefault(result.backbone, result.test.auc)
                unit = "test AUC" if workers == 1 else f"test AUC ({off:+.5f})"
                method = f"{workers} worker{'s' * (workers > 1)}"
                yield Figure(measure=result.backbone, method=method, value=round(result.test.auc, 4), unit=unit)


def _cold_items(
    recipe: Recipe, workspace: Workspace, scores: GridScores, options: argparse.Namespace
) -> Iterator[Figure]:
    """Knowledge against shuffled knowledge where ids tell least."""
    users, items = (workspace.read_table(name) for name in ("users", "items"))
    features = build_features(
        users,
        items,
        all_samples(workspace),
        features={"items": (), "users": ()},
        min_item_count=recipe.ctr.min_item_count,
    )
    test = features.splits["test"].whole()
    cold = slices_of(test.items, test.history_lengths, features.item_counts).get("cold items")
    if cold is None:
        note(f"no test row is of an item with fewer than {COLD_ITEM_BELOW} training interactions")
        return
    part = GridScores(scores.user_ids[cold], scores.labels[cold], {p: s[cold] for p, s in scores.scores.items()})
    paths = {
        (backbone, arm): [Trial(backbone=backbone, arm=arm, seed=s).path for s in options.seeds]
        for backbone in options.backbones
        for arm in ARMS
    }
    pairs = {
        (b, base): list(zip(paths[b, "knowledge"], paths[b, base], strict=True))
        for b in options.backbones
        for base in ("shuffled", "none")
    }
    intervals = compare_arms(part, pairs)
    measure = f"items with fewer than {COLD_ITEM_BELOW} training interactions, {int(cold.sum())} test rows"
    for (backbone, base), trial_pairs in pairs.items():
        gain = statistics.fmean(_auc(part, arm) - _auc(part, other) for arm, other in trial_pairs)
        yield _gain(f"{backbone}, {measure}", f"knowledge to {base}", gain, intervals.get((backbone, base)))


def _auc(part: GridScores, path: str) -> float:
    return auc(part.labels, part.scores[path])


def _gain(measure: str, method: str, gain: float, interval: Interval | None) -> Figure:
    unit = f"AUC (95 % [{interval.low:+.4f}, {interval.high:+.4f}])" if interval else "AUC"
    return Figure(measure=measure, method=method, value=round(gain, 4), unit=unit)


if __name__ == "__main__":
    main()
