"""Trains one trial, on one process or on several that torch.distributed joins; knows nothing of Ray.

Each epoch's shuffle is dealt out to the ranks like cards, so that they take equal numbers of steps and together
see the batches that a single one would (up to rounding, where the ranks do not divide a batch). The best epoch is
chosen on the valid AUC; the test split is scored once, with that epoch's weights (KAR's released code selects on test,
which flatters every figure).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.ctr import metrics
from owlrec.ctr.adaptor import Knowledge
from owlrec.ctr.experiment import CTRConfig, Metrics, Trial, TrialResult, arm_sources
from owlrec.ctr.features import Features, SampleFeatures
from owlrec.ctr.knowledge import KnowledgeTable
from owlrec.ctr.model import Batch, CTRModel, ModelSpec
from owlrec.ctr.scores import ScoredRows
from owlrec.ctr.slices import slice_metrics, slices_of
from owlrec.errors import RecipeError, SchemaError

_SCORING_ROWS = 8192
# With fewer steps an epoch, early stopping judges a model that has hardly moved: on 9,554 rows of MovieLens-100K,
# batches of 2048 stopped at epoch 1 in two of eight trials and were still improving after 15 in most others.
_MIN_STEPS = 30


@dataclass(frozen=True)
class Tables:
    """The vectors that a trial reads, a table a source; all of one dimension."""

    users: tuple[KnowledgeTable, ...]
    items: tuple[KnowledgeTable, ...]

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.users[0].dim

    def shuffled(self, seed: int) -> "Tables":
        """Each table with its vectors handed to the wrong ids (KnowledgeTable.shuffled)."""
        return Tables(tuple(t.shuffled(seed) for t in self.users), tuple(t.shuffled(seed) for t in self.items))


@dataclass(frozen=True)
class TrainingData:
    """What all trials of a grid share."""

    features: Features
    knowledge: Mapping[str, Mapping[str, KnowledgeTable]]  # source -> side ("user", "item"), as the arms need them

    def tables(self, trial: Trial) -> Tables | None:
        """The vectors that a trial reads, None for arm "none".

        Raises RecipeError where they were not given, SchemaError where two tables differ in size.
        """
        if trial.arm == "none":
            return None
        sources = arm_sources(trial.arm, self.knowledge)
        users = {f"{source} vectors of users": self.knowledge[source]["user"] for source in sources.user}
        items = {f"{source} vectors of items": self.knowledge[source]["item"] for source in sources.item}
        _refuse_two_sizes({**users, **items})
        tables = Tables(tuple(users.values()), tuple(items.values()))
        return tables.shuffled(trial.seed) if trial.arm == "shuffled" else tables


def _refuse_two_sizes(tables: Mapping[str, KnowledgeTable]) -> None:
    (first, table), *others = tables.items()
    for name, other in others:
        if other.dim != table.dim:
            raise SchemaError(
                f"{first} have {table.dim} components but {name} have {other.dim}; the adaptor's shared experts read "
                f"both. Encode both with one encoder."
            )


class SplitTensors:
    """A split on a device, and the batches that can be drawn from it."""

    def __init__(self, samples: SampleFeatures, tables: Tables | None, device: str) -> None:
        self.samples, self.tables, self.device = samples, tables, device
        codes = (samples.items, samples.history, samples.ratings, samples.profile)
        self.codes = [torch.from_numpy(array).to(device) for array in codes]
        self.labels = torch.from_numpy(samples.labels).to(device)

    def batch(self, rows: Tensor) -> Batch:
        """rows: int64 [b], on the CPU: which samples."""
        on_device = rows.to(self.device)
        items, history, ratings, profile = (array.index_select(0, on_device).long() for array in self.codes)
        user: Knowledge | None = None
        item: Knowledge | None = None
        if self.tables is not None:
            user = self._knowledge(self.tables.users, self.samples.user_ids[rows.numpy()])
            item = self._knowledge(self.tables.items, self.samples.item_ids[rows.numpy()])
        return Batch(items, history, ratings, profile, user, item)

    def _knowledge(self, tables: Sequence[KnowledgeTable], ids: np.ndarray) -> Knowledge:
        distinct, rows = np.unique(ids, return_inverse=True)
        gathered = zip(*(table.gather(distinct) for table in tables), strict=True)
        vectors, mask = (np.stack(arrays, axis=1) for arrays in gathered)
        return Knowledge(*(torch.from_numpy(array).to(self.device) for array in (vectors, mask, rows)))


@dataclass(frozen=True)
class Trained:
    """A trial's result, its model with the best epoch's weights, and how that scored the test split."""

    result: TrialResult
    model: CTRModel
    test: ScoredRows


def train_one(
    trial: Trial, data: TrainingData, config: CTRConfig, rank: int = 0, world_size: int = 1, device: str = "cpu"
) -> Trained:
    """Trains a trial to its best valid AUC, and scores valid and test with that epoch's weights.

    Where world_size exceeds 1, every rank of the process group must call it; all return the same metrics and weights.
    Raises RecipeError where training diverges, or where the arm's vectors are missing.
    """
    started = time.perf_counter()
    tables = data.tables(trial)
    splits = {name: SplitTensors(samples, tables, device) for name, samples in data.features.splits.items()}
    torch.manual_seed(trial.seed)
    spec = ModelSpec.of(
        data.features.spec,
        trial.backbone,
        tables.dim if tables else 0,
        config,
        user_sources=len(tables.users) if tables else 1,
        item_sources=len(tables.items) if tables else 1,
    )
    model = CTRModel(spec, data.features.items).to(device)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    torch.manual_seed(trial.seed + rank)  # from here on randomness is dropout, which must differ between ranks
    shuffle = torch.Generator().manual_seed(trial.seed)

    n_train = len(splits["train"].labels)
    batch_size = min(config.batch_size, max(1, n_train // _MIN_STEPS))
    best_auc, best_epoch, best_weights = -1.0, 0, _weights(model)
    epoch, rows_seen, training_s = 0, 0, 0.0
    for epoch in range(1, config.epochs + 1):
        epoch_started = time.perf_counter()
        rows = epoch_rows(n_train, shuffle, rank, world_size)
        _train_epoch(wrapped, optimiser, splits["train"], rows, max(1, batch_size // world_size))
        training_s += time.perf_counter() - epoch_started
        rows_seen += len(rows) * world_size
        scores = score(model, splits["valid"], rank, world_size)
        if not np.isfinite(scores).all():
            raise RecipeError(
                f"ctr: {trial.path} diverged in epoch {epoch} (a score is not finite). "
                f"Lower ctr.learning_rate (now {config.learning_rate})."
            )
        auc = metrics.auc(splits["valid"].samples.labels, scores)
        if auc > best_auc:
            best_auc, best_epoch, best_weights = auc, epoch, _weights(model)
        elif epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(best_weights)
    valid, test = (_scored(model, splits[name], rank, world_size) for name in ("valid", "test"))
    slices = slices_of(splits["test"].samples, splits["train"].samples)
    result = TrialResult(
        **trial.model_dump(),
        valid=_evaluate(valid),
        test=_evaluate(test),
        epochs=epoch,
        best_epoch=best_epoch,
        seconds=round(time.perf_counter() - started, 3),
        samples_per_s=round(rows_seen / max(training_s, 1e-9), 1),
        parameters=sum(p.numel() for p in model.parameters()),
        slices=slice_metrics(test.labels, test.scores, slices),
    )
    return Trained(result, model.eval(), test)


def epoch_rows(n: int, shuffle: torch.Generator, rank: int, world_size: int) -> Tensor:
    """int64 [n // world_size]: the rank's rows of the next epoch; up to world_size - 1 rows of it sit out."""
    order = torch.randperm(n, generator=shuffle)
    return order[: n - n % world_size][rank::world_size]


def score(model: CTRModel, split: SplitTensors, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """float64 [n]: the probabilities of a split's rows, in its order, on every rank; each computes its share."""
    n = len(split.labels)
    model.eval()
    with torch.no_grad():
        parts = [model(split.batch(rows)) for rows in torch.arange(rank, n, world_size).split(_SCORING_ROWS)]
    logits = torch.cat([*parts, torch.empty(0, device=split.device)])
    if world_size > 1:
        # Ranks differ by at most one row: the shorter ones pad, and the cut to n removes exactly that padding.
        logits = F.pad(logits, (0, -(-n // world_size) - len(logits)))
        gathered = [torch.empty_like(logits) for _ in range(world_size)]
        dist.all_gather(gathered, logits)
        logits = torch.stack(gathered, dim=1).flatten()[:n]
    return logits.double().sigmoid().cpu().numpy()


def _train_epoch(
    model: nn.Module, optimiser: torch.optim.Optimizer, split: SplitTensors, rows: Tensor, batch_size: int
) -> None:
    model.train()
    for batch in rows.split(batch_size):
        loss = F.binary_cross_entropy_with_logits(model(split.batch(batch)), split.labels[batch.to(split.device)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _scored(model: CTRModel, split: SplitTensors, rank: int, world_size: int) -> ScoredRows:
    samples = split.samples
    return ScoredRows(samples.user_ids, samples.item_ids, samples.labels, score(model, split, rank, world_size))


def _evaluate(rows: ScoredRows) -> Metrics:
    gauc = metrics.gauc(rows.labels, rows.scores, rows.user_ids)
    return Metrics(
        auc=metrics.auc(rows.labels, rows.scores),
        gauc=None if np.isnan(gauc) else gauc,
        log_loss=metrics.log_loss(rows.labels, rows.scores),
        calibration_error=metrics.equal_mass_calibration_error(rows.labels, rows.scores),
    )


def _weights(model: CTRModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
