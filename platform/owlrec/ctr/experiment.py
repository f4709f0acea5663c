"""The grid of trials (backbone x arm x seed), its settings, what each arm reads, and what its results add up to.

A gain from an LLM is believable only beside its controls, so all arms are trained alike. By default there are four: no
knowledge; the LLM's knowledge; the same vectors handed to the wrong ids (`shuffled`: what the adaptor's extra
parameters alone are worth); and vectors of the title and attributes that the LLM was given (`metadata`: what the text
encoder alone is worth). Each may read semantic ids in place of vectors or beside them, so that one grid tells what form
serves best. No torch here: the recipe loads this module at every call.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, field_validator

from owlrec.config import Config
from owlrec.ctr.arms import Arm, bases
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.comparison import Evidence, GridScores, weigh
from owlrec.ctr.distillation import DistillationConfig
from owlrec.ctr.metrics import relative_improvement
from owlrec.ctr.slices import SliceMetrics, mean_slices
from owlrec.ctr.sweep import SweepConfig
from owlrec.errors import RecipeError
from owlrec.workspace import Workspace


class AdaptorConfig(Config):
    """The hybrid-expert adaptor.

    As many experts as KAR's run script has, of a quarter of its width, for speed: `pipelines.sweep_ctr` compares widths
    on valid.
    """

    shared_experts: int = Field(default=2, ge=1)
    dedicated_experts: int = Field(default=5, ge=1)  # of each tower
    hidden_dim: int = Field(default=32, ge=1)


class CTRConfig(Config):
    """What is trained, and how. Defaults were chosen on the valid AUC of MovieLens-100K, over three user splits."""

    backbones: tuple[str, ...] = Field(default=("din", "dcnv2"), min_length=1)
    arms: tuple[Arm, ...] = Field(default=("none", "knowledge", "shuffled", "metadata"), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    # Rows of all workers together; less where an epoch would have fewer than 30 steps.
    batch_size: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"  # cosine would reach 0 after `epochs`
    warmup_steps: int = Field(default=0, ge=0)
    # Tables of more rows (items, say) get sparse gradients and row-wise Adagrad. In smaller ones most rows are in every
    # batch, and AdamW is as good (MovieLens-100K, DCN-V2, one split: valid AUC .7545, row-wise .7539 at best).
    sparse_above_rows: int = Field(default=50_000, ge=0)
    # Of row-wise Adagrad. Same trial: .005 gave .7539, .01 .7530, .02 .7525, .05 .7496, .1 .7458.
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
    distillation: DistillationConfig | None = None  # None = labels alone; else `score-pairs` comes before training
    sweep: SweepConfig = SweepConfig()  # what `pipelines.sweep_ctr` tries
    # Off, as in KAR: with few training users, demographics overfit (MovieLens-100K: valid AUC -.002 to -.004).
    use_profile: bool = False
    # Rarer items share one embedding, which is thereby trained for new items.
    min_item_count: int = Field(default=2, ge=1)
    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    # Of each worker; None = the machine's cores, shared among its workers.
    threads: int | None = Field(default=None, ge=1)
    # Restarts after a lost worker, for spot machines; finished trials are kept.
    max_failures: int = Field(default=0, ge=0)
    # Between two checkpoints of a trial; a restart goes on from the last, at the very next sample.
    checkpoint_steps: int = Field(default=1000, ge=1)

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
        doubled = sorted({str(v) for v in values if values.count(v) > 1})
        if doubled:
            raise ValueError(f"{', '.join(doubled)} stands there more than once; a trial is trained once.")
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
    calibration_error: float | None = None  # metrics.equal_mass_calibration_error; older results lack it


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
    slices: dict[str, SliceMetrics] = {}  # of the test split; older results lack them

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
    rela_imp: float | None  # of the mean AUCs (metrics.relative_improvement); None over a base no better than chance
    evidence: Evidence | None  # None where not all of these trials left test scores


class ArmSummary(BaseModel):
    """One (backbone, arm) on the test split: means and sample standard deviations over seeds (None for one seed)."""

    backbone: str
    arm: Arm
    seeds: int
    auc: float
    auc_std: float | None
    gauc: float | None
    log_loss: float
    calibration_error: float | None = None
    # To each of `bases`, where a seed has both: seeds are paired, so what a seed shifts in both arms cancels.
    differences: dict[Arm, PairedDifference] = {}
    slices: dict[str, SliceMetrics] = {}  # means over seeds


def summarise(results: Sequence[TrialResult], scores: GridScores | None = None) -> list[ArmSummary]:
    """One row a (backbone, arm), in the order in which they first occur.

    scores: the test scores that the trials left (`scores.read_grid_scores`); with them differences get intervals.
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
                calibration_error=_mean([e for r in group if (e := r.test.calibration_error) is not None]),
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
    evidence = weigh(scores, paths) if scores else {}
    found = {}
    for key, seeds in pairs.items():
        arm_auc, base_auc = (float(np.mean([r.test.auc for r in side])) for side in zip(*seeds, strict=True))
        relative = relative_improvement(arm_auc, base_auc)
        found[key] = PairedDifference(
            seeds=len(seeds),
            auc=arm_auc - base_auc,
            rela_imp=None if math.isnan(relative) else relative,
            evidence=evidence.get(key),
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
