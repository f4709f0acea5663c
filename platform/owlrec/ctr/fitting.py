"""Trains one trial, on one process or on several that torch.distributed joins; knows nothing of Ray.

The best epoch is chosen on the valid AUC; the test split is scored once, with that epoch's weights (KAR's released code
selects on test, which flatters every figure). Vectors are gathered by id, from memory-mapped shards, batch by batch.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from owlrec.ctr import metrics
from owlrec.ctr.arms import STREAMING, arm_parts, arm_sources
from owlrec.ctr.batches import SplitBatches, Tables
from owlrec.ctr.cascade import cascade_slots
from owlrec.ctr.checkpoint import CheckpointFile
from owlrec.ctr.codes import code_sizes
from owlrec.ctr.epochs import Epochs
from owlrec.ctr.experiment import CTRConfig, Metrics, Trial, TrialResult
from owlrec.ctr.features import Features, Split, Vocabularies
from owlrec.ctr.knowledge import VectorTable, refuse_two_sizes
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.order import scan_steps, segments
from owlrec.ctr.scores import ScoredRows
from owlrec.ctr.slices import slice_metrics, slices_of
from owlrec.ctr.worker import ALONE, Worker
from owlrec.errors import RecipeError

_SCORING_ROWS = 8192
# Settings that may change while a trial is interrupted.
_BESIDE_A_TRIAL = {"backbones", "arms", "seeds", "sweep", "patience", "threads", "max_failures", "checkpoint_steps"}


@dataclass(frozen=True)
class TrainingData:
    """What all trials of a grid share."""

    features: Features
    knowledge: Mapping[str, Mapping[str, VectorTable]]  # source -> side ("user", "item"), as the arms need them

    def tables(self, trial: Trial) -> Tables | None:
        """What `tables_of` gives."""
        return tables_of(trial, self.knowledge)


def tables_of(trial: Trial, knowledge: Mapping[str, Mapping[str, VectorTable]]) -> Tables | None:
    """The vectors that a trial reads, None for arm "none".

    knowledge: as TrainingData holds it. Raises RecipeError where they were not given, SchemaError where two tables
    differ in size or codes are missing.
    """
    if trial.arm == "none":
        return None
    sources = arm_sources(trial.arm, knowledge)
    of_user = ("knowledge", STREAMING) if arm_parts(trial.arm)[0] == "streaming" else sources.user
    users = {f"{source} vectors of users": knowledge[source]["user"] for source in of_user}
    items = {f"{source} vectors of items": knowledge[source]["item"] for source in sources.item}
    reads, form = arm_parts(trial.arm)
    if form != "codes":
        refuse_two_sizes({**users, **items})
    of_users = tuple(users.values()) if reads != "streaming" else cascade_slots(*users.values())
    tables = Tables(of_users, tuple(items.values()), form)
    return tables.shuffled(trial.seed) if reads == "shuffled" else tables


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
    begin: Callable[[CTRModel, Vocabularies], None] | None = None,
) -> Trained:
    """Trains a trial to its best valid AUC, and scores valid and test with that epoch's weights.

    Where world_size exceeds 1, every rank of the process group must call it; all return the same metrics and weights.
    checkpoint: the trial goes on from it where it exists, and writes it. Whoever has stored the result deletes it.
    begin: gives the new model other weights than random ones (WarmStart.load_into).
    Raises RecipeError where training diverges, or where the arm's vectors are missing; WorkspaceError for a checkpoint
    of another model.
    """
    started = time.perf_counter()
    tables = data.tables(trial)
    splits = {name: SplitBatches(split, tables, worker.device) for name, split in data.features.splits.items()}
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
    model = CTRModel(spec, data.features.items)
    if begin is not None:
        begin(model, data.features.vocabularies)
    model = model.to(worker.device)
    train, labels = splits["train"].split, _columns(splits["valid"].split, "labels")[0]
    if checkpoint is not None:
        checkpoint = checkpoint.of(
            spec, trial, config.model_dump(exclude=_BESIDE_A_TRIAL), worker.world_size, train.sizes
        )

    def valid_auc(epoch: int) -> float:
        scores = score(model, splits["valid"], worker)
        if not np.isfinite(scores).all():
            raise RecipeError(
                f"ctr: {trial.path} diverged in epoch {epoch} (a score is not finite). "
                f"Lower ctr.learning_rate (now {config.learning_rate})."
            )
        return metrics.auc(labels, scores)

    progress = Epochs(model, config, trial.seed, train.sizes, worker, checkpoint).train(splits["train"], valid_auc)
    valid, test = (_scored(model, splits[name], worker) for name in ("valid", "test"))
    items, lengths = _columns(splits["test"].split, "items", "history_lengths")
    slices = slices_of(items, lengths, data.features.item_counts)
    result = TrialResult(
        **trial.model_dump(),
        valid=_evaluate(valid),
        test=_evaluate(test),
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        seconds=round(time.perf_counter() - started, 3),
        samples_per_s=round(progress.epoch * len(train) / max(progress.training_s, 1e-9), 1),
        parameters=sum(p.numel() for p in model.parameters()),
        resumed=progress.resumed,
        slices=slice_metrics(test.labels, test.scores, slices),
    )
    return Trained(result, model.eval(), test)


def score(model: CTRModel, split: SplitBatches, worker: Worker = ALONE) -> np.ndarray:
    """float64 [n]: the probabilities of a split's rows, in its order, on every rank; each computes a range of them."""
    sizes, n = split.split.sizes, len(split.split)
    share = -(-n // worker.world_size)
    start, end = (min(n, share * rank) for rank in (worker.rank, worker.rank + 1))
    model.eval()
    with torch.no_grad(), closing(split.batches(scan_steps(sizes, start, end, _SCORING_ROWS))) as batches:
        parts = [model(batch) for batch, _ in batches]
    logits = torch.cat([*parts, torch.empty(0, device=split.device)])
    if worker.world_size > 1:
        # The last ranks may have fewer rows: they pad, and the cut to n removes exactly that padding.
        logits = F.pad(logits, (0, share - len(logits)))
        gathered = [torch.empty_like(logits) for _ in range(worker.world_size)]
        dist.all_gather(gathered, logits)
        logits = torch.cat(gathered)[:n]
    return logits.double().sigmoid().cpu().numpy()


def _columns(split: Split, *names: str) -> list[np.ndarray]:
    """Columns of a whole split, copied, without the behaviors that it refers to."""
    columns: list[list[np.ndarray]] = [[] for _ in names]
    for shard, a, b in segments(split.sizes, 0, len(split)):
        samples = split.shards[shard]
        for column, name in zip(columns, names, strict=True):
            column.append(np.array(getattr(samples, name)[a:b]))
    return [np.concatenate(column) for column in columns]


def _scored(model: CTRModel, split: SplitBatches, worker: Worker) -> ScoredRows:
    user_ids, item_ids, labels = _columns(split.split, "user_ids", "item_ids", "labels")
    return ScoredRows(user_ids, item_ids, labels, score(model, split, worker))


def _evaluate(rows: ScoredRows) -> Metrics:
    gauc = metrics.gauc(rows.labels, rows.scores, rows.user_ids)
    return Metrics(
        auc=metrics.auc(rows.labels, rows.scores),
        gauc=None if np.isnan(gauc) else gauc,
        log_loss=metrics.log_loss(rows.labels, rows.scores),
        calibration_error=metrics.equal_mass_calibration_error(rows.labels, rows.scores),
    )
