"""The grid of trials (backbone x arm x seed), its settings, what each arm reads, and what its results add up to.

A gain from an LLM is believable only beside its controls, so all arms are trained alike. By default there are four: no
knowledge; the LLM's knowledge; the same vectors handed to the wrong ids (`shuffled`: what the adaptor's extra
parameters alone are worth); and vectors of the title and attributes that the LLM was given (`metadata`: what the text
encoder alone is worth). Each may read semantic ids in place of vectors or beside them, so that one grid tells what form
serves best. No torch here: the recipe loads this module at every call.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, field_validator

from owlrec.config import Config
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.features import RESERVED
from owlrec.ctr.knowledge_tables import Arm, bases
from owlrec.errors import RecipeError, SchemaError, WorkspaceError
from owlrec.evaluation import GridScores, Interval, auc, compare_arms, log_loss, relative_improvement
from owlrec.schema import SOFT_LABELS
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# ---------------------------------------------------------------------------------------------------------------- sweep
# Which settings a sweep tries: learning rates times sizes of the adaptor, judged on the valid split alone.
# `owlrec ctr sweep` runs it.


@dataclass(frozen=True)
class SweepGrid:
    """Values of CTRConfig.learning_rate and of AdaptorConfig's fields; every combination is tried."""

    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    shared_experts: tuple[int, ...] = (2,)
    dedicated_experts: tuple[int, ...] = (2, 5)
    hidden_dims: tuple[int, ...] = (32,)  # of an expert

    def candidates(self, *, adaptor: bool) -> list[dict[str, Any]]:
        """What each candidate changes of CTRConfig. adaptor: False where the arm has none: then only rates differ."""
        if not adaptor:
            return [{"learning_rate": rate} for rate in self.learning_rates]
        sizes = product(self.learning_rates, self.shared_experts, self.dedicated_experts, self.hidden_dims)
        return [
            {
                "learning_rate": rate,
                "adaptor": {"shared_experts": shared, "dedicated_experts": dedicated, "hidden_dim": hidden},
            }
            for rate, shared, dedicated, hidden in sizes
        ]


# --------------------------------------------------------------------------------------------------------- distillation
# Distillation: a CTR model learns from an LLM's P(yes) beside the labels, also of pairs that have no label.
#
# Of a pair with a label y and a probability p the loss is (1 - a) BCE(y) + a BCE(p), which is the BCE of the blended
# label (1 - a) y + a p; of a pair without a label it is a BCE(p). So training needs no second loss: labels lie between
# 0 and 1, and samples have weights. `owlrec ranker score-pairs` asks the LLM and writes the probabilities
# (ranking.soft_labels).
#
# Leaks: only pairs at the moment of a train sample of the same user are learned from, so a pair without a label is in
# that sample's split, earlier than the threshold of a split by time, and reads that sample's history. Valid and test
# keep their labels and are never blended.


_KEY = ["user_id", "item_id", "timestamp"]
_MOMENT = ["user_id", "timestamp"]


PAIRS_DRAWN = "uniform, seed 0"  # how ranking.samples draws pairs without a label: change it with the draw


class DistillationConfig(Config):
    """Which pairs the LLM is asked about, and how much its answers count."""

    alpha: float = Field(0.5, gt=0, le=1)  # the share of the LLM's probability in the loss; the label has the rest
    # Pairs of each user with items that they never met, at most, beside all their train samples. The items are drawn
    # uniformly: what is popular has labels of its own.
    unlabeled: int = Field(0, ge=0)

    @property
    def asks(self) -> dict[str, Any]:
        """What decides which pairs the LLM is asked about."""
        return {"unlabeled": self.unlabeled, "drawn": PAIRS_DRAWN}

    def made_for(self, tables: str) -> str:
        """Digest of the tables (their fingerprint) and of which of their pairs are asked about."""
        return fingerprint(tables, self.asks)


@dataclass(frozen=True)
class SoftLabels:
    """What `ranker score-pairs` wrote, and how much it counts; picklable."""

    folder: str
    alpha: float

    def read(self, workspace: Workspace, number: int) -> pa.Table:
        """A shard's probabilities (schema.SOFT_LABELS).

        Raises WorkspaceError where the file is missing, SchemaError, naming file and row, for one outside [0, 1].
        """
        path = f"{self.folder}/user/{shard_file(number)}"
        table = workspace.read_parquet(path, SOFT_LABELS.names)
        p = table["p"].to_numpy()
        if (odd := ~((p >= 0) & (p <= 1))).any():
            raise SchemaError(
                f"{workspace.path(path)}, row {odd.argmax()}: p is {p[odd.argmax()]}, but it is a probability. Delete "
                "the file and run `ranker score-pairs` again."
            )
        return table


def blended(samples: pa.Table, soft: pa.Table, alpha: float) -> pa.Table:
    """Samples as they are trained on: those of the train split with blended labels where `soft` has a probability, and
    after all of them the pairs without a label, each with the history of a train sample of its user and moment.

    samples: schema.SAMPLE_ROWS of a shard; soft: schema.SOFT_LABELS of the same users. A pair of a valid or test
    sample, and one at a moment without a train sample, is left out. A pair without a label weighs `alpha`, a sample
    what it weighed.
    """
    keys, probabilities = samples.select(_KEY).to_pandas(), soft.to_pandas().drop_duplicates(_KEY)
    p = keys.merge(probabilities, how="left", on=_KEY)["p"].to_numpy()
    train = (samples["split"].to_numpy() == "train") & ~np.isnan(p)
    label = samples["label"].to_numpy()
    label = np.where(train, (1 - alpha) * label + alpha * p, label).astype(np.float32)
    place = samples.column_names.index("label")
    samples = samples.set_column(place, "label", pa.array(label))

    known = keys.drop_duplicates().assign(known=True)
    of_none = probabilities.merge(known, how="left", on=_KEY)
    of_none = of_none[of_none["known"].isna()].drop(columns="known")
    moments = samples.select([*_MOMENT, "split", "history_start", "history_end"]).to_pandas()
    moments = moments[moments["split"] == "train"].drop_duplicates(_MOMENT)
    drawn = of_none.merge(moments, how="inner", on=_MOMENT)
    drawn = drawn.rename(columns={"p": "label"}).assign(weight=np.float32(alpha))
    added = pa.Table.from_pandas(drawn[samples.column_names], schema=samples.schema, preserve_index=False)
    return pa.concat_tables([samples, added])


# --------------------------------------------------------------------------------------------------------------- slices
# Parts of a split by how much the model can know of the row's user or item: that is where an LLM's knowledge should
# pay, and an average over all rows hides it.
#
# Only training data and the row's own history define a slice, nothing that the test split alone tells. A history is
# seen cut to the longest one in training (`features.build_features`).


COLD_USER_BELOW = 5  # behaviours in the row's history
COLD_ITEM_BELOW = 5  # occurrences in the training samples, as target or in a history
_HISTORY_FROM = (0, 1, 3, 6, 11, 21, 51)  # each bucket's least length; the last one is open


class SliceMetrics(BaseModel):
    """Of a part of a split. auc is None where the part has one class only."""

    rows: int
    auc: float | None
    log_loss: float


def slices_of(items: np.ndarray, lengths: np.ndarray, item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> bool [n]: which rows of a split are of cold or warm users, of cold or warm items, and of each history
    length. Slices without a row are left out.

    items: int [n], row numbers of ItemFeatures, and lengths: int [n], of histories as they are read, of each row;
    item_counts: features.Features.item_counts. An item that the items table lacks is cold, however often it occurs.
    """
    cold_user = lengths < COLD_USER_BELOW
    cold_item = (item_counts[items] < COLD_ITEM_BELOW) | (items < RESERVED)
    found = {
        "cold users": cold_user,
        "warm users": ~cold_user,
        "cold items": cold_item,
        "warm items": ~cold_item,
    }
    bucket = np.searchsorted(_HISTORY_FROM, lengths, side="right") - 1
    for number, start in enumerate(_HISTORY_FROM):
        found[_history_name(number, start)] = bucket == number
    return {name: rows for name, rows in found.items() if rows.any()}


def slice_metrics(labels: np.ndarray, scores: np.ndarray, slices: Mapping[str, np.ndarray]) -> dict[str, SliceMetrics]:
    """The metrics of each slice's rows; slices as `slices_of` returns them."""
    found = {}
    for name, rows in slices.items():
        area = auc(labels[rows], scores[rows])
        found[name] = SliceMetrics(
            rows=int(rows.sum()),
            auc=None if np.isnan(area) else area,
            log_loss=log_loss(labels[rows], scores[rows]),
        )
    return found


def mean_slices(seeds: Sequence[Mapping[str, SliceMetrics]]) -> dict[str, SliceMetrics]:
    """The mean over trials that scored the same rows; an auc that is None in one of them is None in all."""
    by_name: dict[str, list[SliceMetrics]] = {}
    for slices in seeds:
        for name, of_seed in slices.items():
            by_name.setdefault(name, []).append(of_seed)
    found = {}
    for name, each in by_name.items():
        aucs = [m.auc for m in each if m.auc is not None]
        found[name] = SliceMetrics(
            rows=each[0].rows,
            auc=float(np.mean(aucs)) if aucs else None,
            log_loss=float(np.mean([m.log_loss for m in each])),
        )
    return found


def _history_name(number: int, start: int) -> str:
    if number + 1 == len(_HISTORY_FROM):
        return f"history {start}+"
    end = _HISTORY_FROM[number + 1] - 1
    return f"history {start}" if start == end else f"history {start}-{end}"


# ----------------------------------------------------------------------------------------------------------- experiment


class AdaptorConfig(Config):
    """The hybrid-expert adaptor.

    As many experts as KAR's run script has, of a quarter of its width, for speed: `owlrec ctr sweep` compares widths
    on valid.
    """

    shared_experts: int = Field(default=2, ge=1)
    dedicated_experts: int = Field(default=5, ge=1)  # of each tower
    hidden_dim: int = Field(default=32, ge=1)


# Tables of more rows (items, say) get sparse gradients and row-wise Adagrad. In smaller ones most rows are in every
# batch, and AdamW is as good (MovieLens-100K, DCN-V2, one split: valid AUC .7545, row-wise .7539 at best).
SPARSE_ABOVE_ROWS = 50_000


class CTRConfig(Config):
    """What is trained, and how. Defaults were chosen on the valid AUC of MovieLens-100K, over three user splits."""

    backbones: tuple[str, ...] = Field(default=("din", "dcnv2"), min_length=1)
    arms: tuple[Arm, ...] = Field(default=("none", "knowledge", "shuffled", "metadata"), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    # Rows of all workers together; less where an epoch would have fewer than 30 steps.
    batch_size: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    # Of row-wise Adagrad, for tables of more than SPARSE_ABOVE_ROWS. MovieLens-100K, DCN-V2, one split: .005 gave
    # .7539, .01 .7530, .02 .7525, .05 .7496, .1 .7458.
    table_learning_rate: float = Field(default=0.005, gt=0)
    # bfloat16: the products of training in half the width; scores are always computed in float32. It pays on GPUs and
    # on CPUs with AMX or AVX512-BF16 (two cores of an EPYC: DCN-V2 trains 1.9 times as fast, DIN 1.3 times).
    precision: Literal["float32", "bfloat16"] = "float32"
    # From 0 to 1 it moved the valid AUC by less than .0005: early stopping does its work.
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=15, ge=1)  # at most
    patience: int = Field(default=2, ge=1)  # epochs without a better valid AUC before a trial ends
    dropout: float = Field(default=0.0, ge=0, lt=1)
    embed_dim: int = Field(default=32, ge=1)
    hidden_dims: tuple[int, ...] = Field(default=(200, 80), min_length=1)
    # Components that the adaptor reads of a knowledge vector: the first principal ones where it has more. None = all.
    knowledge_dim: int | None = Field(default=64, ge=1)
    adaptor: AdaptorConfig = AdaptorConfig()
    distillation: DistillationConfig | None = None  # None = labels alone; else `ranker score-pairs` comes first
    # Off, as in KAR: with few training users, demographics overfit (MovieLens-100K: valid AUC -.002 to -.004).
    use_profile: bool = False
    # Rarer items share one embedding, which is thereby trained for new items.
    min_item_count: int = Field(default=2, ge=1)
    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False

    @field_validator("backbones")
    @classmethod
    def _known_backbones(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                BACKBONES.check(name)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        return names

    @field_validator("backbones", "arms", "seeds")
    @classmethod
    def _no_doubles(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        repeated = sorted({str(v) for v in values if values.count(v) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} stands there more than once; a trial is trained once.")
        return values


class Trial(Config):
    """One model to train."""

    backbone: str
    arm: Arm
    seed: int

    @property
    def path(self) -> str:
        """Its folder, relative to the grid's."""
        return f"{self.backbone}/{self.arm}/seed-{self.seed}"


def trials(config: CTRConfig) -> list[Trial]:
    """The whole grid. The seed varies slowest: an interrupted grid has all arms of the seeds that it finished."""
    return [Trial(backbone=b, arm=a, seed=s) for s, b, a in product(config.seeds, config.backbones, config.arms)]


class Metrics(BaseModel):
    """Of one split. gauc is None where no user has both a positive and a negative."""

    auc: float
    gauc: float | None
    log_loss: float
    calibration_error: float


class TrialResult(BaseModel):
    """What a trained trial leaves in result.json."""

    backbone: str
    arm: Arm
    seed: int
    valid: Metrics
    test: Metrics
    epochs: int  # trained
    best_epoch: int  # whose weights were kept and tested, counted from 1
    seconds: float
    samples_per_s: float  # training rows of all workers together, evaluation left out
    parameters: int
    resumed: int = 0  # times that it went on from a checkpoint
    slices: dict[str, SliceMetrics]  # of the test split

    @property
    def trial(self) -> Trial:
        """Which trial this is the result of."""
        return Trial(backbone=self.backbone, arm=self.arm, seed=self.seed)


ENCODED = "samples"  # the folder of a grid's encoded samples, in its own


def grid_folder(fingerprint: str) -> str:
    """Where the trials of a grid live, relative to the workspace."""
    return f"ctr/{fingerprint[:16]}"


def finished_trials(workspace: Workspace, fingerprint: str, wanted: Iterable[Trial]) -> list[TrialResult]:
    """The results, in the order of `wanted`, of those trials that have one."""
    folder = grid_folder(fingerprint)
    paths = [f"{folder}/{trial.path}/result.json" for trial in wanted]
    return [TrialResult.model_validate(workspace.read_json(path)) for path in paths if workspace.exists(path)]


class PairedDifference(BaseModel):
    """Test AUC of an arm minus that of another with the same backbone, over the seeds that both have."""

    seeds: int
    auc: float  # mean of the seeds' differences
    rela_imp: float | None  # of the mean AUCs (evaluation.relative_improvement); None over a base no better than chance
    interval: Interval | None  # 95 %; None where not all of these trials left test scores, or of one user


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
    # To each of `bases`, where a seed has both: seeds are paired, so what a seed shifts in both arms cancels.
    differences: dict[Arm, PairedDifference] = {}
    slices: dict[str, SliceMetrics] = {}  # means over seeds


def summarise(results: Sequence[TrialResult], scores: GridScores | None = None) -> list[ArmSummary]:
    """One row a (backbone, arm), in the order in which they first occur.

    scores: the test scores that the trials left (`read_grid_scores`); with them differences get intervals.
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


def _differences(
    results: Sequence[TrialResult], scores: GridScores | None
) -> dict[tuple[str, Arm, Arm], PairedDifference]:
    """(backbone, arm, base) -> the difference of the two arms."""
    by_trial = {result.trial: result for result in results}
    pairs: dict[tuple[str, Arm, Arm], list[tuple[TrialResult, TrialResult]]] = {}
    for result in results:
        for base in bases(result.arm):
            if partner := by_trial.get(Trial(backbone=result.backbone, arm=base, seed=result.seed)):
                pairs.setdefault((result.backbone, result.arm, base), []).append((result, partner))
    paths = {key: [(arm.trial.path, base.trial.path) for arm, base in seeds] for key, seeds in pairs.items()}
    intervals = compare_arms(scores, paths) if scores else {}
    found = {}
    for key, seeds in pairs.items():
        arm_auc, base_auc = (float(np.mean([r.test.auc for r in side])) for side in zip(*seeds, strict=True))
        relative = relative_improvement(arm_auc, base_auc)
        found[key] = PairedDifference(
            seeds=len(seeds),
            auc=arm_auc - base_auc,
            rela_imp=None if math.isnan(relative) else relative,
            interval=intervals.get(key),
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


# --------------------------------------------------------------------------------------------------------------- scores
# The test scores of a trial, kept beside its model so that arms can be compared row by row long after training.
#
# Ids, labels and scores, nothing else: no texts, no histories, no profile. They are of at most
# `encoded.EVALUATED_ROWS` rows, and only the vectors that a comparison is about are in memory.


SCORES_FILE = "test_scores.parquet"
SCORES = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("label", pa.float32()), ("score", pa.float64())])


@dataclass(frozen=True)
class ScoredRows:
    """One row for each sample of a split that was scored, in the order of the samples table."""

    user_ids: np.ndarray  # int64 [n]
    item_ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # float32 [n]
    scores: np.ndarray  # float64 [n], probabilities

    def to_table(self) -> pa.Table:
        """As `SCHEMA`."""
        return pa.table([self.user_ids, self.item_ids, self.labels, self.scores], schema=SCORES)


def read_grid_scores(workspace: Workspace, fingerprint: str, trials: Iterable[Trial]) -> GridScores | None:
    """The test scores of those of `trials` that left any (older versions left none); None where none did.

    Raises WorkspaceError where two trials were not scored on the same rows.
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
                f"{workspace.path(path)} scores other rows ({rows.num_rows}) than the first trial of its grid does "
                f"({first.num_rows}). Delete the folder {workspace.path(grid_folder(fingerprint))} and run `train_ctr` "
                f"again."
            )
        paths[trial.path] = path
    if first is None:
        return None
    scores = _StoredScores(workspace, paths)
    return GridScores(first["user_id"].to_numpy(), first["label"].to_numpy(), scores)


class _StoredScores(Mapping[str, np.ndarray]):
    """The scores of trials by their path, read when they are asked for."""

    def __init__(self, workspace: Workspace, paths: Mapping[str, str]) -> None:
        self._workspace, self._paths = workspace, paths

    def __getitem__(self, trial: str) -> np.ndarray:
        scores: np.ndarray = self._workspace.read_parquet(self._paths[trial], ["score"])["score"].to_numpy()
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
