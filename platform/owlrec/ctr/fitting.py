"""Trains one trial, on one process or on several that torch.distributed joins; knows nothing of Ray.

The best epoch is chosen on the valid AUC; the test split is scored once, with that epoch's weights (KAR's released code
selects on test, which flatters every figure). Vectors are gathered by id, from a memory-mapped table, batch by batch.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from owlrec.ctr import metrics
from owlrec.ctr.adaptor import Knowledge
from owlrec.ctr.arms import Form, arm_parts, arm_sources
from owlrec.ctr.checkpoint import CheckpointFile
from owlrec.ctr.codes import Codes, code_sizes
from owlrec.ctr.epochs import Epochs
from owlrec.ctr.experiment import CTRConfig, Metrics, Trial, TrialResult
from owlrec.ctr.features import Features, SampleFeatures
from owlrec.ctr.knowledge import KnowledgeTable, refuse_non_finite, refuse_two_sizes
from owlrec.ctr.model import Batch, CTRModel, ModelSpec
from owlrec.ctr.scores import ScoredRows
from owlrec.ctr.slices import slice_metrics, slices_of
from owlrec.ctr.worker import ALONE, Worker
from owlrec.errors import RecipeError

_SCORING_ROWS = 8192
# Settings that may change while a trial is interrupted.
_BESIDE_A_TRIAL = {"backbones", "arms", "seeds", "sweep", "patience", "threads", "max_failures", "checkpoint_steps"}


@dataclass(frozen=True)
class Tables:
    """The vectors and semantic ids that a trial reads, a table a source; vectors of one dimension."""

    users: tuple[KnowledgeTable, ...]
    items: tuple[KnowledgeTable, ...]
    form: Form = "vectors"

    @property
    def dim(self) -> int:
        """Components of a vector; 0 where vectors are not read."""
        return 0 if self.form == "codes" else self.users[0].dim

    def shuffled(self, seed: int) -> "Tables":
        """Each table with its vectors and codes handed to the wrong ids (KnowledgeTable.shuffled)."""
        users, items = (tuple(t.shuffled(seed) for t in tables) for tables in (self.users, self.items))
        return Tables(users, items, self.form)


@dataclass(frozen=True)
class TrainingData:
    """What all trials of a grid share."""

    features: Features
    knowledge: Mapping[str, Mapping[str, KnowledgeTable]]  # source -> side ("user", "item"), as the arms need them

    def tables(self, trial: Trial) -> Tables | None:
        """What `tables_of` gives."""
        return tables_of(trial, self.knowledge)


def tables_of(trial: Trial, knowledge: Mapping[str, Mapping[str, KnowledgeTable]]) -> Tables | None:
    """The vectors that a trial reads, None for arm "none".

    knowledge: as TrainingData holds it. Raises RecipeError where they were not given, SchemaError where two tables
    differ in size or codes are missing.
    """
    if trial.arm == "none":
        return None
    sources = arm_sources(trial.arm, knowledge)
    users = {f"{source} vectors of users": knowledge[source]["user"] for source in sources.user}
    items = {f"{source} vectors of items": knowledge[source]["item"] for source in sources.item}
    reads, form = arm_parts(trial.arm)
    if form != "codes":
        refuse_two_sizes({**users, **items})
    tables = Tables(tuple(users.values()), tuple(items.values()), form)
    return tables.shuffled(trial.seed) if reads == "shuffled" else tables


class SplitTensors:
    """A split, which stays where it is (mapped from disk, perhaps), and the batches on a device that it gives."""

    def __init__(self, samples: SampleFeatures, tables: Tables | None, device: str) -> None:
        self.samples, self.tables, self.device = samples, tables, device
        codes = (samples.items, samples.history, samples.ratings, samples.profile)
        self.codes = [torch.from_numpy(array) for array in codes]
        self.labels = torch.from_numpy(samples.labels)

    def batch(self, rows: Tensor) -> Batch:
        """rows: int64 [b], on the CPU: which samples."""
        items, history, ratings, profile = (
            array.index_select(0, rows).to(self.device, non_blocking=True).long() for array in self.codes
        )
        if self.tables is None:
            return Batch(items, history, ratings, profile)
        user, user_codes = self._known(self.tables.users, self.samples.user_ids[rows.numpy()], self.tables.form)
        item, item_codes = self._known(self.tables.items, self.samples.item_ids[rows.numpy()], self.tables.form)
        return Batch(items, history, ratings, profile, user, item, user_codes, item_codes)

    def labels_of(self, rows: Tensor) -> Tensor:
        """float32 [b], on the device. rows: as `batch` takes them."""
        return self.labels[rows].to(self.device)

    def _known(
        self, tables: Sequence[KnowledgeTable], ids: np.ndarray, form: Form
    ) -> tuple[Knowledge | None, Codes | None]:
        """Vectors and semantic ids of one side, as far as the form asks for them."""
        inverse, distinct = pd.factorize(ids)  # by hashes: np.unique would sort
        rows = torch.from_numpy(inverse).to(self.device)
        knowledge, codes = None, None
        if form != "codes":
            gathered = zip(*(table.gather(distinct) for table in tables), strict=True)
            halves, mask = (torch.from_numpy(np.stack(arrays, axis=1)) for arrays in gathered)
            vectors = halves.float()
            refuse_non_finite(vectors.numpy(), distinct)
            knowledge = Knowledge(vectors.to(self.device), mask.to(self.device), rows)
        if form != "vectors":
            codes = Codes(torch.from_numpy(tables[0].gather_codes(distinct)).to(self.device), rows)
        return knowledge, codes


@dataclass(frozen=True)
class Trained:
    """A trial's result, its model with the best epoch's weights, and how that scored the test split."""

    result: TrialResult
    model: CTRModel
    test: ScoredRows


def train_one(
    trial: Trial,
    data: TrainingData,
    config: CTRConfig,
    worker: Worker = ALONE,
    checkpoint: CheckpointFile | None = None,
) -> Trained:
    """Trains a trial to its best valid AUC, and scores valid and test with that epoch's weights.

    Where world_size exceeds 1, every rank of the process group must call it; all return the same metrics and weights.
    checkpoint: the trial goes on from it where it exists, and writes it. Whoever has stored the result deletes it.
    Raises RecipeError where training diverges, or where the arm's vectors are missing; WorkspaceError for a checkpoint
    of another model.
    """
    started = time.perf_counter()
    tables = data.tables(trial)
    splits = {name: SplitTensors(samples, tables, worker.device) for name, samples in data.features.splits.items()}
    torch.manual_seed(trial.seed)
    spec = ModelSpec.of(
        data.features.spec,
        trial.backbone,
        tables.dim if tables else 0,
        config,
        user_sources=len(tables.users) if tables else 1,
        item_sources=len(tables.items) if tables else 1,
        user_codes=code_sizes(tables.users) if tables and tables.form != "vectors" else (),
        item_codes=code_sizes(tables.items) if tables and tables.form != "vectors" else (),
    )
    model = CTRModel(spec, data.features.items).to(worker.device)
    n_train, labels = len(splits["train"].labels), splits["valid"].samples.labels
    if checkpoint is not None:
        checkpoint = checkpoint.of(spec, trial, config.model_dump(exclude=_BESIDE_A_TRIAL), worker.world_size, n_train)

    def valid_auc(epoch: int) -> float:
        scores = score(model, splits["valid"], worker)
        if not np.isfinite(scores).all():
            raise RecipeError(
                f"ctr: {trial.path} diverged in epoch {epoch} (a score is not finite). "
                f"Lower ctr.learning_rate (now {config.learning_rate})."
            )
        return metrics.auc(labels, scores)

    progress = Epochs(model, config, trial.seed, n_train, worker, checkpoint).train(splits["train"], valid_auc)
    valid, test = (_scored(model, splits[name], worker) for name in ("valid", "test"))
    slices = slices_of(splits["test"].samples, splits["train"].samples)
    result = TrialResult(
        **trial.model_dump(),
        valid=_evaluate(valid),
        test=_evaluate(test),
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        seconds=round(time.perf_counter() - started, 3),
        samples_per_s=round(progress.epoch * n_train / max(progress.training_s, 1e-9), 1),
        parameters=sum(p.numel() for p in model.parameters()),
        resumed=progress.resumed,
        slices=slice_metrics(test.labels, test.scores, slices),
    )
    return Trained(result, model.eval(), test)


def score(model: CTRModel, split: SplitTensors, worker: Worker = ALONE) -> np.ndarray:
    """float64 [n]: the probabilities of a split's rows, in its order, on every rank; each computes its share."""
    n, world_size = len(split.labels), worker.world_size
    model.eval()
    with torch.no_grad():
        parts = [model(split.batch(rows)) for rows in torch.arange(worker.rank, n, world_size).split(_SCORING_ROWS)]
    logits = torch.cat([*parts, torch.empty(0, device=split.device)])
    if world_size > 1:
        # Ranks differ by at most one row: the shorter ones pad, and the cut to n removes exactly that padding.
        logits = F.pad(logits, (0, -(-n // world_size) - len(logits)))
        gathered = [torch.empty_like(logits) for _ in range(world_size)]
        dist.all_gather(gathered, logits)
        logits = torch.stack(gathered, dim=1).flatten()[:n]
    return logits.double().sigmoid().cpu().numpy()


def _scored(model: CTRModel, split: SplitTensors, worker: Worker) -> ScoredRows:
    samples = split.samples
    return ScoredRows(samples.user_ids, samples.item_ids, samples.labels, score(model, split, worker))


def _evaluate(rows: ScoredRows) -> Metrics:
    gauc = metrics.gauc(rows.labels, rows.scores, rows.user_ids)
    return Metrics(
        auc=metrics.auc(rows.labels, rows.scores),
        gauc=None if np.isnan(gauc) else gauc,
        log_loss=metrics.log_loss(rows.labels, rows.scores),
        calibration_error=metrics.equal_mass_calibration_error(rows.labels, rows.scores),
    )
