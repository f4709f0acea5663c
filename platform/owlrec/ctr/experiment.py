"""The grid of trials (backbone x arm x seed): settings, inputs of each arm, and summaries of results.

A gain from an LLM is believable only next to its controls, so all arms are trained in the same way. By default there
are four: no knowledge; the LLM's knowledge; the same vectors with the wrong ids (`shuffled`: the effect of the
adaptor's extra parameters); and vectors of the title and attributes in the prompt (`metadata`: the effect of the text
encoder). Any named set of sources can be an arm, of users, of items or of both; each may read semantic ids instead of
vectors or in addition. No torch here: every recipe loads this module.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, field_validator

from owlrec.config import Config
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.features import RESERVED
from owlrec.ctr.knowledge_tables import Arm, OwnArm, arm_parts, bases, check_arm
from owlrec.errors import RecipeError, SchemaError, WorkspaceError
from owlrec.evaluation import (
    GridScores,
    Interval,
    auc,
    compare_arms,
    detectable_difference,
    log_loss,
    relative_improvement,
)
from owlrec.schema import SOFT_LABELS
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# ---------------------------------------------------------------------------------------------------------------- sweep
# Settings of a sweep: learning rates times adaptor sizes, evaluated on the valid split alone.
# `owlrec ctr sweep` runs it.


@dataclass(frozen=True)
class SweepGrid:
    """Values of CTRConfig.learning_rate and expert_dim; every combination is tried."""

    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    expert_dims: tuple[int, ...] = (32, 128)  # a quarter of KAR's, and KAR's

    def candidates(self, *, adaptor: bool) -> list[dict[str, Any]]:
        """Changes of CTRConfig per candidate. adaptor: False if the arm has none; then only rates differ."""
        if not adaptor:
            return [{"learning_rate": rate} for rate in self.learning_rates]
        pairs = product(self.learning_rates, self.expert_dims)
        return [{"learning_rate": rate, "expert_dim": width} for rate, width in pairs]


# --------------------------------------------------------------------------------------------------------- distillation
# Distillation: a CTR model learns from an LLM's P(yes) in addition to the labels, also for pairs without a label.
#
# For a pair with label y and probability p, the loss is (1 - a) BCE(y) + a BCE(p), which is the BCE of the blended
# label (1 - a) y + a p; for a pair without a label it is a BCE(p). So training needs no second loss: labels are between
# 0 and 1, and samples have weights. `owlrec ranker score-pairs` prompts the LLM and writes the probabilities
# (ranking.question_sets).
#
# Leaks: training uses only pairs at the moment of a train sample of the same user. So a pair without a label is in
# that sample's split, earlier than the threshold of a split by time, and reads that sample's history. Valid and test
# keep their labels and are never blended.


_KEY = ["user_id", "item_id", "timestamp"]
_MOMENT = ["user_id", "timestamp"]


PAIRS_DRAWN = "uniform, seed 0"  # method of ranking.samples for pairs without a label; keep in sync


class DistillationConfig(Config):
    """Pairs for the LLM, and the weight of its answers."""

    alpha: float = Field(0.5, gt=0, le=1)  # weight of the LLM's probability in the loss; the rest is the label's
    # Maximum of additional pairs per user with items they never saw. The items are drawn
    # uniformly: popular items have enough labels.
    unlabeled: int = Field(0, ge=0)

    @property
    def asks(self) -> dict[str, Any]:
        """Settings that select the pairs."""
        return {"unlabeled": self.unlabeled, "drawn": PAIRS_DRAWN}

    def made_for(self, tables: str) -> str:
        """Digest of the tables (their fingerprint) and of the selection of pairs."""
        return fingerprint(tables, self.asks)


@dataclass(frozen=True)
class SoftLabels:
    """Output of `ranker score-pairs` and its weight; picklable."""

    folder: str
    alpha: float

    def read(self, workspace: Workspace, number: int) -> pa.Table:
        """Probabilities of a shard (schema.SOFT_LABELS).

        Raises WorkspaceError if the file is missing, and SchemaError with file and row for a probability outside [0,
        1].
        """
        path = f"{self.folder}/user/{shard_file(number)}"
        table = workspace.read_parquet(path, SOFT_LABELS.names)
        p = table["p"].to_numpy()
        if (odd := ~((p >= 0) & (p <= 1))).any():
            raise SchemaError(
                f"{workspace.path(path)}, row {odd.argmax()}: p is {p[odd.argmax()]}, which is not a "
                "probability. Delete the file and run `ranker score-pairs` again."
            )
        return table


def blended(samples: pa.Table, soft: pa.Table, alpha: float) -> pa.Table:
    """Samples for training: train samples with blended labels where `soft` has a probability, followed
    by the pairs without a label, each with the history of a train sample of the same user and moment.

    samples: schema.SAMPLE_ROWS of a shard; soft: schema.SOFT_LABELS of the same users. Drops pairs of valid or test
    samples and pairs at a moment without a train sample. A pair without a label has weight `alpha`; samples
    keep their weights.
    """
    keys, probabilities = samples.select(_KEY).to_pandas(), soft.to_pandas().drop_duplicates(_KEY)
    p = keys.merge(probabilities, how="left", on=_KEY)["p"].to_numpy()
    train = (samples["split"].to_numpy() == "train") & ~np.isnan(p)
    label = samples["label"].to_numpy()
    label = np.where(train, (1 - alpha) * label + alpha * p, label).astype(np.float32)
    place = samples.column_names.index("label")
    samples = samples.set_column(place, "label", pa.array(label))

    known = keys.drop_duplicates().assign(known=True)
    unseen = probabilities.merge(known, how="left", on=_KEY)
    unseen = unseen[unseen["known"].isna()].drop(columns="known")
    own = [name for name in samples.column_names if name.startswith("interactions/")]
    moments = samples.select([*_MOMENT, "split", "history_start", "history_end", *own]).to_pandas()
    moments = moments[moments["split"] == "train"].drop_duplicates(_MOMENT)
    drawn = unseen.merge(moments, how="inner", on=_MOMENT)
    drawn = drawn.rename(columns={"p": "label"}).assign(weight=np.float32(alpha))
    drawn = drawn.reindex(columns=samples.column_names)  # their further labels are unknown
    added = pa.Table.from_pandas(drawn, schema=samples.schema, preserve_index=False)
    return pa.concat_tables([samples, added])


# --------------------------------------------------------------------------------------------------------------- slices
# Slices of a split by how much the model can know about the row's user or item. An LLM's knowledge should help
# on cold rows, and an average over all rows hides it.
#
# Slices depend only on training data and the row's own history, never on other test rows. A history is
# truncated to the longest one in training (`features.build_features`).


POPULAR_SHARE = 0.2  # of the rows: those of the most popular items
COLD_USER_BELOW = 5  # behaviors in the row's history
COLD_ITEM_BELOW = 5  # occurrences in the training samples, as target or in a history
_HISTORY_FROM = (0, 1, 3, 6, 11, 21, 51)  # minimum length per bucket; the last one is open


class SliceMetrics(BaseModel):
    """Metrics of a slice. auc is None if it has only one class."""

    rows: int
    auc: float | None
    log_loss: float


def slices_of(items: np.ndarray, lengths: np.ndarray, item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> bool [n]: rows with cold or warm users, cold or warm items, the warm ones by popularity, and by history
    length. Empty slices are left out.

    items: int [n], row numbers of ItemFeatures; lengths: int [n], history lengths as read by the model;
    item_counts: features.Features.item_counts. An item missing from the items table is always cold.
    """
    cold_user = lengths < COLD_USER_BELOW
    cold_item = (item_counts[items] < COLD_ITEM_BELOW) | (items < RESERVED)
    slices = {
        "cold users": cold_user,
        "warm users": ~cold_user,
        "cold items": cold_item,
        "warm items": ~cold_item,
    }
    warm = np.sort(item_counts[items][~cold_item])
    if len(warm):
        head = item_counts[items] >= max(COLD_ITEM_BELOW + 1, warm[int(len(warm) * (1 - POPULAR_SHARE))])
        slices |= {"popular items": head & ~cold_item, "other warm items": ~head & ~cold_item}
    bucket = np.searchsorted(_HISTORY_FROM, lengths, side="right") - 1
    for number, start in enumerate(_HISTORY_FROM):
        slices[_history_name(number, start)] = bucket == number
    return {name: rows for name, rows in slices.items() if rows.any()}


def slice_metrics(labels: np.ndarray, scores: np.ndarray, slices: Mapping[str, np.ndarray]) -> dict[str, SliceMetrics]:
    """Metrics of each slice's rows; slices as returned by `slices_of`."""
    metrics = {}
    for name, rows in slices.items():
        area = auc(labels[rows], scores[rows])
        metrics[name] = SliceMetrics(
            rows=int(rows.sum()),
            auc=None if np.isnan(area) else area,
            log_loss=log_loss(labels[rows], scores[rows]),
        )
    return metrics


def mean_slices(seeds: Sequence[Mapping[str, SliceMetrics]]) -> dict[str, SliceMetrics]:
    """Mean over trials that scored the same rows; an auc that is None in one of them is None in the mean."""
    by_name: dict[str, list[SliceMetrics]] = {}
    for slices in seeds:
        for name, seed_slices in slices.items():
            by_name.setdefault(name, []).append(seed_slices)
    means = {}
    for name, each in by_name.items():
        aucs = [m.auc for m in each if m.auc is not None]
        means[name] = SliceMetrics(
            rows=each[0].rows,
            auc=float(np.mean(aucs)) if aucs else None,
            log_loss=float(np.mean([m.log_loss for m in each])),
        )
    return means


def _history_name(number: int, start: int) -> str:
    if number + 1 == len(_HISTORY_FROM):
        return f"history {start}+"
    end = _HISTORY_FROM[number + 1] - 1
    return f"history {start}" if start == end else f"history {start}-{end}"


# ----------------------------------------------------------------------------------------------------------- experiment


class AdaptorConfig(Config):
    """The hybrid-expert adaptor: as many experts as in KAR's run script, and as wide. A recipe sets the width alone."""

    shared_experts: int = Field(default=2, ge=1)
    dedicated_experts: int = Field(default=5, ge=1)  # per tower
    hidden_dim: int = Field(default=128, ge=1)


# Tables with more rows (such as items) get sparse gradients and row-wise Adagrad. In smaller ones most rows are in
# every batch, and AdamW is as good (MovieLens-100K, DCN-V2, one split: valid AUC .7545, row-wise .7539 at best).
SPARSE_ABOVE_ROWS = 50_000
# Among several workers, tables with more rows are shared out instead of copied if TorchRec is installed: at a width of
# 32 a copy takes 1.3 GB, and for smaller ones exchanging rows costs more than the memory saved.
SHARD_ABOVE_ROWS = 10_000_000
# Of row-wise Adagrad, for those tables. MovieLens-100K, DCN-V2, one split, valid AUC: .005 gave .7539, .01 .7530, .02
# .7525, .05 .7496, .1 .7458.
TABLE_LEARNING_RATE = 0.005


class WorkersConfig(Config):
    """Where models are trained, CTR models and the ranker alike: on how many workers of Ray Train. Together
    they take the batches that one would take.
    """

    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False  # one for each worker


# Of several labels: one bottom, a mixture of experts (MMoE), or shared and own experts in layers (PLE).
Sharing = Literal["shared", "mmoe", "ple"]


class CTRConfig(Config):
    """What to train and how. Defaults maximize valid AUC on MovieLens-100K over three user splits."""

    backbones: tuple[str, ...] = Field(default=("din", "dcnv2"), min_length=1)
    # Short names, or own arms as `name: {users: [...], items: [...]}`.
    arms: tuple[Arm | dict[str, OwnArm], ...] = Field(
        default=("none", "knowledge", "shuffled", "metadata"), min_length=1
    )
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    # Rows of all workers together; fewer if an epoch would have fewer than 30 steps.
    batch_size: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    # bfloat16: training computes products in half the width; scores always use float32. It helps on GPUs and
    # on CPUs with AMX or AVX512-BF16 (two cores of an EPYC: DCN-V2 trains 1.9 times as fast, DIN 1.3 times).
    precision: Literal["float32", "bfloat16"] = "float32"
    epochs: int = Field(default=15, ge=1)  # maximum
    patience: int = Field(default=2, ge=1)  # epochs without a better valid AUC before early stopping
    embed_dim: int = Field(default=32, ge=1)
    hidden_dims: tuple[int, ...] = Field(default=(200, 80), min_length=1)
    # Share of the vectors' variance that the adaptor reads, by their first principal components. None = whole vectors.
    knowledge_variance: float | None = Field(default=0.95, gt=0, le=1)
    # Width of the adaptor's experts; KAR's. `owlrec ctr sweep` compares widths on valid.
    expert_dim: int = Field(default=128, ge=1)
    distillation: DistillationConfig | None = None  # None = labels alone; otherwise run `ranker score-pairs` first
    # Rarer items share one embedding, which new items then use; likewise the rarer values of a feature.
    min_item_count: int = Field(default=2, ge=1)
    # Further labels, by the network that they share with the first: {mmoe: [conversion]}.
    tasks: dict[Sharing, tuple[str, ...]] | None = None

    @field_validator("backbones")
    @classmethod
    def _known_backbones(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                BACKBONES.check(name)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        return names

    @field_validator("tasks")
    @classmethod
    def _one_network(cls, tasks: dict[Sharing, tuple[str, ...]] | None) -> dict[Sharing, tuple[str, ...]] | None:
        if tasks is not None and (len(tasks) != 1 or not all(tasks.values())):
            raise ValueError("must hold one network with its labels, such as {mmoe: [conversion]}")
        return tasks

    @property
    def task_labels(self) -> tuple[str, ...]:
        """Names of the further labels."""
        return next(iter(self.tasks.values())) if self.tasks else ()

    @property
    def sharing(self) -> Sharing | None:
        """The network of several labels."""
        return next(iter(self.tasks)) if self.tasks else None

    @field_validator("backbones", "arms", "seeds")
    @classmethod
    def _no_duplicates(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        listed = [name for v in values for name in (v if isinstance(v, dict) else [v])]
        repeated = sorted({str(name) for name in listed if listed.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} is listed more than once. List each trial once.")
        return values

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[Arm | dict[str, OwnArm], ...]) -> tuple[Arm | dict[str, OwnArm], ...]:
        own = _own_arms(arms)
        for name in own:
            if not name.isidentifier() or name == "shuffled":
                raise ValueError(f"'{name}' cannot name an own arm. Use letters, digits and _; suffixes have a meaning")
            with suppress(RecipeError):
                check_arm(name, ())
                raise ValueError(f"'{name}' is a short name. Give your own arm another name")
        for arm in arms:
            if isinstance(arm, str):
                try:
                    check_arm(arm, own)
                except RecipeError as error:
                    raise ValueError(str(error)) from None
        return arms

    @property
    def own_arms(self) -> dict[str, OwnArm]:
        """The recipe's own arms by name."""
        return _own_arms(self.arms)

    @property
    def arm_names(self) -> tuple[Arm, ...]:
        """The names of all arms, in order."""
        return tuple(name for arm in self.arms for name in (arm if isinstance(arm, dict) else (arm,)))


def _own_arms(arms: Iterable[Arm | dict[str, OwnArm]]) -> dict[str, OwnArm]:
    return {name: own for arm in arms if isinstance(arm, dict) for name, own in arm.items()}


class Trial(Config):
    """One model to train."""

    backbone: str
    arm: Arm
    seed: int
    own: OwnArm | None = None  # what the arm reads, if it is the recipe's own

    @property
    def path(self) -> str:
        """Folder, relative to the grid's."""
        return f"{self.backbone}/{self.arm}/seed-{self.seed}"


def trials(config: CTRConfig) -> list[Trial]:
    """The whole grid. The seed varies slowest, so an interrupted grid has all arms of its finished seeds."""
    own = {arm: config.own_arms.get(arm_parts(arm).reads) for arm in config.arm_names}
    grid = product(config.seeds, config.backbones, config.arm_names)
    return [Trial(backbone=b, arm=a, seed=s, own=own[a]) for s, b, a in grid]


class Metrics(BaseModel):
    """Metrics of one split. gauc is None if no user has both a positive and a negative."""

    auc: float
    gauc: float | None
    log_loss: float
    calibration_error: float


class TrialResult(BaseModel):
    """Contents of a trained trial's result.json."""

    backbone: str
    arm: Arm
    seed: int
    valid: Metrics
    test: Metrics
    epochs: int  # number trained
    best_epoch: int  # the epoch with the kept and tested weights, from 1
    seconds: float
    samples_per_s: float  # training rows of all workers together, without evaluation
    parameters: int
    resumed: int = 0  # number of resumes from a checkpoint
    slices: dict[str, SliceMetrics]  # of the test split
    tasks: dict[str, dict[str, float]] = {}  # further label -> split (valid, test) -> AUC
    own: OwnArm | None = None
    coverage: dict[str, float] = {}  # side ("user", "item") -> share of the test rows with a vector from any source

    @property
    def trial(self) -> Trial:
        """The trial of this result."""
        return Trial(backbone=self.backbone, arm=self.arm, seed=self.seed, own=self.own)


ENCODED = "samples"  # the folder of a grid's encoded samples, in its own


def grid_folder(fingerprint: str) -> str:
    """Folder of a grid's trials, relative to the workspace."""
    return f"ctr/{fingerprint[:16]}"


def finished_trials(workspace: Workspace, fingerprint: str, wanted: Iterable[Trial]) -> list[TrialResult]:
    """Results of finished trials, in the order of `wanted`."""
    folder = grid_folder(fingerprint)
    paths = [f"{folder}/{trial.path}/result.json" for trial in wanted]
    return [TrialResult.model_validate(workspace.read_json(path)) for path in paths if workspace.exists(path)]


class PairedDifference(BaseModel):
    """Test AUC of one arm minus that of another with the same backbone, over their common seeds."""

    seeds: int
    auc: float  # mean over seeds
    rela_imp: (
        float | None
    )  # of the mean AUCs (evaluation.relative_improvement); None if the base is no better than chance
    interval: Interval | None  # 95 %, over users and seeds; None if test scores are missing or cover one user

    @property
    def detectable(self) -> float | None:
        """Smallest difference that this comparison would probably have shown."""
        return None if self.interval is None else detectable_difference(self.interval)

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.interval is None:
            return "not tested"
        if self.interval.low > 0:
            return "gain shown"
        return "loss shown" if self.interval.high < 0 else "no gain shown"


class ArmSummary(BaseModel):
    """One (backbone, arm) on the test split: means and sample standard deviations over seeds (None for one seed)."""

    backbone: str
    arm: Arm
    seeds: int
    auc: float
    auc_std: float | None
    gauc: float | None
    log_loss: float
    calibration_error: float
    # Compared with each of `bases` over common seeds: pairing seeds cancels effects shared by both arms.
    differences: dict[Arm, PairedDifference] = {}
    slices: dict[str, SliceMetrics] = {}  # means over seeds


def summarize(results: Sequence[TrialResult], scores: GridScores | None = None) -> list[ArmSummary]:
    """One row per (backbone, arm), in order of first occurrence.

    scores: the trials' test scores (`read_grid_scores`), which give differences their intervals.
    """
    groups: dict[tuple[str, Arm], list[TrialResult]] = {}
    for result in results:
        groups.setdefault((result.backbone, result.arm), []).append(result)
    differences = _differences(results, scores)
    rows = []
    for (backbone, arm), group in groups.items():
        aucs = [r.test.auc for r in group]
        gaucs = [r.test.gauc for r in group if r.test.gauc is not None]
        rows.append(
            ArmSummary(
                backbone=backbone,
                arm=arm,
                seeds=len(group),
                auc=float(np.mean(aucs)),
                auc_std=_std(aucs),
                gauc=_mean(gaucs),
                log_loss=float(np.mean([r.test.log_loss for r in group])),
                calibration_error=float(np.mean([r.test.calibration_error for r in group])),
                differences={b: d for b in bases(arm) if (d := differences.get((backbone, arm, b)))},
                slices=mean_slices([r.slices for r in group]),
            )
        )
    return rows


class Headline(BaseModel):
    """One arm against another over all backbones, as the first line of a report says it."""

    arm: Arm
    base: Arm
    backbones: int
    users: int  # of the test split; 0 if unknown
    difference: PairedDifference

    def __str__(self) -> str:
        """In words, with interval and smallest detectable difference."""
        paired = self.difference
        text = f"{self.arm} - {self.base}: {paired.verdict}. Test AUC {paired.auc:+.4f}"
        if paired.interval is not None and paired.detectable is not None:
            text += (
                f", 95 % interval [{paired.interval.low:+.4f}, {paired.interval.high:+.4f}]; the smallest "
                f"difference that this test would show is {paired.detectable:.4f}"
            )
        users = f", {self.users:,} test users" if self.users else ""
        return f"{text} ({_count(self.backbones, 'backbone')}, {_count(paired.seeds, 'seed')}{users})."


GAIN = "gain_over_metadata"  # in the card of `evaluate`: a shown gain, whose price `owlrec plan` computes
DECISIVE = "metadata"  # the text that was there before the LLM, through the same encoder


def headlines(results: Sequence[TrialResult], scores: GridScores | None = None) -> list[Headline | str]:
    """What decides whether texts are worth their price, the decisive comparison first: knowledge, or the first own arm
    without it, against metadata, shuffled and none. A line in words names an arm that is missing for it.
    """
    arms = list(dict.fromkeys(result.arm for result in results))
    candidates = [a for a in arms if a not in ("none", DECISIVE) and not arm_parts(a).shuffled]
    if not candidates:
        return ["knowledge - metadata is unknown: no arm reads knowledge. Add `knowledge` to ctr.arms."]
    arm = "knowledge" if "knowledge" in candidates else candidates[0]
    lines: list[Headline | str] = []
    for base in bases(arm):
        if base in arms:
            lines += filter(None, [compare_over_backbones(results, scores, arm, base)])
        elif base.startswith(DECISIVE):
            lines.append(f"{arm} - {base} is unknown: add `{base}` to ctr.arms. Only this difference is the LLM's.")
    return lines


def compare_over_backbones(
    results: Sequence[TrialResult], scores: GridScores | None, arm: Arm, base: Arm
) -> Headline | None:
    """Mean difference over all backbones and seeds that trained both arms; None if none did."""
    trained = {(r.backbone, r.arm, r.seed): r for r in results}
    pairs = [(r, trained[b, base, s]) for (b, a, s), r in trained.items() if a == arm and (b, base, s) in trained]
    if not pairs:
        return None
    paths = {arm: [(ours.trial.path, theirs.trial.path) for ours, theirs in pairs]}
    seeds = {arm: [ours.seed for ours, _ in pairs]}
    intervals = compare_arms(scores, paths, seeds=seeds) if scores else {}
    arm_auc, base_auc = (float(np.mean([r.test.auc for r in half])) for half in zip(*pairs, strict=True))
    relative = relative_improvement(arm_auc, base_auc)
    return Headline(
        arm=arm,
        base=base,
        backbones=len({ours.backbone for ours, _ in pairs}),
        users=0 if scores is None else len(np.unique(scores.user_ids)),
        difference=PairedDifference(
            seeds=len({ours.seed for ours, _ in pairs}),
            auc=arm_auc - base_auc,
            rela_imp=None if math.isnan(relative) else relative,
            interval=intervals.get(arm),
        ),
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _differences(
    results: Sequence[TrialResult], scores: GridScores | None
) -> dict[tuple[str, Arm, Arm], PairedDifference]:
    """(backbone, arm, base) -> difference between the two arms."""
    by_trial = {(r.backbone, r.arm, r.seed): r for r in results}
    pairs: dict[tuple[str, Arm, Arm], list[tuple[TrialResult, TrialResult]]] = {}
    for result in results:
        for base in bases(result.arm):
            if partner := by_trial.get((result.backbone, base, result.seed)):
                pairs.setdefault((result.backbone, result.arm, base), []).append((result, partner))
    paths = {key: [(arm.trial.path, base.trial.path) for arm, base in seeds] for key, seeds in pairs.items()}
    intervals = compare_arms(scores, paths) if scores else {}
    differences = {}
    for key, seeds in pairs.items():
        arm_auc, base_auc = (float(np.mean([r.test.auc for r in half])) for half in zip(*seeds, strict=True))
        relative = relative_improvement(arm_auc, base_auc)
        differences[key] = PairedDifference(
            seeds=len(seeds),
            auc=arm_auc - base_auc,
            rela_imp=None if math.isnan(relative) else relative,
            interval=intervals.get(key),
        )
    return differences


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


# --------------------------------------------------------------------------------------------------------------- scores
# Test scores of a trial, stored with its model so that arms can be compared row by row long after training.
#
# Only ids, labels and scores: no texts, histories or profiles. They cover at most
# `encoded.EVALUATED_ROWS` rows, and a comparison loads only its own arrays.


SCORES_FILE = "test_scores.parquet"
SCORES = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("label", pa.float32()), ("score", pa.float64())])


@dataclass(frozen=True)
class ScoredRows:
    """One row per scored sample of a split, in the order of the samples table."""

    user_ids: np.ndarray  # int64 [n]
    item_ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # float32 [n]
    scores: np.ndarray  # float64 [n], probabilities

    def to_table(self) -> pa.Table:
        """Table with `SCHEMA`."""
        return pa.table([self.user_ids, self.item_ids, self.labels, self.scores], schema=SCORES)


def read_grid_scores(workspace: Workspace, fingerprint: str, trials: Iterable[Trial]) -> GridScores | None:
    """Test scores of the `trials` that have any; None if none has.

    Raises WorkspaceError if two trials scored different rows.
    """
    first: pa.Table | None = None
    paths: dict[str, str] = {}
    for trial in trials:
        path = f"{grid_folder(fingerprint)}/{trial.path}/{SCORES_FILE}"
        if not workspace.exists(path):
            continue
        rows = workspace.read_parquet(path, [name for name in SCORES.names if name != "score"])
        first = rows if first is None else first
        if not rows.equals(first):
            raise WorkspaceError(
                f"{workspace.path(path)} has scores for different rows ({rows.num_rows}) than the first trial "
                f"of its grid ({first.num_rows}). Delete the folder {workspace.path(grid_folder(fingerprint))} "
                "and run `train_ctr` again."
            )
        paths[trial.path] = path
    if first is None:
        return None
    scores = _SavedScores(workspace, paths)
    return GridScores(first["user_id"].to_numpy(), first["label"].to_numpy(), scores)


class _SavedScores(Mapping[str, np.ndarray]):
    """Scores of trials by path, read on demand."""

    def __init__(self, workspace: Workspace, paths: Mapping[str, str]) -> None:
        self._workspace, self._paths = workspace, paths

    def __getitem__(self, trial: str) -> np.ndarray:
        scores: np.ndarray = self._workspace.read_parquet(self._paths[trial], ["score"])["score"].to_numpy()
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
